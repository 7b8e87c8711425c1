"""A live model that sends every token to fewer experts than config.json says, until a block ends.

Which attributes of which modules follow the number of experts per token is not listed: the model class is built on
torch's ``meta`` device with both numbers, and what differs is set.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.config_edit import (
    TOP_K_KEYS,
    expert_count_keys,
    number,
    top_k_keys,
    with_expert_count,
    with_single_counts,
)
from moecover.checkpoints.model_class import build_on_meta
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, arg
from moecover.runtime.running import Within

if TYPE_CHECKING:
    import torch

Attributes = dict[str, dict[str, int]]  # by module, the attributes that follow the number and their new values


def following(structure: Structure, top_k: int) -> Attributes:
    """The attributes of modules that follow the number of experts per token, with the values that they get."""
    config, name = structure.checkpoint.config, structure.checkpoint.name
    single = with_single_counts(config, expert_count_keys(config))
    keys = top_k_keys(config, structure.topology.top_k)
    before, after = build_on_meta(single, name), build_on_meta(with_expert_count(single, keys, top_k), name)
    found: Attributes = {}
    for (place, one), (_, two) in zip(before.named_modules(), after.named_modules(), strict=True):
        changed = {
            key: new for key, old in vars(one).items() if type(old) is int and old != (new := vars(two).get(key))
        }
        if changed:
            found[place] = {key: value for key, value in changed.items() if type(value) is int}
    return found


def with_top_k(model: torch.nn.Module, structure: Structure, within: Within, top_k: int) -> Within:
    """The contexts of decoder layers in which every token goes to fewer experts; see `Running.run`.

    Args:
        model: the live model.
        structure: its checkpoint.
        within: the contexts that these are added to.
        top_k: experts per token.

    Raises:
        InputError: when a layer runs: its router goes on choosing another number.
    """
    attributes = following(structure, top_k)
    layer_of = {number: layer for layer, number in enumerate(structure.topology.decoder_layers)}

    def inside(place: int) -> contextlib.AbstractContextManager[None]:
        layer = layer_of.get(place)
        around = within(place)
        return around if layer is None else _layer(model, structure, layer, around, attributes, top_k)

    return inside


@contextlib.contextmanager
def _layer(
    model: torch.nn.Module,
    structure: Structure,
    layer: int,
    around: contextlib.AbstractContextManager[None],
    attributes: Attributes,
    top_k: int,
) -> Iterator[None]:
    """One MoE layer, in its context, with another number of experts per token."""
    experts = model.get_submodule(structure.experts_modules[layer])
    block = structure.experts_modules[layer].rpartition(".")[0]
    text: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]  # a class of the library's
    with around, contextlib.ExitStack() as undo:
        for place, values in attributes.items():
            if f"{place}.".startswith(f"{block}."):
                for key, value in values.items():
                    _set(model.get_submodule(place), key, value, undo)
        for key in TOP_K_KEYS:  # some modules read it there in every pass
            old = getattr(text, key, None)
            if number(old) == structure.topology.top_k:
                _set(text, key, [top_k] * len(old) if isinstance(old, list) else top_k, undo)
        check = functools.partial(_check_slots, structure, layer, top_k)
        undo.callback(experts.register_forward_pre_hook(check).remove)
        yield


def _set(owner: Any, key: str, value: object, undo: contextlib.ExitStack) -> None:
    undo.callback(setattr, owner, key, getattr(owner, key))
    setattr(owner, key, value)


def _check_slots(structure: Structure, layer: int, top_k: int, module: object, args: tuple[Any, ...]) -> None:
    """A hook before the experts, whose second argument has the selected experts ``[token, slot]``.

    Raises:
        InputError: as many slots as before.
    """
    slots = args[1].shape[-1] if len(args) > 1 else None
    if slots != top_k:
        where = f"decoder layer {structure.topology.decoder_layers[layer]} of {structure.topology.family}"
        has = "takes no selected experts" if slots is None else f"still gets {slots} experts a token"
        raise InputError(f"{arg('top_k', top_k)}: {where} {has}: it cannot be changed in this family")
