"""The verb `upload`, and the options by which `prune` and `shrink` do the same at their end."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path

from moecover.cli.verb import Outcome
from moecover.errors import InputError

HELP = "upload a pruned model to a repository of the hub"
PRIVATE = "create the repository so that nobody else sees it"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="that `prune` or `shrink` wrote, or a .gguf file with its card"
    )
    parser.add_argument(
        "repository", metavar="OWNER/NAME", help="repository of the hub; created where it does not exist"
    )
    parser.add_argument("--private", action="store_true", help=PRIVATE)


def run(args: argparse.Namespace) -> Outcome:
    """Upload, and print the address."""
    from moecover.publishing.upload import upload

    made = upload(args.folder, args.repository, private=args.private)
    return Outcome({**asdict(made), "files": list(made.files)}, made.summary())


# ----------------------------------------------------------------------------------- at the end of `prune` and `shrink`
def add_push(parser: argparse.ArgumentParser) -> None:
    """Declare where the result is uploaded to."""
    group = parser.add_argument_group("hub")
    group.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="upload OUT to this repository of the hub at the end, as `moecover upload` does; login and name are "
        "checked first",
    )
    group.add_argument("--private", action="store_true", help=PRIVATE)


def check_push(args: argparse.Namespace) -> None:
    """Refuse an upload that cannot be done, before the work.

    Raises:
        InputError: see `publishing.hub.check_access`.
    """
    if args.push_to_hub is None:
        if args.private:
            raise InputError("--private has no use here: give --push-to-hub OWNER/NAME")
        return
    from moecover.publishing.hub import check_access
    from moecover.runtime.world import world

    if world().rank == 0:
        check_access(args.push_to_hub, private=args.private)


def pushed(args: argparse.Namespace, written: Path) -> str:
    """The last line: where the result was uploaded to, or how that is done.

    Args:
        args: of the verb.
        written: what it wrote.
    """
    output = args.output if args.output.exists() else written  # of a split GGUF model the first part
    if args.push_to_hub is None:
        name = shlex.quote(str(output))
        return f"\nto publish: moecover upload {name} OWNER/NAME, or hf upload OWNER/NAME {name}"
    from moecover.publishing.upload import upload
    from moecover.runtime.world import world

    if world().rank > 0:
        return ""
    return f"\n{upload(output, args.push_to_hub, private=args.private).summary()}"
