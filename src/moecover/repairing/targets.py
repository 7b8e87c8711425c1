"""Which down projections a repair refits and where they are stored: reads a checkpoint's names and its model class.

No table of families: the experts hold them stacked, the shared expert is the one linear module of the block that ends
at the hidden size, and the library's own conversion mapping leads to the tensors on disk. A family of another form is
refused, with the reason. The model may be on ``meta``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.model_class import build_on_meta
from moecover.checkpoints.names import read_names
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, arg
from moecover.repairing.block_tensors import Parameters, block_parameters
from moecover.repairing.solver import REFIT
from moecover.runtime.shards import TORCH_NAMES

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """The down projections of one MoE layer.

    Attributes:
        experts: names on disk, one for every expert in the original, or one for all of them, stacked along axis 0.
        shared: the shared expert's, its name in the model and the one on disk; None where there is no such expert.
        widths: of an expert and of the shared one (0 where there is none).
        dtype: in which they are stored, by torch's name.
        parameters: where all parameters of the block are stored; in words, why that is not known.
    """

    experts: tuple[str, ...]
    shared: tuple[str, str] | None
    widths: tuple[int, int]
    dtype: str
    parameters: Parameters | str


def refused(structure: Structure, reason: str) -> InputError:
    """The error for a family that can neither be merged nor repaired."""
    return InputError(
        f"{arg('merge')} and {arg('repair')} do not run on {structure.topology.family}: {reason}. "
        f"Use {arg('merge', 'none')} and {arg('repair', 'none')}"
    )


def check_stored(structure: Structure) -> None:
    """Refuse, from the headers alone, experts that cannot be repaired.

    Raises:
        InputError: they are quantised, or layers need the ids of the tokens, which a repair does not pass on.
    """
    if structure.tables:
        raise refused(structure, "its blocks are called with token ids beside the hidden states")
    if structure.quantised:
        raise refused(
            structure,
            f"its experts are quantised ({structure.quantised}), a refitted weight would have to be quantised again; "
            "repair the original that it was made from",
        )


def check_dtype(structure: Structure, where: Sequence[Place], dtype: str) -> None:
    """Refuse to refit weights in a dtype that cannot represent the stored ones.

    Args:
        structure: the checkpoint.
        where: from `places`.
        dtype: of the model, by torch's name; ``auto`` for the one that the configuration names.

    Raises:
        InputError: it is narrower than the stored one.
    """
    import torch

    if dtype == "auto":
        configs = structure.checkpoint.text_config, structure.checkpoint.config
        named = (c[k] for c in configs for k in ("dtype", "torch_dtype") if isinstance(c.get(k), str))
        dtype = next(named, where[0].dtype)
    for place in where:
        kind = getattr(torch, dtype)
        if torch.promote_types(kind, getattr(torch, place.dtype)) != kind:
            raise InputError(
                f"{arg('repair')} refits weights that are stored in {place.dtype}, which a model in {dtype} does not "
                f"hold. Give {arg('dtype', 'float32')}"
            )


def check_understood(structure: Structure, where: Sequence[Place], kind: str) -> None:
    """Refuse a kind of repair that a family's blocks do not allow.

    Raises:
        InputError: ``refit``, of parameters that are not understood.
    """
    for place in where if kind == REFIT else ():
        if isinstance(place.parameters, str):
            raise InputError(
                f"{arg('repair', REFIT)} does not run on {structure.topology.family}: {place.parameters}. "
                f"Use {arg('repair', 'ridge')}"
            )


def places(structure: Structure, model: torch.nn.Module) -> list[Place]:
    """Where the down projections of every MoE layer are stored.

    Raises:
        InputError: quantised experts, experts of another form than down projection x activation, or weights that are
            stored in another form than the model's.
    """
    check_stored(structure)
    stored = _Stored(structure, model)
    return [_place(structure, model, module, stored) for module in structure.experts_modules]


def places_on_disk(structure: Structure, width: int | None = None) -> list[Place]:
    """`places` from the configuration and the headers alone, before anything is loaded; see `thinned` for the width.

    Raises:
        InputError: the model cannot be repaired; says why.
    """
    found = places(structure, build_on_meta(structure.checkpoint.config, structure.checkpoint.name))
    return thinned(structure, found, width)


def thinned(structure: Structure, where: Sequence[Place], width: int | None) -> list[Place]:
    """`places` in a checkpoint whose experts keep some channels only.

    Args:
        structure: the original.
        where: its places.
        width: channels that are kept of every expert; None for all.
    """
    if width is None or isinstance(structure.width, str):
        return list(where)
    padding = structure.width.padding(width)
    return [replace(place, widths=(width, place.widths[1] + padding)) for place in where]


class _Stored:
    """The tensors on disk by the parameter that they fill."""

    def __init__(self, structure: Structure, model: torch.nn.Module) -> None:
        self._structure = structure
        self._destinations = read_names(structure.checkpoint, model).destinations
        self._keys: dict[str, list[str]] = {}
        for key, destination in self._destinations.items():
            self._keys.setdefault(destination.parameter, []).append(key)

    def of_block(self, model: torch.nn.Module, module: str) -> Parameters | str:
        """Where all parameters of a block are stored; see `block_parameters`."""
        return block_parameters(self._structure, model, module, self._keys, self._destinations)

    def tensors(self, parameter: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The tensors that fill a parameter as they are: one, or one for every index of its first axis.

        Raises:
            InputError: they are stored in another form.
        """
        keys = self._keys.get(parameter, [])
        shapes = {self._structure.checkpoint.tensors[key].shape for key in keys}
        converters = [self._destinations[key].converter for key in keys]
        if all(converter is None for converter in converters):
            fits = len(keys) == 1 and shapes == {shape}
        else:
            names = [[type(o).__name__ for o in c.operations] if c is not None else [] for c in converters]
            fits = all(n == ["MergeModulelist"] for n in names) and len(keys) == shape[0] and shapes == {shape[1:]}
        if not fits:
            raise refused(self._structure, f"{parameter} is not stored as it is used")
        return tuple(keys)


def _place(structure: Structure, model: torch.nn.Module, module: str, stored: _Stored) -> Place:
    """The down projections of one MoE layer, by the name of its experts module."""
    import torch

    experts: Any = model.get_submodule(module)
    down = getattr(experts, "down_proj", None)
    if not isinstance(down, torch.nn.Parameter) or not hasattr(experts, "has_post_expert_norm"):
        raise refused(structure, "its experts hold no stacked down projection")
    if experts.has_bias or experts.is_transposed or experts.has_post_expert_norm:
        raise refused(structure, "its experts have biases, a norm or transposed weights")
    disk = stored.tensors(f"{module}.down_proj", tuple(down.shape))
    shared, width = None, 0
    if (linear := _shared(structure, model, module, down.shape[1])) is not None:
        shape = tuple(model.get_parameter(linear).shape)
        shared, width = (linear, stored.tensors(linear, shape)[0]), shape[1]
    dtypes = {structure.checkpoint.tensors[key].dtype for key in (*disk, *(shared or ())[1:])}
    if len(dtypes) > 1:
        raise refused(structure, f"the down projections of a layer are stored as {' and '.join(sorted(dtypes))}")
    return Place(disk, shared, (int(down.shape[2]), width), TORCH_NAMES[dtypes.pop()], stored.of_block(model, module))


def _shared(structure: Structure, model: torch.nn.Module, module: str, hidden_size: int) -> str | None:
    """The shared expert's down projection: the linear module beside the experts that ends at the hidden size.

    Where the shared expert is as wide as the model, so do its other projections; then the experts' name for it decides.
    """
    import torch

    name = module.rpartition(".")[0]
    inside = {id(m) for m in model.get_submodule(module).modules()}
    linear = [
        f"{name}.{key}.weight"
        for key, m in model.get_submodule(name).named_modules()
        if isinstance(m, torch.nn.Linear) and id(m) not in inside and m.out_features == hidden_size
    ]
    if len(linear) > 1:
        linear = [one for one in linear if one.endswith(".down_proj.weight")] or linear
    if len(linear) > 1:
        raise refused(
            structure, f"{len(linear)} modules beside the experts end at the hidden size, at most one is supported"
        )
    return linear[0] if linear else None
