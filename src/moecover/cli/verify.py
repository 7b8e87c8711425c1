"""The verb `verify`: the proof of a pruned checkpoint against the masked original."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from moecover.cli.dry_run import add_dry_run
from moecover.cli.options import add_device, add_libllama, add_model, add_plugin, load_plugins
from moecover.cli.verb import Outcome

if TYPE_CHECKING:
    from moecover.verification.verify import Verification

HELP = "prove a pruned checkpoint against the masked original on real text"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser, note=", or a .gguf file (of a split one the first part)")
    parser.add_argument("pruned", metavar="OUT", help="folder, or first GGUF file, that `moecover prune` wrote")
    parser.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="NAME[=PATH]",
        help="text to run (default: shipped held-out text)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="T",
        help="largest difference allowed as a share of a layer's largest value (default: 0, every bit equal)",
    )
    add_device(parser)
    add_libllama(parser)
    add_plugin(parser)
    add_dry_run(parser)


def run(args: argparse.Namespace) -> Outcome:
    """Print whether both give the same; exit status 1 where they do not."""
    from moecover.verification.job import verify

    load_plugins(args)
    found = verify(
        args.model,
        args.pruned,
        corpora=args.corpus,
        tolerance=args.tolerance,
        dtype=args.dtype,
        device=args.device,
        device_map=args.device_map,
        memory_limit=args.memory_limit,
        libllama=args.libllama,
        revision=args.revision,
    )
    problem = "" if found.equal else f"{args.pruned} is not what the masked original is"
    return Outcome(found.to_dict(), verdict(found, args.pruned), 1 if problem else 0, problem)


def verdict(found: Verification, pruned: str) -> str:
    """The result in a sentence."""
    from moecover.verification.gguf import GgufVerification

    if isinstance(found, GgufVerification):
        return found.summary()
    on = f"{found.tokens:,} tokens of {', '.join(found.corpora)}"
    largest = f"{found.max_abs_difference:g}"
    if found.equal:
        repaired = f" with its {found.repaired} repaired tensors in place, all others its own" if found.repaired else ""
        return (
            f"equal: {pruned} computes what the masked original computes{repaired}, largest difference "
            f"{largest}, on {on}"
        )
    where = found.first_difference
    if found.changed_files:
        text = f"NOT equal: files changed since they were written: {', '.join(found.changed_files)}"
        return text + (f"; first difference at {where}" if where else "")
    if found.changed_tensors:
        first = found.changed_tensors[0]
        count = len(found.changed_tensors)
        return f"NOT equal: {count} tensors are neither the original's nor what the repair made, the first is {first}"
    at = f"{where} ({found.layers[where]:g})" if where else "an unknown place"
    return f"NOT equal: first difference at {at}, largest {largest}, on {on}"
