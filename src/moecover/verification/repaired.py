"""Repaired checkpoints: reads the manifest and both checkpoints, returns the repair and the tensors that are wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecover.checkpoints.manifest import MANIFEST
from moecover.checkpoints.pieces import pieces_by_shard
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError
from moecover.files.gathering import Range, contents
from moecover.files.hashing import HASH, hash_of
from moecover.planning.artifact import Plan
from moecover.repairing.applied import LayerRepair
from moecover.repairing.targets import places_on_disk
from moecover.repairing.tensors import layer_repair, names_of, stored_bytes


@dataclass(frozen=True)
class Repairs:
    """The repair of a checkpoint, read from its files.

    Attributes:
        of_layer: reads the repair of a MoE layer.
        hashes: of the repaired tensors, by name.
        changed: tensors that are neither the original's nor the repaired ones.
    """

    of_layer: Callable[[int], LayerRepair]
    hashes: dict[str, str]
    changed: list[str]


def read_repairs(original: Structure, plan: Plan, cut: Checkpoint, manifest: dict[str, Any]) -> Repairs:
    """Read the repair of a checkpoint, and compare all other tensors with the original's.

    Args:
        original: the structure of the original.
        plan: what was kept.
        cut: the repaired checkpoint.
        manifest: its manifest.

    Raises:
        InputError: the manifest names other tensors than a repair can change.
    """
    where, kept = places_on_disk(original, plan.width), [layer.kept for layer in plan.layers]
    try:
        repair = manifest["repair"]
        names = [names_of(original, *part) for part in zip(where, kept, repair["layers"], strict=True)]
        if {name for of_layer in names for name in of_layer} != repair["tensors"].keys() or repair["hash"] != HASH:
            raise ValueError("it names other tensors than its layers repair")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{cut.path / MANIFEST} is damaged: {error!r}. Prune again") from error

    def read(name: str) -> bytes:
        return stored_bytes(cut.path, cut.tensors[name])

    def of_layer(layer: int) -> LayerRepair:
        return layer_repair(original, where[layer], plan, layer, repair["layers"][layer], read)

    hashes: dict[str, str] = repair["tensors"]
    return Repairs(of_layer, hashes, changed_tensors(original, plan, cut, hashes, mtp=manifest.get("mtp", "drop")))


def changed_tensors(
    structure: Structure, plan: Plan, cut: Checkpoint, hashes: Mapping[str, str], *, mtp: str
) -> list[str]:
    """Names of the tensors of a repaired checkpoint that are neither the original's bytes nor have the recorded hash.

    Args:
        structure: the original.
        plan: what was kept.
        cut: the repaired checkpoint.
        hashes: of the repaired tensors, by name.
        mtp: see `pruning.writer.prune`.
    """
    whole = plan.with_mtp if mtp == "prune" else plan
    shards = pieces_by_shard(structure, whole.kept, channels=whole.channels, mtp=mtp)
    expected = {p.name: (shard, p) for shard, ps in shards.items() for p in ps}
    found = [*expected.keys() ^ cut.tensors.keys(), *hashes.keys() - expected.keys()]
    for name in expected.keys() & cut.tensors.keys():
        there, (shard, one) = cut.tensors[name], expected[name]
        if (there.dtype, there.shape) != (one.dtype, one.shape):
            found.append(name)
        elif name in hashes:
            found += [name] * (hash_of(stored_bytes(cut.path, there)) != hashes[name])
        elif not _same_bytes(structure.checkpoint.path / shard, one.ranges, cut.path / there.shard, there.start):
            found.append(name)
    return sorted(set(found))


def _same_bytes(one: Path, ranges: Sequence[Range], other: Path, start: int) -> bool:
    """Whether ranges of a file are what another file holds from ``start`` on."""
    with one.open("rb", buffering=0) as first, other.open("rb") as second:
        second.seek(start)
        return all(second.read(len(view)) == view for part in ranges for view in contents(first, part))
