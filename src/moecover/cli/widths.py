"""Options on the channels of experts: their declaration, and what they mean to a plan."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from moecover.cli.values import share

Number = TypeVar("Number", int, float)


def numbers(kind: Callable[[str], Number], several: bool) -> Callable[[str], Number | list[Number]]:
    """Parser of one number, or of several with commas between them."""

    def parse(text: str) -> Number | list[Number]:
        found = [kind(part) for part in text.split(",")]
        if len(found) > 1 and not several:
            raise ValueError
        return found if several else found[0]

    parse.__name__ = f"{kind.__name__}s with commas" if several else kind.__name__
    return parse


def add_width_numbers(group: argparse._ActionsContainer, *, several: bool) -> None:
    """How many channels of every expert stay.

    Args:
        group: of the verb's options.
        several: whether several may be given, with commas between them.
    """
    more = "; several with commas give several plans" if several else ""
    group.add_argument(
        "--width",
        type=numbers(int, several),
        metavar="W",
        help="channels kept of each expert, a multiple of 8; alone it keeps all experts (default: all channels)"
        + ("; with commas, a plan for every number of experts and every width" if several else ""),
    )
    group.add_argument(
        "--retain-width",
        type=numbers(share, several),
        metavar="R",
        help=f"fraction of an expert's channels kept, in (0, 1], to the nearest multiple of 8{more}",
    )
    group.add_argument(
        "--width-multiple-of",
        type=int,
        metavar="N",
        help="round the channels kept to the nearest multiple of N: servers run best with multiples of 64 or 128",
    )


def add_widths(group: argparse._ActionsContainer, *, several: bool) -> None:
    """How many channels of every expert stay, and which; arguments as in `add_width_numbers`."""
    add_width_numbers(group, several=several)
    group.add_argument(
        "--protect-channels",
        type=float,
        metavar="P",
        help="share of the kept channels that corpora protect in turn, 0 to 1 (default: 0, the highest mean energy)",
    )
    group.add_argument(
        "--channel-groups",
        type=int,
        metavar="G",
        help="keep channels in groups of G neighbours, for a sibling that is quantised in such blocks (inspect says "
        "how large); widths are rounded to multiples of G",
    )


def width_arguments(args: argparse.Namespace) -> dict[str, object]:
    """Which channels stay, as options of a plan."""
    names = ("protect_channels", "channel_groups")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
