"""The verb `split`: the kinds of text in a corpus, each a corpus of its own."""

from __future__ import annotations

import argparse
import shlex

from moecover.cli.corpus_options import add_bos
from moecover.cli.options import add_model, add_output, add_plugin, load_plugins
from moecover.cli.verb import Outcome

HELP = "split a corpus of mixed text into its kinds of text, each a corpus of its own"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser, note=", of the model whose tokens the text has")
    parser.add_argument(
        "--corpus",
        required=True,
        metavar="NAME[=PATH]",
        help="a named corpus (moecover ls corpora), or NAME=PATH of a file, such as generate writes",
    )
    parser.add_argument("--kinds", type=int, metavar="N", help="how many (default: 8)")
    parser.add_argument(
        "--sequences", type=int, metavar="N", help="blocks to read (default: up to 128; all rows of input_ids)"
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens per row (default: that of the rows of input_ids; of text 2048, or the model's positions if fewer)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the sample of blocks and of where the clustering starts (default: 0)"
    )
    add_bos(parser, "a block of text")
    text = "folder to write: 1.jsonl, 2.jsonl ..., for --corpus NAME=DIR"
    add_output(parser, "DIR", text, replaced="kinds that are there")
    add_plugin(parser)


def run(args: argparse.Namespace) -> Outcome:
    """Write the folder; print a line for every kind."""
    from moecover.corpora.splitting import split

    load_plugins(args)
    made = split(
        args.model,
        args.corpus,
        args.output,
        kinds=args.kinds,
        sequences=args.sequences,
        length=args.length,
        seed=args.seed,
        bos=args.bos,
        overwrite=args.overwrite,
        revision=args.revision,
    )
    source = f"{made.name}={args.output}"
    lines = [f"{args.output}: {len(made.kinds)} kinds of text, for --corpus {source}"]
    lines += [
        f"  {row['kind']}  {row['share']:4.0%}  {row['rows']:>5} rows  {row['typical tokens']}"
        for row in made.rows_shown()
    ]
    least = min(kind["rows"] for kind in made.kinds)
    lines.append(
        f"next: moecover profile {shlex.quote(args.model)} --corpus {shlex.quote(source)} --sequences {least} "
        "-o profile"
    )
    return Outcome({"output": str(args.output), "kinds": made.kinds}, "\n".join(lines))
