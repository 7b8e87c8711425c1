"""The verb `completion`: a script that completes verbs and options in a shell."""

from __future__ import annotations

import argparse

from moecover.cli.verb import Outcome

HELP = "print a script that completes verbs and options in a shell"
SHELLS = ("bash", "zsh", "tcsh")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("shell", choices=SHELLS, help='for bash: eval "$(moecover completion bash)" in ~/.bashrc')


def run(args: argparse.Namespace) -> Outcome:
    """Print the script."""
    import shtab

    from moecover.cli.main import make_parser

    script = str(shtab.complete(make_parser(), args.shell))
    return Outcome({"shell": args.shell, "script": script}, script, folds=False)
