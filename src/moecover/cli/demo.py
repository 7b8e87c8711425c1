"""The verb `demo`: what each method leaves of the shipped model."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.checkpoints.shipped import DEFAULT
from moecover.cli.values import dtype
from moecover.cli.verb import Outcome
from moecover.terminal import aligned

if TYPE_CHECKING:
    from moecover.cli.tour import Demo, Row

HELP = "prune the shipped model and show what each method leaves of it"
HEADINGS = ("method", "kept", "MB", "encyclopedia", "web", "Python source", "geometric mean")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("demo-out"),
        metavar="DIR",
        help="folder to write (default: demo-out)",
    )
    parser.add_argument(
        "--model",
        default=DEFAULT,
        metavar="NAME",
        help=f"a model that comes with the package (default: {DEFAULT})",
    )
    parser.add_argument(
        "--dtype",
        type=dtype,
        help="auto (the checkpoint's bfloat16) or float32 (default: the faster one here: many processors have no "
        "instructions for bfloat16)",
    )


def run(args: argparse.Namespace) -> Outcome:
    """Run the demo; print its table and what was written."""
    from moecover.cli.tour import tour
    from moecover.runtime.cost import arithmetic_speed

    dtype = args.dtype or max(("float32", "auto"), key=lambda one: arithmetic_speed(one, "cpu"))
    made = tour(args.output, name=args.model, dtype=dtype)
    return Outcome(made.to_json(), told(made, args.output))


def cells(row: Row) -> list[str]:
    """A row of the table: perplexity with its standard deviation over seeds."""
    found = [row.label, f"{row.retain:.0%}", f"{row.size_bytes / 1e6:.1f}"]
    for corpus, values in row.perplexity.items():
        spread = f" ±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
        found.append(f"{row.mean(corpus):.1f}{spread}")
    return [*found, f"{row.geometric_mean():.1f}"]


def table(rows: list[Row]) -> str:
    """The comparison as aligned text, a rule between budgets."""
    sections = [number for number in range(1, len(rows)) if rows[number].retain != rows[number - 1].retain]
    return aligned(HEADINGS, [cells(row) for row in rows], left=1, sections=sections)


def markdown_table(rows: list[Row]) -> str:
    """The comparison for the README."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines)


def rows_from_json(text: str) -> list[Row]:
    """Rows of the demo's results file."""
    from moecover.cli.tour import Row

    return [Row(**row) for row in json.loads(text)["rows"]]


def told(made: Demo, output: Path) -> str:
    """The demo's result as text: the table, the proof, what was written, what comes next."""
    from moecover.cli.tour import LENGTH, RESULTS, SEQUENCES, SHRUNK, WRITTEN, plan_file

    shown = os.path.relpath(output)
    shown = str(output) if shown.startswith("..") else shown
    about = {
        "profile": "statistics of every expert, reusable for any method and budget",
        "plans": "which experts each method keeps, and why",
        "explained": "figures of the first plan: utility and kept experts by corpus, agreement of the corpora, "
        "stability",
        WRITTEN: "the pruned checkpoint: loads in transformers like any other",
        f"{SHRUNK}-25": "what `shrink` makes of the model, and shrunk-50: the shape that loses least, repaired",
        RESULTS: "the numbers above",
    }
    files = "\n".join(f"  {shown}/{name:{len(RESULTS)}}  {text}" for name, text in about.items())
    calibration = " and ".join(f"{name} ({tokens:,} tokens)" for name, tokens in made.calibration.items())
    program = "moecover" if shutil.which("moecover") else shlex.quote(str(Path(sys.executable).with_name("moecover")))
    tokens = made.verified["tokens"]
    windows = f"{SEQUENCES} windows of {LENGTH} tokens a text at most"
    return f"""Perplexity on held-out text (lower is better; {windows}); experts chosen on {calibration},
in the rows of `shrink` on text that the model wrote too. The Python source is a domain that no method was given.
"Kept" is the share of the experts' bytes.

{table(made.rows)}

Verified: {shown}/{WRITTEN} computes bit for bit what the masked original computes ({tokens} tokens of real text).

{files}

Why these experts:
  {program} explain {shown}/plans/{plan_file(made.half)} --profile {shown}/profile

On a real model:
  {program} shrink Qwen/Qwen1.5-MoE-A2.7B --budget 50% -o qwen-moe-half"""
