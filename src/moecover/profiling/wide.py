"""Statistics of more than one number an expert: their names and shapes, and what two token sets have together.

- ``channel_energy``, ``[layer, expert, channel]``, see `channels`;
- ``pairs``, ``[2, layer, pair]``, one number for each pair a <= b of experts, row by row: tokens that
  are routed to both, and the sum over them of g_a ||f_a|| g_b ||f_b|| (arXiv 2609.18916).

Both are float64, and additive over tokens. A corpus may lack either of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING

import numpy as np

from moecover.checkpoints.structure import Structure
from moecover.checkpoints.topology import Topology
from moecover.profiling.statistics import PARTS, STATISTICS
from moecover.runtime.cost import expert_width

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHANNELS, PAIRS = "channel_energy", "pairs"
WIDE = (CHANNELS, PAIRS)
COPIES = 3  # of the sums in memory: themselves, and twice while a file is written


def wide_shape(name: str, topology: Topology, width: int | None) -> tuple[int | None, ...]:
    """Shape of a statistic; None stands for any length.

    Args:
        name: one of `WIDE`.
        topology: shape of the routed part of the model.
        width: channels of an expert, None where they are not known.
    """
    layers, experts = len(topology.decoder_layers), topology.num_experts
    return (2, layers, experts * (experts + 1) // 2) if name == PAIRS else (layers, experts, width)


def num_bytes(structure: Structure, corpora: int) -> int:
    """Bytes of memory that these statistics of several corpora take in a pass, with what the taps hold; an estimate."""
    return 8 * _numbers(structure) * (COPIES * corpora + 1)


def _numbers(structure: Structure) -> int:
    """How many numbers these statistics of one corpus have."""
    width = round(expert_width(structure))
    return sum(math.prod(n or 0 for n in wide_shape(name, structure.topology, width)) for name in WIDE)


def file_bytes(structure: Structure, corpora: int) -> int:
    """Bytes of profile.safetensors of several corpora, about: all statistics, the narrow ones also of every part."""
    topology = structure.topology
    narrow = len(STATISTICS) * (PARTS + 1) * len(topology.decoder_layers) * topology.num_experts
    return 8 * corpora * (_numbers(structure) + narrow)


def square(packed: NDArray[np.float64], experts: int) -> NDArray[np.float64]:
    """Symmetric matrices ``[..., expert, expert]`` of stored pairs ``[..., pair]``."""
    rows, columns = np.triu_indices(experts)
    full = np.empty((*packed.shape[:-1], experts, experts))
    full[..., rows, columns] = full[..., columns, rows] = packed
    return full


def joined(
    mine: Mapping[str, NDArray[np.float64]], theirs: Mapping[str, NDArray[np.float64]], both: Set[str]
) -> dict[str, NDArray[np.float64]]:
    """A statistic by corpus of two profiles together; of the corpora of both, where both have it."""
    found = {corpus: values for corpus, values in {**mine, **theirs}.items() if corpus not in both}
    return found | {corpus: mine[corpus] + theirs[corpus] for corpus in mine if corpus in both and corpus in theirs}
