"""Taps on the experts of a live model: record routing, weights and output norms during a forward pass.

The forward pass is that of transformers. A hook on the experts module sees the selected experts and the routing weights
that the model used; a tap in the slot between the experts' outputs and their weighting sees every output that the pass
computes anyway. So no router is reimplemented, only routed (token, expert) pairs are evaluated, and the logits are
bit-equal to those of the plain pass.

Two kinds of experts have no such slot. Some run in a loop of their own: it is called with weight 1 for every pair, and
the weighted sum is computed here, equal to the loop's up to rounding. Others run on all tokens, each token scaled by
its weight before it enters an expert (0 where the expert is not selected): their output is what the model adds, and it
is their output f here. As its factor in the sum is 1, every product of weight and norm uses 1 as the weight; only
``weight_sum`` adds up the routing weights.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.structure import Structure
from moecover.errors import InputError
from moecover.runtime.finite import not_finite
from moecover.runtime.loading import routers

if TYPE_CHECKING:
    import torch


class Tap:
    """Records one MoE layer in a batch.

    Args:
        decoder_layer: decoder index of the layer.
        buffers: scratch memory by width, shared by all taps.

    Attributes:
        weighs_inputs: whether the routing weights scale the inputs of the experts instead of their outputs.
        keep: receives the hidden states ``[token, hidden]`` that enter the experts, where a sample of them is saved.
        index: selected experts ``[token, slot]``.
        weights: routing weights ``[token, slot]``.
        logits: router logits ``[token, expert]``.
        left: (experts, order, norms, peaks) of every call of the experts, each ``[pair]``, sorted by expert.
    """

    index: torch.Tensor
    weights: torch.Tensor

    def __init__(self, decoder_layer: int, buffers: dict[int, torch.Tensor]) -> None:
        self.decoder_layer, self.buffers = decoder_layer, buffers
        self.weighs_inputs = False
        self.keep: Callable[[torch.Tensor], None] | None = None
        self.clear()

    def clear(self) -> None:
        """Discard the batch."""
        self.left: list[tuple[torch.Tensor, ...]] = []
        self.hidden: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None

    def before_experts(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Hook before the experts; args: hidden states ``[token, hidden]``, experts and weights ``[token, slot]``."""
        self.hidden, self.index, self.weights = args
        if self.keep is not None:
            self.keep(self.hidden)

    def after_router(self, module: torch.nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
        """Hook after the router, which returns the logits ``[token, expert]`` first."""
        self.logits = output[0]

    def __call__(self, outputs: torch.Tensor) -> torch.Tensor:
        """Record the unweighted outputs ``[pair, hidden]`` of the experts, sorted by expert; returns them unchanged."""
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
        bad = ~torch.isfinite(peaks)
        if bool((bad & ~torch.isfinite(self.hidden).all(-1)[order // self.index.shape[-1]]).any()):
            raise not_finite(where, "the hidden states that enter the experts are")
        named = sorted(set(experts[bad].tolist()))
        if named:
            raise not_finite(f"{where}, expert {', '.join(map(str, named[:8]))}", "the output is")
        raise not_finite(where, "the norms of the experts' outputs in float32 are")


def norms_and_peaks(outputs: torch.Tensor, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean norm and largest absolute component of every row.

    The rows go through a buffer that stays in the cache and is allocated once: on a CPU this halves the cost of
    recording. NaN and infinity show in the peaks.

    Args:
        outputs: ``[row, hidden]``.
        buffer: float32 ``[chunk, hidden]``.

    Returns:
        Norms and peaks, float32 ``[row]`` each.
    """
    import torch

    norms, peaks = torch.empty(2, len(outputs), dtype=torch.float32, device=outputs.device)
    for start in range(0, len(outputs), len(buffer)):
        chunk = outputs[start : start + len(buffer)]
        values = buffer[: len(chunk)].copy_(chunk).abs_()
        torch.linalg.vector_norm(values, dim=-1, out=norms[start : start + len(chunk)])
        torch.amax(values, -1, out=peaks[start : start + len(chunk)])
    return norms, peaks


@contextlib.contextmanager
def _in_slot(tap: Tap, experts: Any, router: torch.nn.Module) -> Iterator[None]:
    """A tap in the grouped kernel's slot for a norm of the experts' outputs, after that norm where there is one."""
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
    """A tap around experts that run in a loop of their own, called once with every pair as a token with one slot."""
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
def _after_dense(tap: Tap, experts: Any, router: Any) -> Iterator[None]:
    """A tap after experts that run on all tokens, each scaled by its weight; ``[expert, token]`` is one axis."""
    import torch

    def after_router(
        module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        scores, logits = output
        index = torch.topk(
            logits, router.top_k, dim=1
        ).indices  # the call of the router, which does not return its indices
        tap.before_experts(experts, (args[0], index, scores.gather(1, index)))
        tap.logits = logits

    def after_experts(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
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


def _implementation(experts: Any) -> object:
    """Name of the kernel that runs the experts, as transformers calls it; None where it does not say."""
    return getattr(getattr(experts, "config", None), "_experts_implementation", None)


def _way(experts: Any) -> Callable[[Tap, Any, Any], contextlib.AbstractContextManager[None]] | None:
    """The tap that fits the experts, None for an unknown kind; those without the slot differ in their arguments."""
    if hasattr(experts, "has_post_expert_norm"):
        return _in_slot if _implementation(experts) == "grouped_mm" else None
    return {3: _around_loop, 1: _after_dense}.get(len(inspect.signature(experts.forward).parameters))


@contextlib.contextmanager
def recording(model: torch.nn.Module, structure: Structure) -> Iterator[list[Tap]]:
    """Put a tap on every MoE layer until the block ends; the model is left as it was.

    Pass the taps to `Sums.add` after every pass of a layer.

    Raises:
        InputError: the experts of this family cannot be recorded.
    """
    topology = structure.topology
    buffers: dict[int, torch.Tensor] = {}  # shared, so that it stays in the cache
    taps = [Tap(layer, buffers) for layer in topology.decoder_layers]
    with contextlib.ExitStack() as stack:
        for name, router, tap in zip(structure.experts_modules, routers(model, structure), taps, strict=True):
            experts: Any = model.get_submodule(name)
            if (observed := _way(experts)) is None:
                raise InputError(
                    f"the experts of {topology.family} (decoder layer {tap.decoder_layer}) do not run through the"
                    f" library's grouped kernel (experts implementation {_implementation(experts)}): load the model"
                    " with `load_model`; where that changes nothing, the family is not supported yet"
                )
            stack.enter_context(observed(tap, experts, router))
        yield taps
