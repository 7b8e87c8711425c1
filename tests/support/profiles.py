"""Profiles with given statistics, where a test needs no model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moecover.checkpoints.topology import Topology
from moecover.profiling.artifact import Profile
from moecover.profiling.statistics import STATISTICS


def profile_with_channels(energies: Mapping[str, np.ndarray], *, tokens: Mapping[str, int] | None = None) -> Profile:
    """A profile with the energies ``[layer, expert, channel]`` of some corpora; experts of equal utility.

    Args:
        energies: by corpus.
        tokens: of every corpus; 100 by default.
    """
    layers, experts, _ = next(iter(energies.values())).shape
    topology = Topology("qwen2_moe", tuple(range(layers)), experts, 2, 8, layers)
    statistics = {}
    for corpus in energies:
        values = {name: np.ones((layers, experts)) for name in STATISTICS}
        values["count"] = np.full((layers, experts), 10)
        values["num_tokens"] = np.full((layers, experts), (tokens or {}).get(corpus, 100))
        statistics[corpus] = values
    records = {corpus: [{"sha256": corpus, "tokens": 100}] for corpus in energies}
    channels = {corpus: np.asarray(values, dtype=np.float64) for corpus, values in energies.items()}
    return Profile(topology, statistics, records, {"name": "m", "fingerprint": "f"}, channels=channels)
