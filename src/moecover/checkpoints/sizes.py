"""Bytes of a pruned checkpoint of any shape: reads headers once, gives sizes by experts and width.

The size of an expert is affine in its width, so that a shape costs a sum over experts and not one over tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moecover.checkpoints.names import kind_of
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.topology import ExpertTensor, Topology, Width

Bytes = list[list[int]]  # [layer][expert]


class Sizes:
    """Sizes of a checkpoint with fewer or thinner experts.

    Args:
        checkpoint: the files.
        topology: of the model.
        tensors: the expert-dependent tensors.
        mtp: all tensors of multi-token-prediction layers with experts, see `topology.ExpertTensors`.
        width: the channels of the experts, or why their number cannot be changed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        topology: Topology,
        tensors: Mapping[str, ExpertTensor],
        mtp: Mapping[str, ExpertTensor | None],
        width: Width | str,
    ) -> None:
        self._checkpoint, self._topology = checkpoint, topology
        self._width = None if isinstance(width, str) else width
        twins = {name: row for name, row in mtp.items() if row is not None}
        self._fixed, self._thin = self._table(tensors)
        self._twins_fixed, self._twins_thin = self._table(twins)
        in_mtp = sum(checkpoint.tensors[name].num_bytes for name in mtp)
        self._rest = checkpoint.num_bytes - in_mtp - _total(self._fixed) - _total(self._thin)
        self._mtp_rest = in_mtp - _total(self._twins_fixed) - _total(self._twins_thin)
        shared = () if self._width is None else self._width.shared_tensors
        padded = [name for name in checkpoint.tensors if shared and kind_of(name) in shared]
        self._padded = sum(checkpoint.tensors[name].num_bytes for name in padded if name not in mtp)
        self._mtp_padded = sum(checkpoint.tensors[name].num_bytes for name in padded if name in mtp)
        self._known: dict[tuple[int | None, bool], Bytes] = {}

    def _table(self, tensors: Mapping[str, ExpertTensor]) -> tuple[Bytes, Bytes]:
        """Bytes of every expert that no width changes, and those that are proportional to it, at full width."""
        layers, experts = len(self._topology.decoder_layers), self._topology.num_experts
        fixed, thin = [[0] * experts for _ in range(layers)], [[0] * experts for _ in range(layers)]
        kinds = {} if self._width is None else self._width.tensors
        for name, row in tensors.items():
            entry = self._checkpoint.tensors[name]
            each = entry.num_bytes // (1 if row.axis is None else entry.shape[row.axis])
            of_layer = (thin if row.routed and kind_of(name) in kinds else fixed)[row.layer]
            for expert in range(experts) if row.expert is None else (row.expert,):
                of_layer[expert] += each
        return fixed, thin

    def num_bytes(self, kept: int | Sequence[Sequence[int]], *, width: int | None, mtp: bool) -> int:
        """Bytes of all tensors after pruning.

        Args:
            kept: ids of the kept experts of every MoE layer; or their number, for the most that so many may take.
            width: channels that are kept of every expert; None for all.
            mtp: whether multi-token-prediction layers stay.
        """
        layers = self._of_experts(width, mtp)
        total = self._rest + (self._mtp_rest if mtp else 0) + self._padding(width, mtp)
        if not isinstance(kept, int):
            return total + sum(of_layer[e] for of_layer, ids in zip(layers, kept, strict=True) for e in ids)
        return total + sum(self._largest(of_layer, kept) for of_layer in layers)

    def _of_experts(self, width: int | None, mtp: bool) -> Bytes:
        """Bytes of every expert at a width."""
        if (width, mtp) not in self._known:
            of, full = (1, 1) if width is None or self._width is None else (width, self._width.channels)
            tables = [(self._fixed, self._thin), *([(self._twins_fixed, self._twins_thin)] if mtp else [])]
            layers, experts = range(len(self._fixed)), range(self._topology.num_experts)
            self._known[width, mtp] = [
                [sum(fixed[i][e] + thin[i][e] * of // full for fixed, thin in tables) for e in experts] for i in layers
            ]
        return self._known[width, mtp]

    def _padding(self, width: int | None, mtp: bool) -> int:
        """Bytes of the zeros that shared experts get where routed ones have some width."""
        if width is None or self._width is None or not (padding := self._width.padding(width)):
            return 0
        length = self._width.shared * self._width.channels
        return (self._padded + (self._mtp_padded if mtp else 0)) * padding // length

    def _largest(self, sizes: Sequence[int], keep: int) -> int:
        """Bytes of the largest ``keep`` experts of a layer, as many in every group of its router."""
        groups = self._topology.num_groups if keep % self._topology.num_groups == 0 else 1
        size = len(sizes) // groups
        by_group = [sorted(sizes[g * size : (g + 1) * size], reverse=True) for g in range(groups)]
        return sum(sum(group[: keep // groups]) for group in by_group)


def _total(sizes: Bytes) -> int:
    return sum(map(sum, sizes))
