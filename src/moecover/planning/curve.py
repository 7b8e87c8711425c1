"""The shapes that take equal bytes: reads the sizes of a model and a bound, gives numbers of experts by width."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence

import numpy as np

from moecover.checkpoints.topology import Topology
from moecover.errors import InputError, arg
from moecover.planning.keep import allowed_keeps, allowed_widths, resolve_keep, resolve_width
from moecover.planning.shapes import Shape

AUTO, EXPERTS = "auto", "experts"
Fits = Callable[[int, int], bool]  # whether a number of experts of a width is within the bound


def parse_share(text: str, name: str) -> float:
    """A share of the routed bytes from a percentage (``50%``) or a fraction (``0.5``).

    Args:
        text: what the user wrote.
        name: of the argument, for the message.

    Raises:
        InputError: it is neither, or not between 0 and 1.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*", text)
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share < 1:
        raise InputError(f"{arg(name, text)}: give a share of the routed bytes below all of them, such as 50% or 0.5")
    return share


def within_share(topology: Topology, channels: int, share: float) -> Fits:
    """The bound of a share of the experts' bytes; padding of a shared expert does not count."""
    most = share * topology.num_experts * channels * (1 + 1e-9)
    return lambda keep, width: keep * width <= most


def curve(
    topology: Topology,
    channels: int,
    fits: Fits,
    *,
    multiple_of: int | None = None,
    width_multiple_of: int | None = None,
) -> list[Shape]:
    """For every allowed width, widest first, the most experts that are within a bound.

    Widths at which all experts fit are given once, the widest; shapes with fewer experts than the router needs are
    left out.

    Args:
        topology: of the model.
        channels: of an expert.
        fits: the bound.
        multiple_of: only multiples of this number of experts.
        width_multiple_of: only multiples of this number of channels.

    Raises:
        InputError: no shape is within the bound.
    """
    keeps, found = allowed_keeps(topology, multiple_of), list[Shape]()
    for width in reversed(allowed_widths(channels, width_multiple_of)):
        fitting = bisect.bisect_left(keeps, True, key=lambda keep: not fits(keep, width))  # more experts, more bytes
        if fitting:
            found.append(Shape(keeps[fitting - 1], None if width == channels else width))
            if keeps[fitting - 1] == topology.num_experts:
                break
    if not found:
        raise InputError(
            f"the budget leaves no shape: {keeps[0]} experts is the least that the router allows. Allow more"
        )
    return found


def parse_shape(text: str, topology: Topology, channels: int | None) -> Shape | str:
    """What ``--shape`` says: a shape ``KxW``, or `AUTO` or `EXPERTS`.

    Raises:
        InputError: neither, or a shape that the model cannot have.
    """
    if text in (AUTO, EXPERTS):
        return text
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise InputError(f"{arg('shape', text)}: give auto, experts, or experts x channels such as 30x704")
    if channels is None:
        raise InputError(f"{arg('shape', text)}: the width of this model's experts cannot be changed. Give experts")
    keep = resolve_keep(topology, keep=int(match[1]), retain=None)
    width = resolve_width(channels, width=int(match[2]), retain=None)
    return Shape(keep, None if width == channels else width)


def spread(shapes: Sequence[Shape], channels: int, number: int) -> list[int]:
    """Positions of so many shapes along a curve, both ends among them, evenly by the logarithm of the width.

    Args:
        shapes: of the curve, widest first.
        channels: of an expert.
        number: how many, fewer where shapes coincide.
    """
    widths = np.log([shape.width or channels for shape in shapes])
    wanted = np.linspace(widths[0], widths[-1], min(number, len(shapes)))
    return sorted({int(np.abs(widths - one).argmin()) for one in wanted})
