"""The output of a pruned MoE block as a sum: one term per kept expert and one for the shared expert.

No table of families: routing weights are what the experts are called with, the shared expert's factor is read off the
block's own output (`targets` says which module it is). The linear form is compared with the block's output; a family
that it does not reproduce is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.structure import Structure
from moecover.repairing.sums import Block
from moecover.repairing.targets import Place, refused
from moecover.runtime.forwards import with_forward

if TYPE_CHECKING:
    import torch

SHARED = "shared"
# Share of the output's norm that the linear form may miss.
ROUNDING = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


class _Seen:
    """The last call of a MoE block's modules.

    Attributes:
        experts: arguments of the experts module.
        routed: output of the experts module.
        shared: activations that enter the shared expert's down projection, and its output, ``[token, ...]``.
    """

    experts: tuple[torch.Tensor, ...]
    routed: torch.Tensor
    shared: tuple[torch.Tensor, torch.Tensor]


@contextlib.contextmanager
def _watched(experts: torch.nn.Module, shared: torch.nn.Module | None) -> Iterator[_Seen]:
    """Record the calls of the experts module and of the shared down projection."""
    seen = _Seen()

    def before_experts(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.experts = args

    def after_experts(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.routed = output

    def after_shared(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.shared = args[0].flatten(0, -2), output.flatten(0, -2)

    handles = [experts.register_forward_pre_hook(before_experts), experts.register_forward_hook(after_experts)]
    if shared is not None:
        handles.append(shared.register_forward_hook(after_shared))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Terms:
    """What adds to a block's output over the tokens of all batches.

    Attributes:
        called: hidden states, experts and weights that the experts module is called with, one entry a batch.
        beside: activations of the shared expert times its factor, float32 ``[token, width]``.
        first: output for the tokens of the first batch, float64 ``[token, hidden]``.
        missed: squared norm of what the sum does not explain in the output.
        norm: squared norm of the output.
    """

    called: tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]
    beside: torch.Tensor
    first: torch.Tensor
    missed: float = 0.0
    norm: float = 0.0


def output_of(structure: Structure, output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A block's output ``[token, hidden]``.

    Raises:
        InputError: the block returns more than hidden states.
    """
    import torch

    if not isinstance(output, torch.Tensor):
        raise refused(structure, "its block gives more than the hidden states")
    return output.reshape(-1, output.shape[-1])


def blocks_of(
    model: torch.nn.Module,
    structure: Structure,
    layer: int,
    place: Place,
    forward: Callable[[torch.Tensor], torch.Tensor],
    arrived: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    kept: Sequence[int],
) -> list[Block]:
    """All terms of a masked layer's output, over the tokens of all batches without padding.

    Args:
        model: the layer's weights are in memory and masked.
        structure: its checkpoint.
        layer: index of the MoE layer.
        place: its down projections.
        forward: of the MoE block.
        arrived: the block's input in every batch.
        masks: of every batch, bool ``[token]``, False for padding.
        kept: ids of the kept experts.

    Raises:
        InputError: the block's output is something other than the sum.
    """
    import torch

    experts: Any = model.get_submodule(structure.experts_modules[layer])
    terms = _terms(model, structure, experts, place, forward, arrived, masks)
    stored = getattr(torch, place.dtype)
    tokens, experts_of, weight_of = (torch.cat(part) for part in terms.called)
    blocks = []
    for expert in kept:
        token, slot = (experts_of == expert).nonzero(as_tuple=True)
        features = activations(experts, expert, tokens[token]).float() * weight_of[token, slot].float()[:, None]
        blocks.append(Block(str(expert), experts.down_proj.data[expert].to(stored), token, features))
    if place.shared is not None:
        everyone = torch.arange(len(tokens), device=tokens.device)
        blocks.append(Block(SHARED, model.get_parameter(place.shared[0]).data.to(stored), everyone, terms.beside))
    if not _explained(terms, blocks, ROUNDING[str(experts.down_proj.dtype).removeprefix("torch.")]):
        raise refused(structure, "its block adds something else than its experts' outputs and one shared expert's")
    return blocks


def _terms(
    model: torch.nn.Module,
    structure: Structure,
    experts: Any,
    place: Place,
    forward: Callable[[torch.Tensor], torch.Tensor],
    arrived: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
) -> _Terms:
    """Run a block over all batches; the experts run in the first one only, zeros take their place in the others."""
    import torch

    total = sum(int(mask.sum()) for mask in masks)
    beside = torch.empty(total, place.widths[1], device=experts.down_proj.device)
    found, at = _Terms(([], [], []), beside, torch.empty(0)), 0
    shared = model.get_submodule(place.shared[0].removesuffix(".weight")) if place.shared is not None else None
    with contextlib.ExitStack() as zeros, _watched(experts, shared) as seen:
        for number, (batch, mask) in enumerate(zip(arrived, masks, strict=True)):
            output = output_of(structure, forward(batch))[mask].double()
            if len(seen.experts) != 3 or seen.routed.shape != seen.experts[0].shape:
                raise refused(structure, "its experts are not called with hidden states, experts and weights")
            for values, given in zip(found.called, seen.experts, strict=True):
                values.append(given[mask])
            rest = output - seen.routed.reshape(-1, output.shape[-1])[mask].double()
            if shared is not None:
                activated, added = (part[mask] for part in seen.shared)
                added = added.double()
                factor = (rest * added).sum(-1) / added.square().sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
                beside[at : at + len(output)] = activated.float() * factor.float()[:, None]
                rest -= factor[:, None] * added
            found.missed += float(rest.square().sum())
            found.norm += float(output.square().sum())
            at += len(output)
            if number == 0:
                found.first = output
                zeros.enter_context(with_forward(experts, lambda hidden, *others: torch.zeros_like(hidden)))
    return found


def _explained(terms: _Terms, blocks: Sequence[Block], allowed: float) -> bool:
    """Whether the sum of the blocks is the output up to rounding; uses up `_Terms.first`."""
    first = terms.first
    squared = float(first.square().sum())
    for block in blocks:
        rows = block.tokens < len(first)
        first.index_add_(0, block.tokens[rows], (block.features[rows] @ block.weight.float().T).double(), alpha=-1)
    left = float(first.square().sum())
    return bool(terms.missed**0.5 <= allowed * terms.norm**0.5 and left**0.5 <= allowed * squared**0.5)


def activations(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """What enters an expert's down projection, ``[row, width]``, by the experts module's own functions."""
    import torch

    if experts.has_gate:
        activated: torch.Tensor = experts._apply_gate(torch.nn.functional.linear(hidden, experts.gate_up_proj[expert]))
    else:
        activated = experts.act_fn(torch.nn.functional.linear(hidden, experts.up_proj[expert]))
    return activated
