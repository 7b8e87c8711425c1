"""Recording: sees what the experts do in a forward pass, gives their statistics.

The forward pass is the library's own. A hook on the experts module sees the selected experts and the routing weights
that the model itself used; a tap in the slot between the experts' outputs and their weighting sees every output that
the pass computes anyway. So no router is re-derived, only routed (token, expert) pairs are evaluated, and the logits
stay bit-equal to those of the plain pass.

Two kinds of experts have no such slot. Some run in a loop of their own: it is called with weight 1 for every pair, and
the weighted sum is taken here, equal to the loop's but for rounding. Others are run on all tokens, each token scaled by
its weight before it enters an expert (0 where the expert is not selected): what they give is what the model adds, and
that is their output f here. As its factor in the sum is 1, every product of weight and norm takes 1 for the weight;
``weight_sum`` alone adds up the routing weights.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.checkpoints.structure import Structure
from moecover.checkpoints.topology import Topology
from moecover.errors import InputError, MoecoverError
from moecover.profiling.artifact import PARTS, STATISTICS, SUMS, Statistics
from moecover.runtime.loading import routers

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


class Sums:
    """Statistics of one corpus, added up over batches, all MoE layers of a batch at once or one after the other.

    During the pass each layer leaves little behind: one norm, one peak and one weight per (token, slot) pair, and its
    logits. `add` adds them up for the layers that it is given, expert ids counted on from layer to layer.

    Args:
        topology: of the model.
        device: where the sums lie.
        batches: of the corpus; the sums as they stand after each of `PARTS` equal shares but the last are kept, as far
            as these are whole numbers of batches.
    """

    def __init__(self, topology: Topology, device: torch.device, batches: int) -> None:
        import torch

        self.topology, self._device = topology, device
        slots = len(topology.decoder_layers) * topology.num_experts
        self._sums = torch.zeros(len(SUMS) - 1, slots, dtype=torch.float64, device=device)  # SUMS without prob_sum
        self._prob_sum = torch.zeros(slots, dtype=torch.float64, device=device)
        self._count = torch.zeros(slots, dtype=torch.int64, device=device)
        self._max_abs = torch.zeros(slots, dtype=torch.float32, device=device)
        self._num_tokens = np.zeros(len(topology.decoder_layers), dtype=np.int64)
        self._scoring: str | None = None
        self._ends = sorted({round(batches * part / PARTS) for part in range(1, PARTS)} - {0, batches})
        kinds = self.statistics()
        self.parts: Statistics = {n: np.zeros((len(self._ends), *v.shape), v.dtype) for n, v in kinds.items()}
        self._noted = np.zeros((len(self._ends), len(topology.decoder_layers)), dtype=bool)  # which of the parts are

    def add(self, taps: Sequence[Tap], first: int, batch: int, token_mask: torch.Tensor | None = None) -> None:
        """Add what layers left behind in a batch, and have them forget it.

        Args:
            taps: of consecutive MoE layers.
            first: the first of these layers.
            batch: number of the batch, from 0 on.
            token_mask: bool ``[token]``, None where every token counts.

        Raises:
            InputError: a router's weights are not finite.
            MoecoverError: a layer was not seen once.
        """
        import torch

        self._note([at for at, end in enumerate(self._ends) if batch >= end], slice(first, first + len(taps)))
        if not all(len(tap.left) == 1 and tap.logits is not None for tap in taps):
            raise MoecoverError(
                "the pass did not run every MoE layer once through the kernel that is recorded: please report this"
            )
        experts, order, norms, peaks = (torch.stack(part) for part in zip(*(tap.left[0] for tap in taps), strict=True))
        weights = torch.stack([tap.weights for tap in taps]).double()  # [layer, token, slot]
        logits = torch.stack([tap.logits for tap in taps if tap.logits is not None])  # [layer, token, expert]
        total = weights.sum(-1, keepdim=True)
        if not bool(torch.isfinite(total).all()):
            bad = taps[int((~torch.isfinite(total)).flatten(1).any(1).nonzero()[0])].decoder_layer
            raise InputError(f"decoder layer {bad}: the router's weights are not finite. Its tensors hold NaN or infinity, or the dtype overflows (try --dtype float32)")  # fmt: skip
        if self._scoring is None:
            self._scoring = scoring_function(logits[0, :64], weights[0, :64], taps[0].index[:64])
        # Layer by layer: the last bit of a vectorised function depends on where in the tensor an element lies.
        probabilities = torch.stack([SCORING[self._scoring](one) for one in logits])
        if token_mask is not None:
            probabilities = probabilities[:, token_mask]
        experts_here = slice(first * self.topology.num_experts, (first + len(taps)) * self.topology.num_experts)
        self._prob_sum[experts_here] += probabilities.sum(1, dtype=self._prob_sum.dtype).flatten()

        offsets = (first + torch.arange(len(taps), device=self._device)[:, None]) * self.topology.num_experts
        factors = torch.ones_like(weights) if taps[0].weighs_inputs else weights  # of the outputs, in their sum
        total = factors.sum(-1, keepdim=True)
        renormalised = (factors / (total + (total == 0))).flatten(1).gather(1, order)
        used, norms = weights.flatten(1).gather(1, order), norms.double()
        columns = (experts + offsets, used, factors.flatten(1).gather(1, order), renormalised, norms, peaks)
        if token_mask is None:
            slots, used, factor, renormalised, norms, peaks = (c.flatten() for c in columns)
        else:
            keep = token_mask[order // weights.shape[-1]]
            slots, used, factor, renormalised, norms, peaks = (c[keep] for c in columns)
        weighted = factor * norms
        self._sums.index_add_(1, slots, torch.stack([used, norms, weighted, weighted.square(), renormalised * norms]))
        self._count += torch.bincount(slots, minlength=len(self._count))
        self._max_abs.scatter_reduce_(0, slots, peaks, "amax")
        tokens = weights.shape[1] if token_mask is None else int(token_mask.sum())
        self._num_tokens[first : first + len(taps)] += tokens
        for tap in taps:
            tap.clear()

    def _note(self, parts: list[int], layers: slice) -> None:
        """Keep the sums of some layers as they stand, for the parts that have not got them yet."""
        for at in parts:
            if not self._noted[at, layers].all():
                for name, values in self.statistics().items():
                    self.parts[name][at, layers] = values[layers]
                self._noted[at, layers] = True

    def finish(self) -> None:
        """Note the parts behind whose end no batch came (of a process that ran only some of the batches)."""
        for layer in range(len(self.topology.decoder_layers)):
            self._note(list(range(len(self._ends))), slice(layer, layer + 1))

    def statistics(self) -> Statistics:
        """What was added up so far, each ``[layer, expert]``; a copy."""
        shape = (len(self.topology.decoder_layers), self.topology.num_experts)
        rows = dict(zip([name for name in SUMS if name != "prob_sum"], self._sums, strict=True))
        tensors = {"count": self._count, **rows, "prob_sum": self._prob_sum, "max_abs": self._max_abs.double()}
        values = {name: tensor.cpu().numpy().reshape(shape).copy() for name, tensor in tensors.items()}
        tokens = np.broadcast_to(self._num_tokens[:, None], shape).copy()
        return {name: {**values, "num_tokens": tokens}[name] for name in STATISTICS}

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that was added up, by name, for a job that goes on later."""
        kept = {"scoring": np.array(SCORING_NAMES.index(self._scoring) if self._scoring else -1)}
        kept |= {f"parts.{name}": values for name, values in self.parts.items()} | {"noted": self._noted}
        return kept | self.statistics()

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on from what `state` gave."""
        import torch

        def flat(name: str) -> torch.Tensor:
            return torch.from_numpy(state[name].reshape(-1).copy()).to(self._device)

        self._sums = torch.stack([flat(name) for name in SUMS if name != "prob_sum"])
        self._prob_sum, self._count, self._max_abs = flat("prob_sum"), flat("count"), flat("max_abs").float()
        self._num_tokens = state["num_tokens"][:, 0].copy()
        self._scoring = SCORING_NAMES[number] if (number := int(state["scoring"])) >= 0 else None
        self.parts = {name: state[f"parts.{name}"].copy() for name in self.parts}
        self._noted = state["noted"].copy()


class Tap:
    """What one MoE layer leaves behind in a batch."""

    def __init__(self, decoder_layer: int, buffers: dict[int, torch.Tensor]) -> None:
        self.decoder_layer, self.buffers = decoder_layer, buffers
        self.weighs_inputs = False  # the routing weights scale what enters the experts, not what they give
        self.keep: Callable[[torch.Tensor], None] | None = None  # takes the hidden states, where a sample is kept
        self.clear()

    def clear(self) -> None:
        """Forget the batch."""
        self.left: list[tuple[torch.Tensor, ...]] = []  # experts, order, norms, peaks; each [pair], sorted by expert
        self.hidden: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None

    def before_experts(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Hook before the experts: hidden states ``[token, hidden]``, selected experts and weights ``[token, slot]``."""
        self.hidden, self.index, self.weights = args
        if self.keep is not None:
            self.keep(self.hidden)

    def after_router(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Hook after the router: logits ``[token, expert]`` come first in what it returns."""
        self.logits = output[0]

    def __call__(self, outputs: torch.Tensor) -> torch.Tensor:
        """Recorder in the slot after the experts: unweighted outputs ``[pair, hidden]``, pairs sorted by expert."""
        import torch

        experts, order = torch.sort(self.index.reshape(-1))  # the same sort of the same values as the kernel's
        width = outputs.shape[-1]
        if width not in self.buffers:
            rows = 512 if outputs.device.type == "cpu" else 65536
            self.buffers[width] = torch.empty(rows, width, dtype=torch.float32, device=outputs.device)
        norms, peaks = norms_and_peaks(outputs, self.buffers[width])
        if not math.isfinite(norms.sum().item()):
            self._explain_non_finite(experts, order, peaks)
        self.hidden = None
        self.left.append((experts, order, norms, peaks))
        return outputs

    def _explain_non_finite(self, experts: torch.Tensor, order: torch.Tensor, peaks: torch.Tensor) -> None:
        import torch

        assert self.hidden is not None
        where = f"decoder layer {self.decoder_layer}"
        remedy = "hold NaN or infinity, or the dtype overflows (try --dtype float32)"
        bad = ~torch.isfinite(peaks)
        if bool((bad & ~torch.isfinite(self.hidden).all(-1)[order // self.index.shape[-1]]).any()):
            raise InputError(
                f"{where}: the hidden states that enter the experts are not finite. The weights before it {remedy}"
            )
        named = sorted(set(experts[bad].tolist()))
        if named:
            listed = ", ".join(map(str, named[:8]))
            raise InputError(f"{where}, expert {listed}: the output is not finite. Its weights {remedy}")
        raise InputError(f"{where}: the norms of the experts' outputs overflow float32. The weights before it {remedy}")


def norms_and_peaks(outputs: torch.Tensor, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean norm and largest absolute component of every row, float32 ``[row]``; ``outputs`` is ``[row, hidden]``.

    Row by row through ``buffer`` (float32 ``[chunk, hidden]``), which stays in the cache and is allocated once: on a CPU
    this halves the cost of recording. NaN and infinity show in the peaks.
    """
    import torch

    norms, peaks = torch.empty(2, len(outputs), dtype=torch.float32, device=outputs.device)
    for start in range(0, len(outputs), len(buffer)):
        chunk = outputs[start : start + len(buffer)]
        values = buffer[: len(chunk)].copy_(chunk).abs_()
        torch.linalg.vector_norm(values, dim=-1, out=norms[start : start + len(chunk)])
        torch.amax(values, -1, out=peaks[start : start + len(chunk)])
    return norms, peaks


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.softmax(logits, -1, dtype=torch.float32)


def _sigmoid(logits: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.sigmoid(logits.float())


SCORING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"softmax": _softmax, "sigmoid": _sigmoid}
SCORING_NAMES = list(SCORING)


def scoring_function(logits: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> str:
    """The function from logits to probabilities that a router applies, recognised from one output; a name in `SCORING`.

    The weights of a token's slots are proportional to the probabilities of the selected experts, whatever the router
    normalises or scales afterwards. Softmax is taken where nothing fits (a router that multiplies by something else).

    Args:
        logits: ``[token, expert]``.
        weights: ``[token, slot]``.
        index: selected experts ``[token, slot]``.
    """
    import torch

    def shares(values: torch.Tensor) -> torch.Tensor:
        # One slot has no proportions: there the weight itself is compared.
        return values if values.shape[-1] == 1 else values / values.sum(-1, keepdim=True)

    for name, function in SCORING.items():
        selected = function(logits).gather(-1, index)
        if torch.allclose(shares(selected), shares(weights.float()), rtol=0.02, atol=1e-3):
            return name
    return "softmax"


@contextlib.contextmanager
def _in_slot(tap: Tap, experts: Any, router: torch.nn.Module) -> Iterator[None]:
    """A tap in the grouped kernel's slot for a norm of the experts' outputs, behind the norm of those that have one."""
    normed: bool = experts.has_post_expert_norm
    norm: Any = experts.post_expert_norm if normed else lambda outputs: outputs
    handles = [
        experts.register_forward_pre_hook(tap.before_experts),
        router.register_forward_hook(tap.after_router),
    ]
    experts.has_post_expert_norm = True
    experts.__dict__["post_expert_norm"] = lambda outputs: tap(norm(outputs))
    try:
        yield
    finally:
        experts.has_post_expert_norm = normed
        del experts.__dict__["post_expert_norm"]
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _around_loop(tap: Tap, experts: Any, router: torch.nn.Module) -> Iterator[None]:
    """A tap around experts that run in a loop of their own, called once with every pair as a token of one slot."""
    import torch

    loop = experts.forward

    def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        tap.before_experts(experts, (hidden, index, weights))
        alone = index.reshape(-1, 1)
        outputs = loop(hidden.repeat_interleave(index.shape[1], 0), alone, torch.ones_like(alone, dtype=weights.dtype))
        tap(outputs[torch.sort(index.reshape(-1)).indices])
        weighted: torch.Tensor = outputs.view(*index.shape, -1) * weights[..., None]
        return weighted.sum(1).to(hidden.dtype)

    handle = router.register_forward_hook(tap.after_router)
    experts.forward = forward
    try:
        yield
    finally:
        del experts.__dict__["forward"]
        handle.remove()


@contextlib.contextmanager
def _behind_dense(tap: Tap, experts: Any, router: Any) -> Iterator[None]:
    """A tap behind experts that are run on all tokens, each scaled by its weight; ``[expert, token]`` in one axis."""
    import torch

    def after_router(module: Any, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        scores, logits = output
        index = torch.topk(logits, router.top_k, dim=1).indices  # the router's own call, whose indices it keeps
        tap.before_experts(experts, (args[0], index, scores.gather(1, index)))
        tap.logits = logits

    def after_experts(module: Any, args: Any, output: torch.Tensor) -> None:
        selected, order = torch.sort(tap.index.reshape(-1))
        outputs = output.view(experts.num_experts, -1, output.shape[-1])
        tap(outputs[selected, order // tap.index.shape[1]])

    tap.weighs_inputs = True
    handles = [router.register_forward_hook(after_router), experts.register_forward_hook(after_experts)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _implementation(experts: Any) -> Any:
    return getattr(getattr(experts, "config", None), "_experts_implementation", None)


def _way(experts: Any) -> Callable[[Tap, Any, Any], contextlib.AbstractContextManager[None]] | None:
    """How experts are observed; None where it is not known. Those without the kernel's slot are told by what they take."""
    if hasattr(experts, "has_post_expert_norm"):
        return _in_slot if _implementation(experts) == "grouped_mm" else None
    return {3: _around_loop, 1: _behind_dense}.get(len(inspect.signature(experts.forward).parameters))


@contextlib.contextmanager
def recording(model: torch.nn.Module, structure: Structure) -> Iterator[list[Tap]]:
    """A tap on every MoE layer while the block runs forward passes; leaves the model as it was.

    Have `Sums.add` take what the taps hold after every pass of a layer.

    Raises:
        InputError: the experts of this family cannot be observed.
    """
    topology = structure.topology
    buffers: dict[int, torch.Tensor] = {}  # by width; shared, so that it stays in the cache
    taps = [Tap(layer, buffers) for layer in topology.decoder_layers]
    with contextlib.ExitStack() as stack:
        for name, router, tap in zip(structure.experts_modules, routers(model, structure), taps, strict=True):
            experts: Any = model.get_submodule(name)
            if (observed := _way(experts)) is None:
                raise InputError(f"the experts of {topology.family} (decoder layer {tap.decoder_layer}) do not run through the library's grouped kernel (experts implementation {_implementation(experts)}): load the model with `load_model`; where that changes nothing, the family is not supported yet")  # fmt: skip
            stack.enter_context(observed(tap, experts, router))
        yield taps
