"""The verb `generate`: calibration text that the model writes itself."""

from __future__ import annotations

import argparse
import shlex

from moecover.cli.corpus_options import add_bos
from moecover.cli.dry_run import add_dry_run
from moecover.cli.options import add_device, add_model, add_output, pass_arguments
from moecover.cli.verb import Outcome
from moecover.text import counted

HELP = "have a model write its own calibration text, for text that no named corpus has"
SHARED = True
SHOWN = 3  # rows of which the beginning is printed


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser)
    parser.add_argument("--sequences", type=int, metavar="N", help="rows to write (default: 128)")
    parser.add_argument(
        "--length", type=int, metavar="N", help="tokens per row (default: 2048, or the model's positions if fewer)"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="rows at a time (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    add_bos(parser, "a row")
    add_device(parser)
    add_dry_run(parser)
    text = "file to write: rows of input_ids, for --corpus self=FILE.jsonl"
    add_output(parser, "FILE.jsonl", text, replaced="a file that is there")


def run(args: argparse.Namespace) -> Outcome:
    """Write the file; print the beginning of its first rows."""
    from moecover.checkpoints.opening import described, fetched
    from moecover.corpora.own_text import generate
    from moecover.corpora.tokenizer import load_tokenizer
    from moecover.progress import SILENT
    from moecover.runtime.world import world

    made = generate(
        args.model,
        args.output,
        sequences=args.sequences,
        length=args.length,
        seed=args.seed,
        bos=args.bos,
        overwrite=args.overwrite,
        here=world(),
        **pass_arguments(args),
    )
    rows, length = made.tokens.shape
    lines = [f"{args.output}: {counted(rows, 'sequence')} of {length} tokens, for --corpus self={args.output}"]
    structure = fetched(described(args.model, revision=args.revision, progress=SILENT), progress=SILENT)
    if (tokenizer := load_tokenizer(structure.checkpoint.path)) is not None:
        lines += [f"  {' '.join(tokenizer.decode(row[:40]).split())[:100]} ..." for row in made.tokens[:SHOWN]]
    output = shlex.quote(str(args.output))
    lines.append(f"next: moecover split {shlex.quote(args.model)} --corpus self={output} -o kinds")
    return Outcome({"output": str(args.output), **made.record}, "\n".join(lines))
