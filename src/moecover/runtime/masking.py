"""The model as if only some experts were there: reads a live model and the ids that stay, changes the routers for a while.

A masked model is the original whose routers are cut to the kept experts: what the pruned checkpoint computes, with no
checkpoint written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.structure import Structure
from moecover.runtime.loading import routers

if TYPE_CHECKING:
    import torch


def router_tensors(structure: Structure, layer: int) -> dict[str, int]:
    """Expert-dependent parameters and buffers of a MoE layer outside its experts, with their axis."""
    block = structure.experts_modules[layer].rpartition(".")[0] + "."
    experts = structure.experts_modules[layer] + "."
    return {k: axis for k, axis in structure.parameters.items() if k.startswith(block) and not k.startswith(experts)}


@contextlib.contextmanager
def masked_layer(
    model: torch.nn.Module, structure: Structure, router: torch.nn.Module, layer: int, kept: Sequence[int]
) -> Iterator[None]:
    """One MoE layer as if only ``kept`` (ascending) were there; the block's end restores it.

    Every expert-dependent tensor of the router is cut to the kept experts and the selected ids are led back to the
    original experts, so whatever the router computes (softmax, sigmoid, bias, top-k) is computed over the kept ones
    only. Equal to the original with the dropped experts' router logits at minus infinity.
    """
    import torch

    undo: list[Callable[[], None]] = []
    ids = torch.tensor(list(kept), device=next(router.parameters()).device)
    owners = {id(router): router}
    try:
        for key, axis in router_tensors(structure, layer).items():
            owner_name, _, leaf = key.rpartition(".")
            owner = model.get_submodule(owner_name)
            owners[id(owner)] = owner
            table = owner._parameters if leaf in owner._parameters else owner._buffers
            whole = table[leaf]
            assert whole is not None
            tail = torch.arange(structure.topology.num_experts, whole.shape[axis], device=ids.device)
            cut: Any = whole.detach().index_select(axis, torch.cat([ids, tail]))
            table[leaf] = torch.nn.Parameter(cut, requires_grad=False) if table is owner._parameters else cut
            undo.append(lambda table=table, leaf=leaf, whole=whole: table.__setitem__(leaf, whole))  # type: ignore[misc]
        for owner in owners.values():
            for name, value in list(vars(owner).items()):
                if "expert" in name and type(value) is int and value == structure.topology.num_experts:
                    setattr(owner, name, len(ids))
                    undo.append(lambda owner=owner, name=name, value=value: setattr(owner, name, value))  # type: ignore[misc]

        def to_original(module: Any, args: Any, output: Any) -> Any:
            if not any(torch.is_tensor(o) and not o.is_floating_point() for o in output):  # scores and logits of all
                scores, logits = output
                shape = (len(scores), structure.topology.num_experts)
                whole = scores.new_zeros(shape), logits.new_full(shape, -torch.inf)
                return tuple(w.index_copy(1, ids, o) for w, o in zip(whole, output, strict=True))
            return tuple(ids[o] if torch.is_tensor(o) and not o.is_floating_point() else o for o in output)

        undo.append(router.register_forward_hook(to_original).remove)
        yield
    finally:
        for restore in reversed(undo):
            restore()


def masked_layers(
    model: torch.nn.Module, structure: Structure, kept: Sequence[Sequence[int]]
) -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """A context for every decoder layer, in which it is as if only the kept experts were there; see `streaming.run`.

    Args:
        model: the live model.
        structure: its checkpoint.
        kept: ids of the kept experts of every MoE layer, ascending.
    """
    modules = routers(model, structure)
    layer_of = {number: layer for layer, number in enumerate(structure.topology.decoder_layers)}

    def within(number: int) -> contextlib.AbstractContextManager[None]:
        layer = layer_of.get(number)
        if layer is None:
            return contextlib.nullcontext()
        return masked_layer(model, structure, modules[layer], layer, kept[layer])

    return within


@contextlib.contextmanager
def masked(model: torch.nn.Module, structure: Structure, kept: Sequence[Sequence[int]]) -> Iterator[torch.nn.Module]:
    """The model as if only the kept experts were there, in every layer; the block's end restores it.

    Args:
        model: the live model.
        structure: its checkpoint.
        kept: ids of the kept experts of every MoE layer, ascending.
    """
    within = masked_layers(model, structure, kept)
    with contextlib.ExitStack() as stack:
        for number in structure.topology.decoder_layers:
            stack.enter_context(within(number))
        yield model
