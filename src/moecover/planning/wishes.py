"""What servers ask of a shape that it does not meet, and the option that meets it: a line for each server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from moecover.checkpoints.servers import LIMITS, WIDTH_LIMITS, Limit
from moecover.checkpoints.topology import Topology
from moecover.errors import InputError, flag
from moecover.planning.keep import resolve_keep, resolve_width
from moecover.planning.shapes import Shape

STEPS = (8, 4, 2, 16, 32, 64, 128)  # that numbers of experts may be rounded to, the most usual first


class Wish(TypedDict):
    """What a server asks of the experts and of their channels, and the options that meet it: empty where none does."""

    server: str
    experts: list[str]
    channels: list[str]
    way: list[str]


def wishes(topology: Topology, channels: int | None, shape: Shape, server: str | None = None) -> list[Wish]:
    """What servers ask of a shape that it does not meet.

    Args:
        topology: of the model.
        channels: of an expert; None where that is not known.
        shape: what stays.
        server: one of `SERVERS`; None for all.
    """
    found = []
    for name in dict.fromkeys([*(one.server for one in LIMITS), *(one.server for one in WIDTH_LIMITS)]):
        if server not in (None, name):
            continue
        wish: Wish = {"server": name, "experts": [], "channels": [], "way": []}
        limits = [limit for limit in LIMITS if limit.server == name]
        unmet = [limit.asks for limit in limits if not limit.met(topology, shape.keep)]
        if unmet and shape.keep < topology.num_experts:
            wish["experts"] = unmet
            wish["way"] += _rounded(topology, shape.keep, limits)
        multiples = [one.multiple for one in WIDTH_LIMITS if one.server == name]
        if shape.width is not None and channels is not None and any(shape.width % n for n in multiples):
            wish["channels"] = [f"a multiple of {n}" for n in multiples if shape.width % n]
            wish["way"] += _wider(channels, shape.width, multiples)
        if wish["experts"] or wish["channels"]:
            found.append(wish)
    return found


def _rounded(topology: Topology, keep: int, limits: Sequence[Limit]) -> list[str]:
    """The option that rounds a number of experts to one that meets all that a server asks for."""
    for step in STEPS:
        try:
            near = resolve_keep(topology, keep=keep, retain=None, multiple_of=step)
        except InputError:  # no such multiple, or none that the router allows
            return []
        if near < topology.num_experts and all(limit.met(topology, near) for limit in limits):
            return [f"{flag('multiple_of')} {step} gives {near}"]
    return []


def _wider(channels: int, width: int, multiples: Sequence[int]) -> list[str]:
    """The option that rounds a number of channels to the largest of some multiples that leaves an expert thinner."""
    for multiple in sorted(multiples, reverse=True):
        try:
            near = resolve_width(channels, width=width, retain=None, multiple_of=multiple)
        except InputError:  # an expert has fewer channels
            continue
        if near not in (width, channels):
            return [f"{flag('width_multiple_of')} {multiple} gives {near}"]
    return []
