"""The shape of what stays: how many experts of a layer, and how many channels of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moecover.checkpoints.topology import Topology
from moecover.errors import InputError, arg
from moecover.planning.keep import resolve_keep, resolve_width


@dataclass(frozen=True)
class Shape:
    """Experts kept per layer, and channels kept of each; None for all of them."""

    keep: int
    width: int | None = None

    def __str__(self) -> str:
        return f"{self.keep} experts" + ("" if self.width is None else f" x {self.width} channels")


def shape_name(keep: int, width: int | None) -> str:
    """A shape in short: ``30x32`` is 30 experts of 32 channels, ``30`` is 30 whole experts."""
    return str(keep) if width is None else f"{keep}x{width}"


def check_groups(group: int, *, thin: bool) -> None:
    """Refuse groups of channels that cannot be, or that nothing would look at.

    Args:
        group: consecutive channels that stay or go together.
        thin: whether experts are to become thinner.

    Raises:
        InputError: no whole number from 1, or more than one where all channels are kept.
    """
    if type(group) is not int or group < 1:
        raise InputError(f"{arg('channel_groups', group)} is out of range: 1 or more")
    if group > 1 and not thin:
        raise InputError(f"{arg('channel_groups', group)} has no use here: all channels are kept. Give {arg('width')}")


def resolve_shape(
    topology: Topology,
    channels: int | None,
    *,
    keep: int | None = None,
    retain: float | None = None,
    multiple_of: int | None = None,
    width: int | None = None,
    retain_width: float | None = None,
    width_multiple_of: int | None = None,
    channel_groups: int = 1,
) -> Shape:
    """A shape from counts or fractions; either axis alone leaves the other whole.

    Args:
        topology: of the model.
        channels: of an expert; None where that is not known.
        keep: experts per layer.
        retain: fraction of them.
        multiple_of: see `resolve_keep`.
        width: channels of an expert.
        retain_width: fraction of them.
        width_multiple_of: see `resolve_width`.
        channel_groups: consecutive channels that stay or go together; the width is rounded to whole groups.

    Raises:
        InputError: see `resolve_keep` and `resolve_width`; or a width of a model whose channels are not known.
    """
    thin = width is not None or retain_width is not None
    if width_multiple_of is not None and not thin:
        name = arg("width_multiple_of", width_multiple_of)
        raise InputError(f"{name} has no use here: all channels are kept. Give {arg('width')} or {arg('retain_width')}")
    check_groups(channel_groups, thin=thin)
    if channel_groups > 1:
        width_multiple_of = math.lcm(width_multiple_of or 1, channel_groups)
    if thin and keep is None and retain is None:
        keep = topology.num_experts
    count = resolve_keep(topology, keep=keep, retain=retain, multiple_of=multiple_of)
    if not thin:
        return Shape(count)
    if channels is None:
        given = arg("width", width) if width is not None else arg("retain_width", retain_width)
        raise InputError(
            f"{given} needs the energies of channels, which the profile does not have: an earlier version made it, or "
            "the experts of this family are no gated MLP. Profile again, or keep whole experts"
        )
    found = resolve_width(channels, width=width, retain=retain_width, multiple_of=width_multiple_of)
    return Shape(count, None if found == channels else found)
