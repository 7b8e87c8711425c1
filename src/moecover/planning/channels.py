"""Which channels of the kept experts stay: reads the channel energies of a profile, gives ids.

Arithmetic on the profile, like the choice of the experts: any shape (experts x channels) comes from the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moecover.errors import InputError, arg
from moecover.planning.selection import Room, ranked, take_turns

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moecover.profiling.artifact import Profile


def check_channels(profile: Profile, width: int, *, name: str = "the profile") -> int:
    """The number of channels of an expert, in a profile that has their energies.

    Args:
        profile: that is planned from.
        width: channels to keep, for the message.
        name: what the message calls the profile.

    Raises:
        InputError: the profile does not have them for every corpus.
    """
    lacking = [corpus for corpus in profile.statistics if corpus not in profile.channels]
    if profile.width is None or lacking:
        which = f" of corpus {lacking[0]}" if profile.width is not None else ""
        raise InputError(
            f"{arg('width', width)} needs the energies of channels, which {name} does not have{which}: an earlier "
            "version made it, or the experts of this family are no gated MLP. Profile again, or keep whole experts"
        )
    return profile.width


def choose_channels(
    profile: Profile,
    layer: int,
    kept: Sequence[int],
    width: int,
    *,
    protect: float = 0.0,
    weights: Mapping[str, int] | None = None,
    group: int = 1,
) -> list[list[int]]:
    """The channels that stay of every kept expert of a MoE layer, ids ascending.

    The best channels by their mean energy a token over the corpora stay. With ``protect`` the corpora first take turns
    for that share of the places, as they do for experts (`selection.cover`): a corpus that had t turns keeps its t
    best channels of every kept expert (of a corpus with fewer channels of energy above 0, those). Ties go to the lower
    id. Channels that stay or go together, as blocks of a quantised weight do, count as one with the sum of energies.

    Args:
        profile: with channel energies.
        layer: MoE layer.
        kept: ids of the kept experts, ascending.
        width: channels that stay of each.
        protect: share of these that corpora protect in turn, 0 to 1.
        weights: turns of a corpus per round, and its weight in the mean; 1 for a corpus that is not named.
        group: consecutive channels that stay or go together; divides ``width`` and the number of channels.
    """
    corpora = list(profile.statistics)
    counts = [int((weights or {}).get(corpus, 1)) for corpus in corpora]
    tokens = [max(1, int(profile.statistics[corpus]["num_tokens"][layer].max())) for corpus in corpora]
    energy: NDArray[np.float64] = np.stack(
        [profile.channels[c][layer, list(kept)] / t for c, t in zip(corpora, tokens, strict=True)], axis=1
    )  # [expert, corpus, channel]
    energy = energy.reshape(*energy.shape[:2], -1, group).sum(axis=3)  # [expert, corpus, group of channels]
    mean = np.average(energy, axis=1, weights=counts)
    places = width // group
    turns = int(protect * places + 0.5)
    found = []
    for of_expert, order in zip(energy, ranked(mean), strict=True):
        room = Room(places, len(order))
        take_turns(of_expert, room, turns, counts)
        room.fill(order.tolist())
        found.append([group * chosen + i for chosen in sorted(room.chosen) for i in range(group)])
    return found
