"""Stamps of a checkpoint's weight files, size and modification time: tell whether the weights are still the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moecover.checkpoints.structure import Structure
from moecover.files.atomic import stamp


def stamps(structure: Structure) -> dict[str, list[int]]:
    """Size in bytes and modification time in nanoseconds of every shard, by name."""
    checkpoint = structure.checkpoint
    return {shard: stamp(checkpoint.path / shard) for shard in sorted(checkpoint.shard_metadata)}


def changed_since(structure: Structure, before: Mapping[str, Sequence[int]]) -> str | None:
    """Which weights may differ from those that were profiled, in a sentence; None where none can.

    Args:
        structure: the model now.
        before: its `stamps` when it was profiled; empty where unknown.
    """
    now = stamps(structure)
    if structure.checkpoint.gguf is not None and not now.keys() & before.keys():
        return None  # the plan of another checkpoint, which is what these files are cut by
    changed = [shard for shard, found in now.items() if list(before.get(shard, ())) != found] if before else []
    if not changed:
        return None
    tensors = structure.checkpoint.tensors
    touched = [row for name, row in structure.tensors.items() if row.routed and tensors[name].shard in changed]
    if not touched:
        return None
    layers = sorted({structure.topology.decoder_layers[row.layer] for row in touched})
    more = f" and {len(changed) - 1} more files" if len(changed) > 1 else ""
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
    return (
        f"{changed[0]}{more} of {structure.checkpoint.name} changed, or was copied, since the profile was made: "
        f"{len(touched)} expert tensors of decoder {where} may not be those that were profiled"
    )
