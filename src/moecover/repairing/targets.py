"""Which down projections of a model a repair refits, and where they lie: reads a checkpoint's names and its model class.

No table of families: the experts hold them stacked, the shared expert is the one linear module of the block that ends
at the hidden size, and the library's own conversion mapping leads to the tensors on disk. A family of another form is
refused, with the reason. The model may be on ``meta``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.names import read_names
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError
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
    """

    experts: tuple[str, ...]
    shared: tuple[str, str] | None
    widths: tuple[int, int]
    dtype: str


def refused(structure: Structure, reason: str) -> InputError:
    """That a family cannot be repaired, and why."""
    return InputError(f"--repair does not run on {structure.topology.family}: {reason}. Use --repair none")


def check_stored(structure: Structure) -> None:
    """Refuse, from the headers alone, experts that cannot be repaired.

    Raises:
        InputError: they are quantised.
    """
    if structure.quantised:
        raise refused(
            structure,
            f"its experts are quantised ({structure.quantised}), a refitted weight would have to be quantised anew; repair the original that it was made from",
        )


def check_dtype(structure: Structure, where: Sequence[Place], dtype: str) -> None:
    """Refuse to refit weights in a dtype that does not hold the stored ones.

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
        dtype = next(
            (c[k] for c in configs for k in ("dtype", "torch_dtype") if isinstance(c.get(k), str)), where[0].dtype
        )
    for place in where:
        kind = getattr(torch, dtype)
        if torch.promote_types(kind, getattr(torch, place.dtype)) != kind:
            raise InputError(
                f"--repair refits weights that are stored in {place.dtype}, which a model in {dtype} does not hold. Give --dtype float32"
            )


def places(structure: Structure, model: torch.nn.Module) -> list[Place]:
    """Where the down projections of every MoE layer lie.

    Raises:
        InputError: quantised experts, experts of another form than down projection x activation, or weights that are
            stored in another form than the model's.
    """
    import torch

    check_stored(structure)
    checkpoint = structure.checkpoint
    stored: dict[str, list[str]] = {}
    destinations = read_names(checkpoint, model).destinations
    for key, destination in destinations.items():
        stored.setdefault(destination.parameter, []).append(key)

    def on_disk(parameter: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The tensors that fill a parameter as they are: one, or one a place of its first axis."""
        keys = stored.get(parameter, [])
        shapes = {checkpoint.tensors[key].shape for key in keys}
        converters = [destinations[key].converter for key in keys]
        plain = all(c is None for c in converters)
        stacked = all(
            c is not None and [type(o).__name__ for o in c.operations] == ["MergeModulelist"] for c in converters
        )
        if (plain and len(keys) == 1 and shapes == {shape}) or (
            stacked and len(keys) == shape[0] and shapes == {shape[1:]}
        ):
            return tuple(keys)
        raise refused(structure, f"{parameter} is not stored as it is used")

    found = []
    for module in structure.experts_modules:
        experts: Any = model.get_submodule(module)
        name = module.rpartition(".")[0]
        block, down = model.get_submodule(name), getattr(experts, "down_proj", None)
        if not isinstance(down, torch.nn.Parameter) or not hasattr(experts, "has_post_expert_norm"):
            raise refused(structure, "its experts hold no stacked down projection")
        if experts.has_bias or experts.is_transposed or experts.has_post_expert_norm:
            raise refused(structure, "its experts have biases, a norm or transposed weights")
        inside = {id(m) for m in experts.modules()}
        linear = [
            f"{name}.{k}.weight"
            for k, m in block.named_modules()
            if isinstance(m, torch.nn.Linear) and id(m) not in inside and m.out_features == down.shape[1]
        ]
        if len(linear) > 1:
            raise refused(
                structure,
                f"{len(linear)} modules beside the experts end at the hidden size, one shared expert is known here",
            )
        disk = on_disk(f"{module}.down_proj", tuple(down.shape))
        shared, width = None, 0
        if linear:
            shape = tuple(model.get_parameter(linear[0]).shape)
            shared, width = (linear[0], on_disk(linear[0], shape)[0]), shape[1]
        dtypes = {checkpoint.tensors[key].dtype for key in (*disk, *(shared or ())[1:])}
        if len(dtypes) > 1:
            raise refused(structure, f"the down projections of a layer are stored as {' and '.join(sorted(dtypes))}")
        found.append(Place(disk, shared, (int(down.shape[2]), width), TORCH_NAMES[dtypes.pop()]))
    return found
