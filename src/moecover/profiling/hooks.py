"""Taps on the experts of a live model: record routing, weights and output norms during a forward pass.

The forward pass is that of transformers. A hook on the experts module sees the selected experts and the routing weights
that the model used; a tap in the slot between the experts' outputs and their weighting sees every output that the pass
computes anyway. So no router is reimplemented, only routed (token, expert) pairs are evaluated, and the logits are
bit-equal to those of the plain pass. What enters the down projections is seen where the library's own function of gate
and up returns it.

Two kinds of experts have no such slot. Some run in a loop of their own: it is called with weight 1 for every pair, and
the weighted sum is computed here, equal to the loop's up to rounding. Others run on all tokens, each token scaled by
its weight before it enters an expert (0 where the expert is not selected): their output is what the model adds, and it
is their output f here. As its factor in the sum is 1, every product of weight and norm uses 1 as the weight; only
``weight_sum`` adds up the routing weights. What enters their down projections is seen in the product with them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.structure import Structure
from moecover.errors import InputError
from moecover.profiling.channels import Channels, down_projections, entering, width_of
from moecover.profiling.reductions import Buffers, norms_and_peaks, scratch
from moecover.profiling.token_change import Change, watching
from moecover.runtime.finite import not_finite
from moecover.runtime.forwards import with_forward
from moecover.runtime.loading import routers

if TYPE_CHECKING:
    import torch


class Tap:
    """Records one MoE layer in a batch.

    Args:
        decoder_layer: decoder index of the layer.
        buffers: scratch memory, shared by all taps.
        channels: records what enters the down projections, None where that is not seen.

    Attributes:
        mask: bool ``[token]``, False for padding; None where every token counts. It is set before the layer runs.
        weighs_inputs: whether the routing weights scale the inputs of the experts instead of their outputs.
        keep: receives the hidden states ``[token, hidden]`` that enter the experts, where a sample of them is saved.
        index: selected experts ``[token, slot]``.
        weights: routing weights ``[token, slot]``.
        experts: selected experts, ascending ``[pair]``.
        order: their places in the flattened ``index``, ``[pair]``.
        logits: router logits ``[token, expert]``.
        left: (experts, order, norms, peaks) of every call of the experts, each ``[pair]``, sorted by expert.
        change: how far the routed experts turn each token; None where nothing watches.
    """

    index: torch.Tensor
    weights: torch.Tensor
    experts: torch.Tensor
    order: torch.Tensor

    def __init__(self, decoder_layer: int, buffers: Buffers, channels: Channels | None) -> None:
        self.decoder_layer, self.buffers, self.channels = decoder_layer, buffers, channels
        self.weighs_inputs = False
        self.change: Change | None = None
        self.mask: torch.Tensor | None = None
        self.keep: Callable[[torch.Tensor], None] | None = None
        self.clear()

    def clear(self) -> None:
        """Discard the batch."""
        self.left: list[tuple[torch.Tensor, ...]] = []
        self.hidden: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None
        if self.channels is not None:
            self.channels.squares = None
        if self.change is not None:
            self.change.clear()

    def before_experts(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Hook before the experts; args: hidden states ``[token, hidden]``, experts and weights ``[token, slot]``."""
        import torch

        self.hidden, self.index, self.weights = args
        self.experts, self.order = torch.sort(
            self.index.reshape(-1)
        )  # the same sort of the same values as the kernel's
        if self.keep is not None:
            self.keep(self.hidden)

    def after_router(self, module: torch.nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
        """Hook after the router, which returns the logits ``[token, expert]`` first."""
        self.logits = output[0]

    def activated(self, values: torch.Tensor) -> torch.Tensor:
        """Record what enters the down projections, ``[pair, channel]``, sorted by expert; returns it unchanged."""
        if self.channels is not None and len(values) == len(self.experts):
            factors = self.weights.new_ones(self.weights.shape) if self.weighs_inputs else self.weights
            keep = None if self.mask is None else self.mask.to(self.order.device)[self.order // self.index.shape[-1]]
            self.channels.record(values, factors.reshape(-1)[self.order], self.experts, keep)
        return values

    def __call__(self, outputs: torch.Tensor) -> torch.Tensor:
        """Record the unweighted outputs ``[pair, hidden]`` of the experts, sorted by expert; returns them unchanged."""
        norms, peaks = norms_and_peaks(outputs, scratch(self.buffers, outputs.shape[-1], outputs.device))
        if not math.isfinite(norms.sum().item()):
            self._explain_non_finite(peaks)
        self.hidden = None
        self.left.append((self.experts, self.order, norms, peaks))
        return outputs

    def after_experts(self, module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        """Hook after the experts, which give their weighted sum ``[token, hidden]``."""
        if self.change is not None:
            self.change.after_experts(output)

    def _explain_non_finite(self, peaks: torch.Tensor) -> None:
        import torch

        assert self.hidden is not None
        where = f"decoder layer {self.decoder_layer}"
        bad = ~torch.isfinite(peaks)
        if bool((bad & ~torch.isfinite(self.hidden).all(-1)[self.order // self.index.shape[-1]]).any()):
            raise not_finite(where, "the hidden states that enter the experts are")
        named = sorted(set(self.experts[bad].tolist()))
        if named:
            raise not_finite(f"{where}, expert {', '.join(map(str, named[:8]))}", "the output is")
        raise not_finite(where, "the norms of the experts' outputs in float32 are")


@contextlib.contextmanager
def _in_slot(tap: Tap, experts: Any, router: torch.nn.Module) -> Iterator[None]:
    """A tap in the grouped kernel's slot for a norm of the experts' outputs, after that norm where there is one."""
    normed: bool = experts.has_post_expert_norm
    norm: Any = experts.post_expert_norm if normed else lambda outputs: outputs
    gate: Any = getattr(experts, "_apply_gate", None)
    handles = [
        experts.register_forward_pre_hook(tap.before_experts),
        router.register_forward_hook(tap.after_router),
    ]
    experts.has_post_expert_norm = True
    experts.__dict__["post_expert_norm"] = lambda outputs: tap(norm(outputs))
    if tap.channels is not None:
        experts.__dict__["_apply_gate"] = lambda projected: tap.activated(gate(projected))
    try:
        yield
    finally:
        experts.has_post_expert_norm = normed
        del experts.__dict__["post_expert_norm"]
        experts.__dict__.pop("_apply_gate", None)
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _around_loop(tap: Tap, experts: Any, router: torch.nn.Module) -> Iterator[None]:
    """A tap around experts that run in a loop of their own, called once with every pair as a token with one slot."""
    import torch

    loop, entered = experts.forward, list[torch.Tensor]()
    gate: Any = getattr(experts, "_apply_gate", None)

    def apply_gate(projected: torch.Tensor) -> torch.Tensor:
        entered.append(gate(projected))
        return entered[-1]

    def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        tap.before_experts(experts, (hidden, index, weights))
        alone = index.reshape(-1, 1)
        tap.experts, tap.order = torch.sort(alone.flatten(), stable=True)  # as the loop goes: by expert, then by token
        outputs = loop(hidden.repeat_interleave(index.shape[1], 0), alone, torch.ones_like(alone, dtype=weights.dtype))
        if entered:
            tap.activated(torch.cat(entered))
            entered.clear()
        tap(outputs[tap.order])
        weighted: torch.Tensor = outputs.view(*index.shape, -1) * weights[..., None]
        return weighted.sum(1).to(hidden.dtype)

    handle = router.register_forward_hook(tap.after_router)
    if tap.channels is not None:
        experts.__dict__["_apply_gate"] = apply_gate
    try:
        with with_forward(experts, forward):
            yield
    finally:
        experts.__dict__.pop("_apply_gate", None)
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

    def forward(routed: torch.Tensor) -> torch.Tensor:
        with entering(experts) as entered:
            output: torch.Tensor = dense(routed)
        for values in entered:
            tap.activated(of_pairs(values))
        tap(of_pairs(output))
        return output

    def of_pairs(values: torch.Tensor) -> torch.Tensor:
        by_expert = values.view(experts.num_experts, -1, values.shape[-1])
        return by_expert[tap.experts, tap.order // tap.index.shape[1]]

    tap.weighs_inputs, dense = True, experts.forward
    handle = router.register_forward_hook(after_router)
    try:
        with with_forward(experts, forward):
            yield
    finally:
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
    buffers: Buffers = {}  # shared, so that it stays in the cache
    modules: list[Any] = [model.get_submodule(name) for name in structure.experts_modules]
    width = width_of(model, structure)
    columns = [functools.partial(down_projections, experts) for experts in modules]
    channels = [
        None if width is None else Channels(topology.num_experts, of_layer, width, buffers) for of_layer in columns
    ]
    taps = [Tap(layer, buffers, one) for layer, one in zip(topology.decoder_layers, channels, strict=True)]
    with contextlib.ExitStack() as stack:
        for at, (experts, router, tap) in enumerate(zip(modules, routers(model, structure), taps, strict=True)):
            if (observed := _way(experts)) is None:
                raise InputError(
                    f"the experts of {topology.family} (decoder layer {tap.decoder_layer}) do not run through the"
                    f" library's grouped kernel (experts implementation {_implementation(experts)}): load the model"
                    " with `load_model`; where that changes nothing, the family is not supported yet"
                )
            stack.enter_context(observed(tap, experts, router))
            tap.change = stack.enter_context(watching(model, structure, at))
            if observed is not _after_dense:
                stack.callback(experts.register_forward_hook(tap.after_experts).remove)
        yield taps
