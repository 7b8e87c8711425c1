"""The bounds of the verb `plan`, experts, bytes or perplexity: their arguments and what they exclude."""

from __future__ import annotations

import argparse

from moecover.cli.corpus_options import add_bos
from moecover.errors import InputError, flag

BOUNDS = ("keep", "retain", "budget", "max_size", "max_perplexity_increase")
OF_BYTES = ("budget", "max_size")
WIDTHS = ("width", "retain_width")
OF_TEXT = ("perplexity", "corpus", "windows", "bos", "batch_size")  # options of what is measured on held-out text


def add_bounds(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of what is searched for."""
    group = parser.add_argument_group("find the shape, instead of --keep or --retain")
    group.add_argument(
        "--budget",
        metavar="SHARE",
        help="share of the experts' bytes that stays, such as 50%%",
    )
    group.add_argument(
        "--max-perplexity-increase",
        metavar="PERCENT",
        help="the fewest experts with which the perplexity of every held-out text is at most this much above "
        "the model's "
        "own (runs the model), such as 10%%",
    )
    group.add_argument(
        "--max-size",
        metavar="SIZE",
        help="the most whose checkpoint is at most this large, such as 12GB (reads headers of the model)",
    )
    group.add_argument(
        "--shape",
        default="experts",
        metavar="SHAPE",
        help="what --budget or --max-size is spent on: experts, whole ones; KxW, K experts of W channels; auto, of "
        "the shapes of equal bytes the one that loses least on held-out text (runs MODEL) (default: experts)",
    )
    group.add_argument(
        "--perplexity",
        action="append",
        default=[],
        metavar="NAME[=PATH]",
        help="held-out text to measure on; repeat it (default: blocks of the calibration corpora that the profile did "
        "not use)",
    )
    group.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="file of a calibration corpus, to find the blocks that the profile did not use; repeat it; named corpora "
        "need none",
    )
    group.add_argument("--windows", type=int, metavar="N", help="windows or blocks per text at most (default: 64)")
    add_bos(group, "a window")
    group.add_argument("--batch-size", type=int, metavar="N", help="windows per forward pass (default: 1)")


def which_bound(args: argparse.Namespace) -> str:
    """Which bound was given.

    Raises:
        InputError: none, several, or an option that belongs to another one.
    """
    given = [name for name in BOUNDS if getattr(args, name) is not None]
    thin = [name for name in WIDTHS if getattr(args, name) is not None]
    if len(thin) > 1:
        raise InputError("give one of --width (channels of an expert) and --retain-width (fraction in (0, 1])")
    if not given and thin:
        given = thin
    if len(given) != 1:
        raise InputError(
            "give exactly one of --keep (experts per layer), --retain (fraction in (0, 1]), --budget, --max-size and "
            "--max-perplexity-increase"
        )
    (bound,) = given
    measures = bound == "max_perplexity_increase" or (bound in OF_BYTES and args.shape == "auto")
    stray = [name for name in OF_TEXT if getattr(args, name) not in (None, [])]
    if stray and not measures:
        raise InputError(
            f"{flag(stray[0])} goes with --max-perplexity-increase and --shape auto; {flag(bound)} measures nothing"
        )
    if args.shape != "experts" and bound not in OF_BYTES:
        raise InputError(f"--shape {args.shape} says what --budget or --max-size is spent on: give one of them")
    if bound in (*OF_BYTES, "max_perplexity_increase") and thin:
        raise InputError(f"{flag(bound)} and {flag(thin[0])} exclude each other: give --shape KxW, or --shape auto")
    if (measures or bound == "max_size") and not args.model:
        raise InputError(f"{flag(bound)} looks at the model: give --model MODEL")
    return bound


def check_model_options(args: argparse.Namespace, bound: str, method: str) -> None:
    """Refuse options on a model that does not run, or is not read at all.

    Raises:
        InputError: names the option.
    """
    from moecover.planning.methods import METHODS

    runs = METHODS[method].runs_experts or bound == "max_perplexity_increase"
    runs = runs or (bound in OF_BYTES and args.shape == "auto")
    names = ("dtype", "device", "device_map", "memory_limit") if not runs else ()
    names = (*names, "revision") if not args.model else names
    if stray := [name for name in names if getattr(args, name) is not None]:
        raise InputError(f"{flag(stray[0])} has no use here: no model runs for {flag(bound)} with method {method}")
