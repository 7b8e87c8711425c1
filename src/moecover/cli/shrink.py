"""The verb `shrink`: from a model to the best checkpoint of a size, in one command."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.cli.corpus_options import add_mix, add_reading
from moecover.cli.dry_run import add_dry_run
from moecover.cli.options import add_device, add_libllama, add_model, add_output
from moecover.cli.plan_tables import shapes_table
from moecover.cli.upload import add_push, check_push, pushed
from moecover.cli.verb import Outcome
from moecover.terminal import aligned
from moecover.text import counted

if TYPE_CHECKING:
    from moecover.shrinking.request import Shrunk

HELP = "make a model smaller by the best known way, in one command"
SHARED = True


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    from moecover.shrinking.quality import DEFAULT, QUALITIES

    add_model(parser)
    group = parser.add_argument_group("how small")
    group.add_argument("--budget", metavar="SHARE", help="share of the experts' bytes that stays, such as 50%%")
    group.add_argument("--max-size", metavar="SIZE", help="or the size of the checkpoint, such as 12GB")
    group.add_argument(
        "--shape",
        default="auto",
        metavar="SHAPE",
        help="what the bytes are spent on: auto, of the shapes of equal bytes the one that loses least on held-out "
        "text; experts, whole ones; KxW, K experts of W channels each (default: auto)",
    )
    group.add_argument(
        "--multiple-of",
        type=int,
        metavar="N",
        help="only shapes whose number of experts is a multiple of N: servers run best with multiples of 8",
    )
    group = parser.add_argument_group("text, and how much work")
    group.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="NAME[=SOURCE]",
        help="calibration corpus, as in `profile`; repeat it (default: wikitext2 and c4 from the hub)",
    )
    add_mix(group)
    add_reading(group)
    group.add_argument("--no-own-text", action="store_true", help="do not have the model write calibration text")
    group.add_argument(
        "--repair",
        choices=("none", "scale", "ridge", "refit"),
        help="refit what stays, as `prune --repair` does (default: refit, with --quality fast ridge)",
    )
    costs = "; ".join(f"{name}: {quality.cost}" for name, quality in QUALITIES.items())
    group.add_argument(
        "--quality",
        choices=tuple(QUALITIES),
        default=DEFAULT,
        help=f"how much text is read (default: {DEFAULT}). {costs}",
    )
    group.add_argument(
        "--work", type=Path, metavar="DIR", help="folder for own text, profile, plan and evaluation (default: OUT-work)"
    )
    add_dry_run(group)
    group.add_argument("--batch-size", type=int, metavar="N", help="sequences per forward pass (default: 4)")
    add_device(group)
    add_libllama(group)
    add_output(parser, "OUT", "folder to write", replaced="OUT if moecover wrote it")
    add_push(parser)


def run(args: argparse.Namespace) -> Outcome:
    """Write the checkpoint; print the shapes that were measured, and what the result loses on held-out text."""
    from moecover.cli.corpus_options import corpus_arguments
    from moecover.cli.options import pass_arguments
    from moecover.runtime.world import world
    from moecover.shrinking.job import shrink

    check_push(args)
    made = shrink(
        args.model,
        args.output,
        budget=args.budget,
        max_size=args.max_size,
        shape=args.shape,
        multiple_of=args.multiple_of,
        corpora=corpus_arguments(args) or None,
        own_text=not args.no_own_text,
        repair=args.repair,
        quality=args.quality,
        work=args.work,
        overwrite=args.overwrite,
        libllama=args.libllama,
        here=world(),
        command=shlex.join(["moecover", *args.argv]),
        **pass_arguments(args),
    )
    assert not isinstance(made, list)  # what a dry run of Python gives
    return _result(made, args)


def _result(made: Shrunk, args: argparse.Namespace) -> Outcome:
    """What was made, and what it loses."""
    plan, output = made.pruned.plan, str(made.pruned.output)
    full, row = made.evaluation.rows
    rows = [
        [
            name,
            f"{one.perplexity:.2f}",
            f"{row.perplexity[name].perplexity:.2f}",
            _percent(one.nll, row.perplexity[name].nll),
        ]
        for name, one in full.perplexity.items()
    ]
    lost = {name: row.perplexity[name].nll - one.nll for name, one in full.perplexity.items()}
    worst = max(lost, key=lambda name: lost[name])
    text = shapes_table(plan) + "\n" if plan.found else ""
    text += aligned(["held-out text", "original", "shrunk", "perplexity"], rows)
    mean = sum(lost.values()) / len(lost)
    text += (
        f"\nworst text: {worst}, {_percent(0, lost[worst])}; mean {_percent(0, mean)} over {counted(len(lost), 'text')}"
        f"\n{output}: {made.pruned.sizes()}; it equals the masked original on {made.verification.tokens:,} tokens"
        f"\nmade on the way: {made.work}"
        f"\nas a page: {shlex.join(['moecover', 'report', str(made.work.parent), '-o', f'{args.output}.html'])}"
    )
    result = {
        "output": output,
        "work": str(made.work),
        "keep": plan.keep,
        "width": plan.width,
        "bytes_before": made.pruned.bytes_before,
        "bytes": made.pruned.num_bytes,
        "loss": {
            name: {"original": one.nll, "shrunk": row.perplexity[name].nll} for name, one in full.perplexity.items()
        },
        "found": plan.found,
    }
    return Outcome(result, text + pushed(args, made.pruned.output))


def _percent(before: float, after: float) -> str:
    """The relative change of the perplexity between two losses."""
    import math

    return f"{math.expm1(after - before):+.1%}"
