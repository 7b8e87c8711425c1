"""The verb `merge`: the sum of profiles that were made separately."""

from __future__ import annotations

import argparse
from pathlib import Path

from moecover.cli.options import add_output
from moecover.cli.verb import Outcome
from moecover.text import counted

HELP = "add up profiles of one model that were made separately"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "profiles", type=Path, nargs="+", metavar="PROFILE_DIR", help="folders that `moecover profile` wrote"
    )
    add_output(parser, "PROFILE_DIR", "folder to write", replaced="a profile that is there")


def run(args: argparse.Namespace) -> Outcome:
    """Write the sum; print the tokens of every corpus."""
    from moecover.profiling.artifact import FILE
    from moecover.profiling.job import merge

    made = merge(args.profiles, output=args.output, overwrite=args.overwrite)
    path = args.output / FILE
    tokens = {name: sum(record["tokens"] for record in records) for name, records in made.corpora.items()}
    lines = [f"{path}: {len(args.profiles)} profiles added up"]
    lines += [
        f"  {name}: {count:,} tokens of {counted(len(made.corpora[name]), 'sample')}" for name, count in tokens.items()
    ]
    result = {"profile": str(path), "tokens": tokens, "fingerprint": made.fingerprint}
    return Outcome(result, "\n".join(lines))
