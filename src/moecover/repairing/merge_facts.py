"""Statistics of a live MoE layer that a merge looks at: runs the layer's router and its experts on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moecover.merging.facts import LayerFacts
from moecover.merging.method import GATED, OUTPUTS, ROUTER, SALIENCY
from moecover.repairing.blocks import activations
from moecover.repairing.sums import CHUNK
from moecover.repairing.targets import refused
from moecover.runtime.finite import not_finite
from moecover.runtime.forwards import with_forward
from moecover.runtime.masking import router_tensors

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.structure import Structure
    from moecover.repairing.parts import Part


@dataclass(frozen=True)
class Called:
    """What a layer's experts are called with over the tokens of all batches.

    Attributes:
        hidden: ``[token, hidden]``.
        experts: of every token, int64 ``[token, slot]``.
        weights: of these, ``[token, slot]``.
        logits: of the router, float32 ``[token, expert]``; without rows where no router matrix was given.
    """

    hidden: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor

    def activated(self, experts: Any, expert: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """What enters an expert's down projection for all tokens, `CHUNK` at a time, ``[token, width]``."""
        for at in range(0, len(self.hidden), CHUNK):
            some = slice(at, at + CHUNK)
            yield some, activations(experts, expert, self.hidden[some])


def router_matrix(model: torch.nn.Module, structure: Structure, layer: int) -> torch.Tensor:
    """The matrix that gives the router logits, ``[expert, hidden]``.

    Raises:
        InputError: there is not exactly one.
    """
    topology, parameters = structure.topology, dict(model.named_parameters())
    names = [name for name, axis in router_tensors(structure, layer).items() if axis == 0 and name in parameters]
    found = [parameters[name].data for name in names if parameters[name].dim() == 2]
    if len(found) != 1 or found[0].shape[1] != topology.hidden_size:
        raise refused(structure, "its router is no single matrix")
    return found[0][: topology.num_experts]


def called_with(
    structure: Structure,
    experts: Any,
    router: torch.nn.Module,
    matrix: torch.Tensor | None,
    forward: Callable[[torch.Tensor], torch.Tensor],
    arrived: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
) -> Called:
    """Run a block over all batches without its experts.

    Args:
        structure: the checkpoint.
        experts: the experts module.
        router: the module that chooses among them.
        matrix: of the router logits, see `router_matrix`; None where they are not asked for.
        forward: of the block.
        arrived: the block's input in every batch.
        masks: of every batch, bool ``[token]``, False for padding.

    Raises:
        InputError: the experts are called with something else than hidden states, experts and weights.
    """
    import torch

    seen, scored = list[tuple["torch.Tensor", ...]](), list["torch.Tensor"]()

    def take(*given: torch.Tensor) -> torch.Tensor:
        if len(given) != 3:
            raise refused(structure, "its experts are not called with hidden states, experts and weights")
        seen.append(given)
        return torch.zeros_like(given[0])

    def before_router(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if matrix is not None:
            scored.append(torch.nn.functional.linear(given[0].flatten(0, -2).float(), matrix.float()))

    parts: list[tuple[torch.Tensor, ...]] = []
    handle = router.register_forward_pre_hook(before_router)
    try:
        with with_forward(experts, take):
            for batch, mask in zip(arrived, masks, strict=True):
                forward(batch)
                hidden, chosen, weights = seen.pop()
                logits = scored.pop() if scored else hidden.new_zeros(len(hidden), 0)
                parts.append((hidden[mask], chosen[mask], weights[mask], logits[mask]))
    finally:
        handle.remove()
    return Called(*(torch.cat(one) for one in zip(*parts, strict=True)))


def layer_facts(experts: Any, called: Called, part: Part, kept: Sequence[int], needs: frozenset[str]) -> LayerFacts:
    """The statistics that a merge asks for, over the tokens of all processes.

    Args:
        experts: the experts module, all experts in use.
        called: what it is called with in this process.
        part: the tokens among those of all processes.
        kept: ids of the kept experts, ascending.
        needs: see `Merge.needs`.

    Raises:
        InputError: a number is not finite.
    """
    import torch

    number = int(experts.down_proj.shape[0])
    counts = part.total(torch.bincount(called.experts.flatten(), minlength=number).double())
    none = counts.new_zeros(0)
    saliency = part.total(_weighted_norms(experts, called)) / counts.clamp(min=1) if SALIENCY in needs else none
    router = _cosines(part.total(_products(called.logits))) if ROUTER in needs else none
    outputs = _mean_outputs(experts, called, part, gated=False) if OUTPUTS in needs else none
    gated = _mean_outputs(experts, called, part, gated=True) if GATED in needs else none
    arrays = (one.cpu().numpy() for one in (counts, saliency, router, outputs, gated))
    found = LayerFacts(tuple(kept), *arrays)
    if not found.finite():
        raise not_finite("", "the experts' outputs or the router's logits are")
    return found


def activation_cosines(experts: Any, called: Called, part: Part, one: int, other: int) -> torch.Tensor:
    """Cosine between the activations of two experts over all tokens, routed or not, float64 ``[channel, channel]``."""
    import torch

    width = int(experts.down_proj.shape[2])
    products = torch.zeros(width, width, dtype=torch.float64, device=called.hidden.device)
    squares = products.new_zeros(2, width)
    for (_, a), (_, b) in zip(called.activated(experts, one), called.activated(experts, other), strict=True):
        products += a.float().T @ b.float()
        squares += torch.stack([a.double().square().sum(0), b.double().square().sum(0)])
    norms = part.total(squares).sqrt()
    return part.total(products) / (norms[0][:, None] * norms[1]).clamp(min=torch.finfo(torch.float64).tiny)


def _weighted_norms(experts: Any, called: Called) -> torch.Tensor:
    """Sums of routing weight times norm of the output over an expert's tokens, float64 ``[expert]``."""
    import torch

    found = []
    for expert in range(int(experts.down_proj.shape[0])):
        token, slot = (called.experts == expert).nonzero(as_tuple=True)
        given = activations(experts, expert, called.hidden[token])
        norms = torch.nn.functional.linear(given, experts.down_proj[expert]).double().norm(dim=1)
        found.append((norms * called.weights[token, slot].double()).sum())
    return torch.stack(found)


def _products(logits: torch.Tensor) -> torch.Tensor:
    """Products of the columns, float64 ``[column, column]``."""
    import torch

    number = logits.shape[1]
    found = torch.zeros(number, number, dtype=torch.float64, device=logits.device)
    for rows in torch.split(logits, CHUNK):
        found += rows.double().T @ rows.double()
    return found


def _cosines(products: torch.Tensor) -> torch.Tensor:
    """Cosines of vectors from their products; 0 with a vector of zeros."""
    import torch

    norms = products.diagonal().sqrt()
    return products / (norms[:, None] * norms).clamp(min=torch.finfo(torch.float64).tiny)


def _mean_outputs(experts: Any, called: Called, part: Part, *, gated: bool) -> torch.Tensor:
    """Mean output of every expert over all tokens, routed or not, float64 ``[expert, hidden]``.

    A down projection is linear: the mean of its outputs is its output for the mean of what enters it.

    Args:
        experts: the experts module.
        called: what it is called with.
        part: the tokens among those of all processes.
        gated: outputs are multiplied by the softmax of the router logits first.
    """
    import torch

    number, _, width = experts.down_proj.shape
    sums = torch.zeros(number, width, dtype=torch.float64, device=called.hidden.device)
    gates = called.logits.double().softmax(1) if gated else None
    for expert in range(number):
        for some, given in called.activated(experts, expert):
            sums[expert] += given.double().sum(0) if gates is None else gates[some, expert] @ given.double()
    means = part.total(sums) / len(part.everyone)
    return torch.stack([experts.down_proj[expert].double() @ means[expert] for expert in range(number)])
