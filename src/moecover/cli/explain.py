"""The verb `explain`: why a plan keeps what it keeps."""

from __future__ import annotations

import argparse
from pathlib import Path

from moecover.cli.options import add_plugin, load_plugins
from moecover.cli.verb import Outcome
from moecover.errors import InputError

HELP = "explain why a plan keeps what it keeps, corpus by corpus, and how stable that is"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("plan", type=Path, metavar="PLAN", help="plan.json")
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="PROFILE_DIR",
        help="the profile that the plan was made from: needed for routing counts, stability, and plans without "
        "saliencies of their own",
    )
    parser.add_argument("--against", type=Path, metavar="PLAN", help="another plan: what changed")
    parser.add_argument("--saliency", help="what utility means here (default: the plan's own, else the default one)")
    parser.add_argument(
        "--change",
        type=float,
        metavar="X",
        help="stable: at most this share of the kept experts still changes (default: 0.02)",
    )
    parser.add_argument("--layers", action="store_true", help="a line for every layer")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder for the figures (PNG and SVG)")
    parser.add_argument("--overwrite", action="store_true", help="replace figures that are there")
    add_plugin(parser)


def run(args: argparse.Namespace) -> Outcome:
    """Print the facts; draw them where a folder is given."""
    from moecover.planning.explaining.facts import explain
    from moecover.planning.explaining.text import text_of
    from moecover.reporting.figures.plan_figures import NAMES, check_folder, draw

    load_plugins(args)
    if args.change is not None and args.profile is None:
        raise InputError("--change says what is stable, which a profile tells: give --profile PROFILE_DIR")
    if args.overwrite and args.output is None:
        raise InputError("--overwrite replaces figures: give -o DIR")
    change = 0.02 if args.change is None else args.change
    if not 0 < change < 1:
        raise InputError(f"--change {change} is out of range: a share of the kept experts, above 0 and below 1")
    if args.output:
        check_folder(args.output, NAMES, overwrite=args.overwrite)
    facts = explain(args.plan, profile=args.profile, against=args.against, saliency=args.saliency, change=change)
    text = text_of(facts, layers=args.layers)
    if args.output:
        pictures = draw(facts, args.output, overwrite=args.overwrite)
        facts["pictures"] = [str(path) for path in pictures]
        text += "\n" + "\n".join(f"picture: {path}" for path in pictures)
    return Outcome(facts, text)
