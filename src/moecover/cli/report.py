"""The verb `report`: the page of a comparison, or of what `shrink` did."""

from __future__ import annotations

import argparse
from pathlib import Path

from moecover.cli.options import add_output, add_plugin, load_plugins
from moecover.cli.verb import Outcome
from moecover.text import size_text

HELP = "write a run of `compare`, or what `shrink` did, as one page to read, and its figures as files"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN_DIR",
        help="folder that `moecover compare` wrote, or the folder of work of `moecover shrink`",
    )
    text = "report.html to write: one file that needs no network"
    add_output(parser, "PAGE", text, replaced="a page and figures that are there")
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help="folder for the figures, PNG and SVG (default: the page's name with _files)",
    )
    add_plugin(parser)


def run(args: argparse.Namespace) -> Outcome:
    """Write the page and the figures."""
    from moecover.reporting.page import report

    load_plugins(args)
    made = report(args.run, args.output, figures=args.figures, overwrite=args.overwrite)
    folder = f", {len(made['pictures'])} pictures in {made['figures']}" if made["pictures"] else ""
    return Outcome(made, f"{made['page']}: {size_text(made['bytes'])}{folder}")
