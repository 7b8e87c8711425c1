"""Finished sums to a profile: reads the sums of every corpus, refuses those that no pass can have left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moecover.checkpoints.topology import Topology
from moecover.corpora.packing import Corpus
from moecover.errors import MoecoverError
from moecover.profiling.artifact import Profile
from moecover.profiling.records import ModelRecord, Settings
from moecover.profiling.statistics import Statistics, known
from moecover.profiling.sums import Sums
from moecover.profiling.wide import CHANNELS, PAIRS
from moecover.runtime.finite import not_finite

if TYPE_CHECKING:
    from numpy.typing import NDArray


def collected(
    topology: Topology,
    corpora: Sequence[Corpus],
    sums: Mapping[str, Sums],
    about: ModelRecord,
    settings: Settings,
    tokens: Mapping[str, NDArray[np.int64]] | None = None,
) -> Profile:
    """The profile of finished sums.

    Args:
        topology: of the layers that they are of.
        corpora: in their order.
        sums: by corpus.
        about: the model.
        settings: of the pass.
        tokens: by corpus, tokens that the layers must have seen, ``[layer]``; all where it is None.

    Raises:
        InputError: statistics are not finite.
        MoecoverError: they cover another number of tokens.
    """
    statistics = {c.name: checked(sums[c.name], c, topology, (tokens or {}).get(c.name)) for c in corpora}
    records, parts = {c.name: [c.record] for c in corpora}, {c.name: sums[c.name].parts for c in corpora}
    channels, pairs = (
        {c.name: of[name] for c in corpora if name in (of := sums[c.name].wide())} for name in (CHANNELS, PAIRS)
    )
    return Profile(topology, statistics, records, about, settings, parts, None, channels, pairs)


def checked(sums: Sums, corpus: Corpus, topology: Topology, tokens: NDArray[np.int64] | None = None) -> Statistics:
    """The statistics of a corpus.

    Args:
        sums: of the corpus.
        corpus: that they are of.
        topology: of the layers.
        tokens: that the layers must have seen, ``[layer]``; all of the corpus where it is None.

    Raises:
        InputError: they are not finite.
        MoecoverError: they cover another number of tokens.
    """
    statistics = sums.statistics()
    wanted = np.full(len(topology.decoder_layers), corpus.num_tokens) if tokens is None else tokens
    if (statistics["num_tokens"] != wanted[:, None]).any():
        raise MoecoverError(
            f"corpus {corpus.name} has {wanted.tolist()} tokens for the layers, but they recorded"
            f" {statistics['num_tokens'][:, 0].tolist()}: please report this"
        )
    of_experts = {name: values for name, values in statistics.items() if known(name, statistics)}
    for name, values in {**of_experts, **sums.wide()}.items():
        if not np.isfinite(values).all():
            places = np.argwhere(~np.isfinite(values))[0].tolist()
            layer, expert = places[:2] if name != PAIRS else (places[1], None)
            place = f"corpus {corpus.name}, decoder layer {topology.decoder_layers[layer]}"
            raise not_finite(place + ("" if expert is None else f", expert {expert}"), f"{name} is")
    return statistics
