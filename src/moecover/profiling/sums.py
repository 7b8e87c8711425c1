"""The statistics of one corpus, added up over batches from what the taps of a forward pass recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.checkpoints.topology import Topology
from moecover.errors import MoecoverError
from moecover.profiling.hooks import Tap
from moecover.profiling.statistics import LATER, PARTS, STATISTICS, SUMS, Statistics
from moecover.profiling.wide import CHANNELS, PAIRS, WIDE, wide_shape
from moecover.runtime.devices import has_float64
from moecover.runtime.finite import not_finite
from moecover.runtime.segments import segment_sums

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


class Sums:
    """Statistics of one corpus, added up over batches, for all MoE layers of a batch at once or one after the other.

    During the pass each layer records little: one norm, one peak and one weight per (token, slot) pair, and its router
    logits. `add` adds them up for the given layers, with expert ids that continue from layer to layer.

    Args:
        topology: shape of the routed part of the model.
        device: where the sums are kept; the CPU if it has no float64.
        batches: number of batches of the corpus; the sums after each of `PARTS` equal shares of them, except the last,
            are kept too, as far as these are whole batches.
        width: number of channels of every expert, from `channels.width_of`; None where their energy is not recorded.

    Attributes:
        parts: these running sums by statistic, each ``[part, layer, expert]``.
    """

    def __init__(self, topology: Topology, device: torch.device, batches: int, width: int | None) -> None:
        import torch

        self.topology = topology
        self._device = device if has_float64(device) else torch.device("cpu")
        slots = len(topology.decoder_layers) * topology.num_experts
        self._sums = torch.zeros(
            len(SUMS) - 1, slots, dtype=torch.float64, device=self._device
        )  # SUMS without prob_sum
        self._prob_sum = torch.zeros(slots, dtype=torch.float64, device=self._device)
        self._count = torch.zeros(slots, dtype=torch.int64, device=self._device)
        self._max_abs = torch.zeros(slots, dtype=torch.float32, device=self._device)
        shapes = {name: wide_shape(name, topology, width) for name in WIDE if name != CHANNELS or width is not None}
        self._wide = {n: self._prob_sum.new_zeros([length or 0 for length in s]) for n, s in shapes.items()}
        self._num_tokens = np.zeros(len(topology.decoder_layers), dtype=np.int64)
        self._scoring: str | None = None
        self._ends = sorted({round(batches * part / PARTS) for part in range(1, PARTS)} - {0, batches})
        kinds = self.statistics()
        self.parts: Statistics = {n: np.zeros((len(self._ends), *v.shape), v.dtype) for n, v in kinds.items()}
        self._noted = np.zeros((len(self._ends), len(topology.decoder_layers)), dtype=bool)  # parts that are complete

    def add(self, taps: Sequence[Tap], first: int, batch: int) -> None:
        """Add what layers recorded in a batch, and clear their taps.

        Args:
            taps: taps of consecutive MoE layers.
            first: index of the first of these layers.
            batch: index of the batch within the corpus.

        Raises:
            InputError: the weights of a router are not finite.
            MoecoverError: a layer did not run exactly once.
        """
        self._note([at for at, end in enumerate(self._ends) if batch >= end], slice(first, first + len(taps)))
        if not all(len(tap.left) == 1 and tap.logits is not None and self._has_energy(tap) for tap in taps):
            raise MoecoverError(
                "the pass did not run every MoE layer once through the kernel that is recorded: please report this"
            )
        weights = self._stacked([tap.weights for tap in taps]).double()  # [layer, token, slot]
        token_mask = None if taps[0].mask is None else taps[0].mask.to(self._device)
        _check_finite(weights, taps)
        self._add_probabilities(taps, first, weights, token_mask)
        self._add_pairs(taps, first, weights, token_mask)
        for layer, tap in enumerate(taps, first):
            self._add_wide(tap, layer, token_mask)
        self._num_tokens[first : first + len(taps)] += weights.shape[1] if token_mask is None else int(token_mask.sum())
        for tap in taps:
            tap.clear()

    def _stacked(self, of_layers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Tensors of several layers, each on its layer's device, as one where the sums are."""
        import torch

        return torch.stack([one.to(self._device) for one in of_layers])

    def _add_probabilities(
        self, taps: Sequence[Tap], first: int, weights: torch.Tensor, token_mask: torch.Tensor | None
    ) -> None:
        """Add the routing probabilities of all experts, selected or not."""
        import torch

        logits = self._stacked([tap.logits for tap in taps if tap.logits is not None])
        if self._scoring is None:  # logits are [layer, token, expert]
            self._scoring = scoring_function(logits[0, :64], weights[0, :64], taps[0].index[:64].to(self._device))
        # Layer by layer: the last bit of a vectorised function depends on where in the tensor an element lies.
        probabilities = torch.stack([SCORING[self._scoring](one) for one in logits])
        if token_mask is not None:
            probabilities = probabilities[:, token_mask]
        experts = slice(first * self.topology.num_experts, (first + len(taps)) * self.topology.num_experts)
        self._prob_sum[experts] += probabilities.sum(1, dtype=self._prob_sum.dtype).flatten()

    def _add_pairs(
        self, taps: Sequence[Tap], first: int, weights: torch.Tensor, token_mask: torch.Tensor | None
    ) -> None:
        """Add the statistics of the selected (token, expert) pairs."""
        import torch

        recorded = zip(*(tap.left[0] for tap in taps), strict=True)
        experts, order, norms, peaks = map(self._stacked, recorded)
        offsets = (first + torch.arange(len(taps), device=self._device)[:, None]) * self.topology.num_experts
        factors = torch.ones_like(weights) if taps[0].weighs_inputs else weights  # of the outputs, in their sum
        total = factors.sum(-1, keepdim=True)
        renormalised = (factors / (total + (total == 0))).flatten(1).gather(1, order)
        used, norms = weights.flatten(1).gather(1, order), norms.double()
        change = self._changes(taps, weights).gather(1, order // weights.shape[-1])
        columns = (experts + offsets, used, factors.flatten(1).gather(1, order), renormalised, norms, change, peaks)
        if token_mask is None:
            slots, used, factor, renormalised, norms, change, peaks = (c.flatten() for c in columns)
        else:
            keep = token_mask[order // weights.shape[-1]]
            slots, used, factor, renormalised, norms, change, peaks = (c[keep] for c in columns)
        weighted = factor * norms
        pairs = torch.stack(
            [used, norms, weighted, weighted.square(), renormalised * norms, norms.square(), weighted * change], dim=1
        )
        self._sums = segment_sums(pairs, slots, len(self._count), start=self._sums.T).T
        self._count += torch.bincount(slots, minlength=len(self._count))
        self._max_abs.scatter_reduce_(0, slots, peaks, "amax")

    def _changes(self, taps: Sequence[Tap], weights: torch.Tensor) -> torch.Tensor:
        """How far the routed experts turn each token, ``[layer, token]``; NaN where that is not seen."""
        found = [None if tap.change is None else tap.change.values for tap in taps]
        unseen = weights.new_full(weights.shape[1:2], float("nan"))
        return self._stacked([unseen if one is None else one for one in found]).double()

    def _has_energy(self, tap: Tap) -> bool:
        """Whether a tap recorded the channels, where they are added up."""
        return CHANNELS not in self._wide or (tap.channels is not None and tap.channels.squares is not None)

    def _add_wide(self, tap: Tap, layer: int, token_mask: torch.Tensor | None) -> None:
        """Add the statistics of `wide` of a layer; padding does not count in the energy already."""
        if tap.channels is not None and CHANNELS in self._wide:
            self._wide[CHANNELS][layer] += tap.channels.energy(self._device)
        self._wide[PAIRS][:, layer] += self._pairs(tap, token_mask)

    def _pairs(self, tap: Tap, token_mask: torch.Tensor | None) -> torch.Tensor:
        """Of every pair of experts, the tokens that go to both and the sum of what they add, ``[2, pair]``.

        An expert adds g ||f|| to a token, an entry of a matrix ``[token, expert]`` whose Gram matrix holds the sums.
        """
        import torch

        _, order, norms, _ = (one.to(self._device) for one in tap.left[0])
        index, weights = tap.index.to(self._device), tap.weights.to(self._device).double()
        of_slots = torch.empty_like(weights).view(-1).scatter_(0, order, norms.double()).view_as(weights)
        adds = of_slots if tap.weighs_inputs else of_slots * weights
        rows, columns = torch.triu_indices(*2 * [self.topology.num_experts], device=self._device)
        found = []
        for values in (torch.ones_like(adds), adds):
            placed = adds.new_zeros(len(index), self.topology.num_experts).scatter_(1, index, values)
            placed = placed if token_mask is None else placed[token_mask]
            found.append((placed.T @ placed)[rows, columns])
        return torch.stack(found)

    def _note(self, parts: list[int], layers: slice) -> None:
        """Keep the running sums of some layers for the parts that do not have them yet."""
        for at in parts:
            if not self._noted[at, layers].all():
                for name, values in self.statistics().items():
                    self.parts[name][at, layers] = values[layers]
                self._noted[at, layers] = True

    def finish(self) -> None:
        """Complete the parts after whose end no batch came (in a process that ran only some of the batches)."""
        for layer in range(len(self.topology.decoder_layers)):
            self._note(list(range(len(self._ends))), slice(layer, layer + 1))

    def statistics(self) -> Statistics:
        """The sums so far, each ``[layer, expert]``; a copy."""
        shape = (len(self.topology.decoder_layers), self.topology.num_experts)
        rows = dict(zip([name for name in SUMS if name != "prob_sum"], self._sums, strict=True))
        tensors = {"count": self._count, **rows, "prob_sum": self._prob_sum, "max_abs": self._max_abs.double()}
        values = {name: tensor.cpu().numpy().reshape(shape).copy() for name, tensor in tensors.items()}
        tokens = np.broadcast_to(self._num_tokens[:, None], shape).copy()
        for name in LATER:
            if np.isnan(values[name]).any():  # not seen: of experts without tokens neither
                values[name] = np.full(shape, np.nan)
        return {name: {**values, "num_tokens": tokens}[name] for name in STATISTICS}

    def wide(self) -> dict[str, NDArray[np.float64]]:
        """The statistics of `wide` so far, by name; on a CPU they go on to change."""
        return {name: values.cpu().numpy() for name, values in self._wide.items()}

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that has been added up, by name, for a job that is resumed later; valid until more is added."""
        kept = {"scoring": np.array(SCORING_NAMES.index(self._scoring) if self._scoring else -1)}
        kept |= {f"parts.{name}": values for name, values in self.parts.items()} | {"noted": self._noted}
        return kept | self.statistics() | self.wide()

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Continue from the result of `state`."""
        import torch

        def flat(name: str) -> torch.Tensor:
            return torch.from_numpy(state[name].reshape(-1).copy()).to(self._device)

        self._sums = torch.stack([flat(name) for name in SUMS if name != "prob_sum"])
        self._prob_sum, self._count, self._max_abs = flat("prob_sum"), flat("count"), flat("max_abs").float()
        self._wide = {name: flat(name).reshape(values.shape) for name, values in self._wide.items()}
        self._num_tokens = state["num_tokens"][:, 0].copy()
        self._scoring = SCORING_NAMES[number] if (number := int(state["scoring"].item())) >= 0 else None
        self.parts = {name: state[f"parts.{name}"].copy() for name in self.parts}
        self._noted = state["noted"].copy()


def _check_finite(weights: torch.Tensor, taps: Sequence[Tap]) -> None:
    """Refuse routing weights ``[layer, token, slot]`` that are not finite."""
    import torch

    finite = torch.isfinite(weights.sum(-1))
    if not bool(finite.all()):
        bad = taps[int((~finite).any(1).nonzero()[0])].decoder_layer
        raise not_finite(f"decoder layer {bad}", "the router's weights are")


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.softmax(logits, -1, dtype=torch.float32)


def _sigmoid(logits: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.sigmoid(logits.float())


SCORING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"softmax": _softmax, "sigmoid": _sigmoid}
SCORING_NAMES = list(SCORING)


def scoring_function(logits: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> str:
    """Name in `SCORING` of the function from logits to probabilities that a router applies, inferred from one output.

    The weights of a token's slots are proportional to the probabilities of the selected experts, however the router
    normalises or scales them afterwards. Softmax is assumed where no function fits (a router that multiplies by
    something else).

    Args:
        logits: ``[token, expert]``.
        weights: ``[token, slot]``.
        index: selected experts ``[token, slot]``.
    """
    import torch

    def shares(values: torch.Tensor) -> torch.Tensor:
        # A single slot has no proportions: compare the weight itself.
        return values if values.shape[-1] == 1 else values / values.sum(-1, keepdim=True)

    for name, function in SCORING.items():
        selected = function(logits).gather(-1, index)
        if torch.allclose(shares(selected), shares(weights.float()), rtol=0.02, atol=1e-3):
            return name
    return "softmax"
