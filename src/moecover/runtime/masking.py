"""A live model that uses some of its experts only: its routers are cut to the kept ones until a block ends.

A masked model computes what the pruned checkpoint computes, without a checkpoint being written.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.id_tables import check_ids, remapped
from moecover.checkpoints.pieces import Channels
from moecover.checkpoints.structure import Structure
from moecover.runtime.loading import device_of, routers
from moecover.runtime.running import Within
from moecover.runtime.thinning import thinned_layer

if TYPE_CHECKING:
    import torch


def router_tensors(structure: Structure, layer: int) -> dict[str, int]:
    """Expert-dependent parameters and buffers of a MoE layer outside its experts, with their axis."""
    block = structure.experts_modules[layer].rpartition(".")[0] + "."
    experts = structure.experts_modules[layer] + "."
    return {k: axis for k, axis in structure.parameters.items() if k.startswith(block) and not k.startswith(experts)}


@contextlib.contextmanager
def masked_layer(
    model: torch.nn.Module,
    structure: Structure,
    router: torch.nn.Module,
    layer: int,
    kept: Sequence[int],
    channels: Sequence[Sequence[int]] | None = None,
) -> Iterator[None]:
    """Mask one MoE layer: only the experts ``kept`` are used until the block ends.

    Every expert-dependent tensor of the router is cut to the kept experts and the selected ids are mapped back to the
    original experts, so whatever the router computes (softmax, sigmoid, bias, top-k) is computed over the kept experts
    only. This equals the original with the router logits of the dropped experts at minus infinity. A table of experts
    by token id is rewritten as in the pruned checkpoint.

    Args:
        model: the live model.
        structure: its checkpoint.
        router: the router of the layer, see `routers`.
        layer: index of the MoE layer.
        kept: ids of the kept experts, ascending.
        channels: of each of these, ids of the kept channels, ascending; None for all.
    """
    import torch

    num_experts = structure.topology.num_experts
    ids = torch.tensor(list(kept), device=device_of(router))
    owners = {id(router): router}
    with contextlib.ExitStack() as undo:
        for key, axis in router_tensors(structure, layer).items():
            owner_name, _, leaf = key.rpartition(".")
            owner = model.get_submodule(owner_name)
            owners[id(owner)] = owner
            undo.callback(_cut_tensor(owner, leaf, axis, ids, num_experts))
        for table in structure.tables.values():
            if table.layer == layer:
                undo.callback(_cut_table(model, table.parameter, kept, num_experts))
        for owner in owners.values():
            for name, value in list(vars(owner).items()):
                if "expert" in name and type(value) is int and value == num_experts:
                    setattr(owner, name, len(ids))
                    undo.callback(setattr, owner, name, value)
        undo.callback(router.register_forward_hook(_to_original(ids, num_experts)).remove)
        if channels is not None:
            undo.enter_context(thinned_layer(model, structure, layer, kept, channels))
        yield


def _cut_tensor(
    owner: torch.nn.Module, leaf: str, axis: int, ids: torch.Tensor, num_experts: int
) -> Callable[[], None]:
    """Cut a parameter or buffer to the kept experts; returns the function that restores it."""
    import torch

    table: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    whole: torch.Tensor = table[leaf]
    tail = torch.arange(num_experts, whole.shape[axis], device=ids.device)
    cut = whole.detach().index_select(axis, torch.cat([ids, tail]))
    table[leaf] = torch.nn.Parameter(cut, requires_grad=False) if leaf in owner._parameters else cut
    return functools.partial(table.__setitem__, leaf, whole)


def _cut_table(model: torch.nn.Module, name: str, kept: Sequence[int], num_experts: int) -> Callable[[], None]:
    """Rewrite a table of experts by token id for the kept ones; returns the function that restores it."""
    import torch

    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    tensors: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    whole: torch.Tensor = tensors[leaf]
    table = whole.detach().cpu().numpy()
    check_ids(table, num_experts, name)
    cut = torch.from_numpy(remapped(table, kept, num_experts)).to(whole.device)
    tensors[leaf] = torch.nn.Parameter(cut, requires_grad=False) if leaf in owner._parameters else cut
    return functools.partial(tensors.__setitem__, leaf, whole)


def _to_original(ids: torch.Tensor, num_experts: int) -> Callable[..., tuple[Any, ...]]:
    """A forward hook of a router that maps selected ids, or scores of all experts, back to the original experts."""
    import torch

    def is_index(output: object) -> bool:
        return isinstance(output, torch.Tensor) and not output.is_floating_point()

    def to_original(module: torch.nn.Module, args: object, output: tuple[Any, ...]) -> tuple[Any, ...]:
        if not any(map(is_index, output)):  # scores and logits of all experts
            scores, logits = output
            shape = (len(scores), num_experts)
            whole = scores.new_zeros(shape), logits.new_full(shape, -torch.inf)
            return tuple(w.index_copy(1, ids, o) for w, o in zip(whole, output, strict=True))
        return tuple(ids[o] if is_index(o) else o for o in output)

    return to_original


def masked_layers(
    model: torch.nn.Module, structure: Structure, kept: Sequence[Sequence[int]], channels: Channels | None = None
) -> Within:
    """A function that returns the context in which a decoder layer uses only the kept experts; see `Running.run`.

    Args:
        model: the live model.
        structure: its checkpoint.
        kept: ids of the kept experts of every MoE layer, ascending.
        channels: of these, ids of the kept channels, ascending; None for all.
    """
    modules = routers(model, structure)
    layer_of = {number: layer for layer, number in enumerate(structure.topology.decoder_layers)}

    def within(number: int) -> contextlib.AbstractContextManager[None]:
        layer = layer_of.get(number)
        if layer is None:
            return contextlib.nullcontext()
        stay = None if channels is None else channels[layer]
        return masked_layer(model, structure, modules[layer], layer, kept[layer], stay)

    return within


@contextlib.contextmanager
def masked(
    model: torch.nn.Module, structure: Structure, kept: Sequence[Sequence[int]], channels: Channels | None = None
) -> Iterator[torch.nn.Module]:
    """Mask every MoE layer: the model uses only the kept experts until the block ends.

    Args:
        model: the live model.
        structure: its checkpoint.
        kept: ids of the kept experts of every MoE layer, ascending.
        channels: of these, ids of the kept channels, ascending; None for all. Cut copies of all layers are in memory.
    """
    within = masked_layers(model, structure, kept, channels)
    with contextlib.ExitStack() as stack:
        for number in structure.topology.decoder_layers:
            stack.enter_context(within(number))
        yield model
