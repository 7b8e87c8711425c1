"""All parameters of a MoE block as tensors on disk, both ways: for a repair that changes more than down projections.

Reads names and the library's own conversion mapping. Parameters that are stored as they are, one tensor an expert, or
as equal parts of these (gate and up beside each other) are understood; a block with any other is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.names import natural
from moecover.checkpoints.pieces import Piece, piece, thinning
from moecover.files.gathering import contents
from moecover.runtime.shards import TORCH_NAMES

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.names import Destination
    from moecover.checkpoints.structure import Structure
    from moecover.planning.artifact import Plan


@dataclass(frozen=True)
class Stored:
    """A tensor on disk that fills a parameter or a part of it.

    Attributes:
        name: of the tensor in the original.
        expert: whose it is; None where it holds those of all experts, or of none.
        part: which of the equal parts that the parameter consists of, along the axis behind the experts'.
        parts: their number.
        dtype: of the tensor, by torch's name.
    """

    name: str
    expert: int | None
    part: int
    parts: int
    dtype: str


Parameters = Mapping[str, Sequence[Stored]]  # by a parameter's name in the model


def block_parameters(
    structure: Structure,
    model: torch.nn.Module,
    experts_module: str,
    found: Mapping[str, Sequence[str]],
    to: Mapping[str, Destination],
) -> Parameters | str:
    """The tensors on disk of every floating-point parameter of a MoE block; in words, why they are not understood.

    Args:
        structure: the original.
        model: of its class, on any device.
        experts_module: dotted name of the block's experts module.
        found: names of the tensors on disk by the parameter that they fill.
        to: their destinations.
    """
    block, stored = experts_module.rpartition(".")[0], dict[str, list[Stored]]()
    for leaf, parameter in model.get_submodule(block).named_parameters():
        name = f"{block}.{leaf}"
        if not parameter.is_floating_point():
            continue
        rows = _rows(structure, name, tuple(parameter.shape), found.get(name, []), to)
        if rows is None or (name.startswith(f"{experts_module}.") and structure.parameters.get(name) != 0):
            return f"{name} is not stored as it is used"
        stored[name] = rows
    return stored


def _rows(
    structure: Structure, parameter: str, shape: tuple[int, ...], keys: Sequence[str], to: Mapping[str, Destination]
) -> list[Stored] | None:
    """The tensors that fill a parameter; None where their form is another one."""
    tensors, converters = structure.checkpoint.tensors, [to[key].converter for key in keys]
    if any(tensors[key].dtype not in TORCH_NAMES for key in keys):
        return None
    if all(one is None for one in converters):
        if len(keys) != 1 or tensors[keys[0]].shape != shape:
            return None
        return [Stored(keys[0], None, 0, 1, TORCH_NAMES[tensors[keys[0]].dtype])]
    operations: list[Any] = list(converters[0].operations) if converters[0] is not None else []
    patterns = list(converters[0].source_patterns) if converters[0] is not None else []
    kinds = [type(one).__name__ for one in operations]
    if any(one is not converters[0] for one in converters) or kinds not in (
        ["MergeModulelist"],
        ["MergeModulelist", "Concatenate"],
    ):
        return None
    if (len(kinds) == 2 and operations[1].dim != 1) or (len(kinds) == 1 and len(patterns) > 1):
        return None
    rows = []
    for part, pattern in enumerate(patterns):
        ordered = sorted((key for key in keys if to[key].pattern == pattern), key=natural)
        if len(ordered) != shape[0] or shape[1] % len(patterns):
            return None
        wanted = (shape[1] // len(patterns), *shape[2:])
        if any(tensors[key].shape != wanted for key in ordered):
            return None
        rows += [
            Stored(key, expert, part, len(patterns), TORCH_NAMES[tensors[key].dtype])
            for expert, key in enumerate(ordered)
        ]
    return rows


def _cut(structure: Structure, plan: Plan, kept: Sequence[int], stored: Stored) -> Piece | None:
    """What remains of a tensor on disk."""
    entry, row = structure.checkpoint.tensors[stored.name], structure.tensors.get(stored.name)
    return piece(entry, row, list(kept), thin=thinning(structure, plan.channels))


def names_in(structure: Structure, kept: Sequence[int], rows: Sequence[Stored]) -> list[str]:
    """The tensors of the output that a parameter fills.

    Args:
        structure: the original.
        kept: ids of the layer's kept experts, ascending.
        rows: the tensors on disk of the parameter.
    """
    tensors = structure.checkpoint.tensors
    cuts = (piece(tensors[row.name], structure.tensors.get(row.name), list(kept)) for row in rows)
    return [cut.name for cut in cuts if cut is not None]


def to_disk(
    structure: Structure, plan: Plan, layer: int, rows: Sequence[Stored], values: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The tensors of the output from the values of a parameter.

    Args:
        structure: the original.
        plan: what is kept.
        layer: index of the MoE layer.
        rows: the tensors on disk of the parameter.
        values: of the kept experts and channels; the first axis of an experts module's parameter is the kept experts'.
    """
    import torch

    kept, found = plan.layers[layer].kept, {}
    for row in rows:
        if (cut := _cut(structure, plan, kept, row)) is None:
            continue
        value = values if row.expert is None else values[kept.index(row.expert)].chunk(row.parts)[row.part]
        assert tuple(value.shape) == cut.shape, row.name
        found[cut.name] = value.to(getattr(torch, row.dtype)).cpu().contiguous()
    return found


def original_bytes(structure: Structure, name: str, cut: Piece) -> list[bytes]:
    """The original's bytes of what remains of a tensor, range by range."""
    with (structure.checkpoint.path / structure.checkpoint.tensors[name].shard).open("rb", buffering=0) as file:
        return [b"".join(contents(file, part)) for part in cut.ranges]


def from_disk(
    structure: Structure,
    plan: Plan,
    layer: int,
    rows: Sequence[Stored],
    changed: Sequence[Stored],
    read: Callable[[str, str, tuple[int, ...]], torch.Tensor],
) -> torch.Tensor:
    """The values of a parameter from the tensors of the output, the inverse of `to_disk`.

    Args:
        structure: the original.
        plan: what is kept.
        layer: index of the MoE layer.
        rows: the tensors on disk of the parameter.
        changed: those of them that are read from the output, the others from the original.
        read: a tensor of the output by its name, dtype and shape.
    """
    import torch

    kept, tensors = plan.layers[layer].kept, dict[tuple[int | None, int], "torch.Tensor"]()
    for row in rows:
        if (cut := _cut(structure, plan, kept, row)) is None:
            continue
        if row in changed:
            found = read(cut.name, row.dtype, cut.shape)
        else:
            content = bytearray(b"".join(original_bytes(structure, row.name, cut)))
            found = torch.frombuffer(content, dtype=getattr(torch, row.dtype)).view(*cut.shape)
        tensors[row.expert, row.part] = found
    if (None, 0) in tensors:
        return tensors[None, 0]
    parts = range(rows[0].parts)
    return torch.stack([torch.cat([tensors[expert, part] for part in parts]) for expert in kept])
