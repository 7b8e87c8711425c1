"""The tensors of a pruned checkpoint that a repair changes: names, bytes, and a layer's repair read from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from moecover.checkpoints.header import TensorEntry
from moecover.checkpoints.pieces import piece, thinning
from moecover.checkpoints.structure import Structure
from moecover.planning.artifact import Plan
from moecover.repairing.applied import LayerRepair
from moecover.repairing.block_tensors import Stored, from_disk, names_in, original_bytes, to_disk
from moecover.repairing.solver import Fit
from moecover.repairing.targets import Place

if TYPE_CHECKING:
    import torch


class LayerRow(TypedDict):
    """The repair of one MoE layer as the manifest records it.

    Attributes:
        decoder_layer: its index.
        experts: ids in the original of the experts whose down projections were refitted in closed form.
        shared: whether that of the shared expert was.
        penalties: see `Fit.penalties`.
        before: squared error as a share of the squared output without repair, by corpus.
        after: the same with repair.
        kept: why other experts were not refitted, by name.
        parameters: names in the model of all parameters that changed, where these are not down projections alone; left
            out otherwise. Of the experts those changed that were refitted or took others in, with ``held`` all.
        held: see `refit.Refitted`; left out where gradient steps did not run or did not help.
        merged: by kept expert, ids of those that were merged into it; left out where none was.
    """

    decoder_layer: int
    experts: list[int]
    shared: bool
    penalties: dict[str, float]
    before: dict[str, float]
    after: dict[str, float]
    kept: dict[str, str]
    parameters: NotRequired[list[str]]
    held: NotRequired[list[float]]
    merged: NotRequired[dict[str, list[int]]]


def layer_row(repair: LayerRepair, corpora: Sequence[str]) -> LayerRow:
    """The record of a layer's repair.

    Args:
        repair: of the layer.
        corpora: names of the calibration corpora.
    """
    row: LayerRow = {
        "decoder_layer": repair.decoder_layer,
        "experts": sorted(repair.experts),
        "shared": repair.shared is not None,
        "penalties": repair.fit.penalties,
        "before": dict(zip(corpora, repair.fit.before, strict=True)),
        "after": dict(zip(corpora, repair.fit.after, strict=True)),
        "kept": repair.fit.kept,
    }
    if repair.parameters:
        row["parameters"] = sorted(repair.parameters)
    if repair.held is not None:
        row["held"] = list(repair.held)
    if repair.merged:
        row["merged"] = {str(centre): list(others) for centre, others in repair.merged.items()}
    return row


def stored_bytes(folder: Path, entry: TensorEntry) -> bytes:
    """The bytes of a tensor on disk."""
    with (folder / entry.shard).open("rb") as file:
        file.seek(entry.start)
        return file.read(entry.num_bytes)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in memory."""
    import torch

    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _tensor(content: bytes, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(content), dtype=getattr(torch, dtype)).view(*shape)


def names_of(structure: Structure, place: Place, kept: Sequence[int], row: LayerRow) -> dict[str, list[int]]:
    """The tensors of the output that a layer's repair changed.

    Args:
        structure: the original.
        place: of the layer.
        kept: ids of its kept experts, ascending.
        row: what was repaired.

    Returns:
        By name, the refitted experts whose down projections are in the tensor.

    Raises:
        KeyError: a refitted expert is not kept, or a refitted parameter is not the block's.
    """
    found: dict[str, list[int]] = {}
    for expert in row["experts"]:
        name = place.experts[expert if len(place.experts) > 1 else 0]
        there = piece(structure.checkpoint.tensors[name], structure.tensors[name], list(kept))
        if there is None:
            raise KeyError(f"expert {expert} of {name} is not kept")
        found.setdefault(there.name, []).append(expert)
    if row["shared"] and place.shared is not None:
        found[place.shared[1]] = []
    for parameter in row.get("parameters", []):
        for name in names_in(structure, kept, _changed(row, _rows(place, parameter))):
            found.setdefault(name, [])
    return found


def _changed(row: LayerRow, stored: Sequence[Stored]) -> list[Stored]:
    """Those tensors on disk of a parameter that a repair changed: not those of experts that it left as they were."""
    if "held" in row:
        return list(stored)
    changed = {*row["experts"], *map(int, row.get("merged", {}))}
    return [one for one in stored if one.expert is None or one.expert in changed]


def _rows(place: Place, parameter: str) -> Sequence[Stored]:
    """The tensors on disk of a parameter of the block.

    Raises:
        KeyError: it is none of the block's.
    """
    if isinstance(place.parameters, str):
        raise KeyError(place.parameters)
    return place.parameters[parameter]


def layer_repair(
    structure: Structure, place: Place, plan: Plan, layer: int, row: LayerRow, read: Callable[[str], bytes]
) -> LayerRepair:
    """The repair of a layer from tensors of the output.

    Args:
        structure: the original.
        place: of the layer.
        plan: what is kept.
        layer: its index among the MoE layers.
        row: what was repaired.
        read: returns the bytes of a tensor of the output by its name.
    """
    kept = plan.layers[layer].kept
    hidden, stacked = structure.topology.hidden_size, len(place.experts) == 1
    experts, shared = {}, None

    def tensor(name: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        return _tensor(read(name), dtype, shape)

    parameters = {
        parameter: from_disk(
            structure, plan, layer, _rows(place, parameter), _changed(row, _rows(place, parameter)), tensor
        )
        for parameter in row.get("parameters", [])
    }
    for name, ids in names_of(structure, place, kept, row).items() if not parameters else ():
        if not ids and place.shared is not None:
            shared = place.shared[0], _tensor(read(name), place.dtype, (hidden, place.widths[1]))
        elif stacked:
            whole = _tensor(read(name), place.dtype, (len(kept), hidden, place.widths[0]))
            experts.update({expert: whole[kept.index(expert)] for expert in ids})
        else:
            experts[ids[0]] = _tensor(read(name), place.dtype, (hidden, place.widths[0]))
    before, after = list(row["before"].values()), list(row["after"].values())
    fit = Fit({}, before, after, row["penalties"], row["kept"])
    held = (row["held"][0], row["held"][1]) if "held" in row else None
    merged = {int(centre): others for centre, others in row.get("merged", {}).items()}
    return LayerRepair(row["decoder_layer"], experts, shared, fit, parameters, kept, held, merged)


def written_tensors(
    structure: Structure, place: Place, plan: Plan, layer: int, repair: LayerRepair, row: LayerRow
) -> dict[str, torch.Tensor]:
    """The tensors of the output that a layer's repair changes, as they are written; arguments as in `layer_repair`."""
    found, kept = dict[str, "torch.Tensor"](), plan.layers[layer].kept
    for parameter, values in repair.parameters.items():
        found |= to_disk(structure, plan, layer, _changed(row, _rows(place, parameter)), values)
    if repair.parameters:
        return found
    for name, ids in names_of(structure, place, kept, row).items():
        if not ids:
            assert repair.shared is not None
            found[name] = repair.shared[1].cpu().contiguous()
        elif len(place.experts) > 1:
            found[name] = repair.experts[ids[0]].cpu().contiguous()
        else:
            found[name] = _stacked(structure, place, plan, kept, repair)
    return found


def _stacked(structure: Structure, place: Place, plan: Plan, kept: Sequence[int], repair: LayerRepair) -> torch.Tensor:
    """The kept experts in one tensor, those that were not refitted from the original's file."""
    import torch

    name = place.experts[0]
    cut = piece(
        structure.checkpoint.tensors[name],
        structure.tensors[name],
        list(kept),
        thin=thinning(structure, plan.channels),
    )
    assert cut is not None
    originals = original_bytes(structure, name, cut)
    parts = [
        repair.experts[expert].cpu() if expert in repair.experts else _tensor(content, place.dtype, cut.shape[1:])
        for expert, content in zip(kept, originals, strict=True)
    ]
    return torch.stack(parts)
