"""The demo: profiles the shipped model, plans with every method, writes and verifies a checkpoint, compares perplexity.

Reads only what the package ships and the interpreter's standard library; writes one folder. It is also a tour of the
Python API: the functions called here are the public ones.
"""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover import progress
from moecover.checkpoints.shipped import DEFAULT, shipped_model
from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.packing import Corpus, load_corpus
from moecover.errors import MoecoverError
from moecover.evaluation.perplexity import perplexity
from moecover.files.atomic import check_output, new_folder, write_text
from moecover.planning.artifact import Plan, keep_all
from moecover.planning.explaining.facts import explain
from moecover.planning.keep import resolve_keep
from moecover.planning.masking import masked
from moecover.planning.run import DEFAULT_METHOD, plan_budgets
from moecover.profiling.artifact import Profile
from moecover.profiling.run import profile
from moecover.pruning.writer import prune
from moecover.reporting.figures.plan_figures import draw
from moecover.runtime.loading import load_model
from moecover.verification.verify import verify

if TYPE_CHECKING:
    import torch

CALIBRATION = ("encyclopedia", "web")
HELD_OUT = ("encyclopedia-heldout", "web-heldout", "python-heldout")
LENGTH, SEQUENCES = 256, 40
BATCH_SIZE, SEARCH_TOKENS = 16, 8192
BUDGETS = (0.5, 0.25)
WRITTEN = "pruned-50"
RESULTS = "moecover-demo.json"  # also the mark by which a second run knows the folder as a demo's
# Label, and the options of `plan`; seeds are averaged.
RUNS: tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...] = (
    ("tb-coverage", {"method": "tb-coverage"}, ()),
    ("pooled contribution", {"method": "pooled", "saliency": "contribution"}, ()),
    ("REAP", {"method": "pooled", "saliency": "reap"}, ()),
    ("ExpertSparsity", {"method": "expert-sparsity"}, ()),
    ("random, mean of 3", {"method": "random"}, (0, 1, 2)),
)


@dataclass(frozen=True)
class Row:
    """One line of the comparison: perplexity by held-out corpus, a list over seeds."""

    label: str
    retain: float
    keep: int
    size_bytes: int
    perplexity: dict[str, list[float]]

    def mean(self, corpus: str) -> float:
        return statistics.fmean(self.perplexity[corpus])

    def geometric_mean(self) -> float:
        return math.exp(statistics.fmean(math.log(self.mean(corpus)) for corpus in self.perplexity))


def held_out_corpora(structure: Structure) -> list[Corpus]:
    """The held-out texts of the demo, at most SEQUENCES blocks of LENGTH tokens each."""
    loaded = [load_corpus(name, structure=structure, length=LENGTH) for name in HELD_OUT]
    return [corpus[:SEQUENCES] for corpus in loaded]


def _plan_file(made: Plan) -> str:
    parts = [
        made.method,
        made.options.get("saliency"),
        f"seed{made.options['seed']}" if "seed" in made.options else None,
    ]
    return "-".join([*filter(None, parts), f"keep{made.keep}.json"])


def plan_all(structure: Structure, model: torch.nn.Module, made: Profile) -> list[tuple[str, float, list[Plan]]]:
    """Label, budget and plans (one a seed) of every run at every budget, the full model first."""
    topology = structure.topology
    keeps = [resolve_keep(topology, keep=None, retain=retain) for retain in BUDGETS]
    by_run: list[tuple[str, list[list[Plan]]]] = []
    for label, options, seeds in RUNS:
        if options["method"] == "expert-sparsity":
            with progress.bar("searching", len(topology.decoder_layers), unit="layers") as advance:
                found = [plan_budgets(made, keeps=keeps, model=model, structure=structure, advance=advance, **options)]
        else:
            seeded = [{**options, "seed": seed} for seed in seeds] or [options]
            found = [plan_budgets(made, keeps=keeps, **o) for o in seeded]
        by_run.append((label, found))
    work: list[tuple[str, float, list[Plan]]] = [("full model", 1.0, [keep_all(topology)])]
    for budget, retain in enumerate(BUDGETS):
        work += [(label, retain, [row[budget] for row in found]) for label, found in by_run]
    return work


def compare(structure: Structure, model: torch.nn.Module, work: list[tuple[str, float, list[Plan]]]) -> list[Row]:
    """Held-out perplexity of every plan."""
    corpora = held_out_corpora(structure)
    rows = []
    total = sum(c.num_tokens for c in corpora) * sum(len(chosen) for _, _, chosen in work)
    with progress.bar("measuring perplexity", total) as advance:
        for label, retain, chosen in work:
            values: dict[str, list[float]] = {corpus.name: [] for corpus in corpora}
            for p in chosen:
                with masked(model, structure, p):
                    for corpus in corpora:
                        values[corpus.name].append(perplexity(model, corpus, advance=advance))
            rows.append(Row(label, retain, chosen[0].keep, structure.num_bytes(chosen[0].keep), values))
    return rows


def _cells(row: Row) -> list[str]:
    cells = [row.label, f"{row.retain:.0%}", f"{row.size_bytes / 1e6:.1f}"]
    for corpus in HELD_OUT:
        values = row.perplexity[corpus]
        spread = f" ±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{row.mean(corpus):.1f}{spread}")
    return [*cells, f"{row.geometric_mean():.1f}"]


HEADINGS = ("method", "experts", "MB", "encyclopedia", "web", "Python source", "geometric mean")


def table(rows: list[Row]) -> str:
    """The comparison as aligned text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(HEADINGS):
        drawn.add_column(heading, justify="left" if i == 0 else "right", no_wrap=True)
    previous = rows[0].retain
    for row in rows:
        if row.retain != previous:
            drawn.add_section()
        previous = row.retain
        drawn.add_row(*_cells(row))
    out = io.StringIO()
    Console(file=out, width=110).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())


def markdown_table(rows: list[Row]) -> str:
    """The comparison for the README."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines)


def rows_from_json(text: str) -> list[Row]:
    """Rows of the demo's results file."""
    return [Row(**row) for row in json.loads(text)["rows"]]


def demo(output: Path, *, name: str = DEFAULT) -> tuple[dict[str, Any], str]:
    """Run the demo into a folder (an earlier demo there is replaced), on a shipped model by name.

    Returns:
        The results, JSON-ready, and the text to print.

    Raises:
        InputError: the folder exists and holds something else, or there is no such shipped model.
        MoecoverError: the written checkpoint does not equal the masked original.
    """
    started = time.monotonic()
    source = shipped_model(name)
    output = Path(os.path.abspath(output))  # noqa: PTH100
    check_output(output, overwrite=True, marker=RESULTS)
    with progress.spinner("reading the shipped model and its corpora"):
        structure = read_structure(source)
        corpora = [load_corpus(name, structure=structure, length=LENGTH) for name in CALIBRATION]
        model = load_model(structure)
    progress.say(f"model: {name}, {structure.topology.num_experts} experts x {len(structure.topology.decoder_layers)} layers, trained by this project")  # fmt: skip
    with new_folder(output) as folder:
        with progress.bar("profiling", sum(c.num_tokens for c in corpora)) as advance:
            made = profile(
                structure, corpora, model=model, batch_size=BATCH_SIZE, keep_inputs=(SEARCH_TOKENS, folder / "profile"),
                advance=advance,
            )  # fmt: skip
        made.save(folder / "profile")
        work = plan_all(structure, model, made)
        for _, _, chosen in work[1:]:
            for one in chosen:
                one.save(folder / "plans" / _plan_file(one))
        rows = compare(structure, model, work)
        half = next(p for _, retain, (p, *_) in work if retain == BUDGETS[0] and p.method == DEFAULT_METHOD)
        facts = explain(half, profile=made)
        draw(facts, folder / "explained")
        command = shlex.join(["moecover", "prune", str(source), "--plan", f"plans/{_plan_file(half)}", "-o", WRITTEN])
        with progress.bar("writing", structure.num_bytes(half.keep), unit="bytes") as advance:
            prune(structure, half, folder / WRITTEN, command=command, advance=advance)
        with progress.spinner("verifying the written checkpoint") as step:
            proof = verify(source, folder / WRITTEN, advance=step)
        if not proof["equal"]:
            raise MoecoverError(f"the written checkpoint differs from the masked original at {proof['first_difference']}: please report this")  # fmt: skip
        result: dict[str, Any] = {
            "model": name,
            "calibration": {c.name: c.num_tokens for c in corpora},
            "rows": [vars(row) for row in rows],
            "verified": {k: proof[k] for k in ("equal", "tokens", "max_abs_difference")},
            "wall_s": round(time.monotonic() - started, 1),
        }
        write_text(folder / RESULTS, json.dumps(result, indent=1) + "\n")
    shown = os.path.relpath(output)
    shown = str(output) if shown.startswith("..") else shown
    about = {
        "profile": "statistics of every expert, reusable for any method and budget",
        "plans": "which experts each method keeps, and why",
        "explained": "pictures of the first plan: utility and kept experts by corpus, agreement of the corpora, stability",
        WRITTEN: "the pruned checkpoint: loads in transformers like any other",
        RESULTS: "the numbers above",
    }
    files = "\n".join(f"  {shown}/{name:{len(RESULTS)}}  {text}" for name, text in about.items())
    calibration = " and ".join(f"{n} ({t:,} tokens)" for n, t in result["calibration"].items())
    program = "moecover" if shutil.which("moecover") else shlex.quote(str(Path(sys.executable).with_name("moecover")))
    text = f"""Perplexity on held-out text (lower is better); experts chosen on {calibration}.
The Python source is a domain that no method saw.

{table(rows)}

Verified: {shown}/{WRITTEN} gives bit for bit what the masked original gives ({proof["tokens"]} tokens of real text).

{files}

Why these experts:
  {program} explain {shown}/plans/{_plan_file(half)} --profile {shown}/profile

On a real model:
  {program} prune Qwen/Qwen1.5-MoE-A2.7B --corpus wikitext2 --corpus c4 --retain 0.5 -o qwen-moe-half"""
    return result, text
