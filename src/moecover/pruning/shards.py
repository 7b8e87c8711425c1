"""The shards of a pruned checkpoint: reads byte ranges of the source's shards, writes safetensors or GGUF files.

Nothing is decoded: a tensor is a name, a dtype, a shape and the byte ranges that hold it (`checkpoints.pieces`).
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moecover.checkpoints.pieces import NOTHING, Piece, coalesced
from moecover.checkpoints.source import Checkpoint
from moecover.errors import MoecoverError
from moecover.files.atomic import stamp
from moecover.files.copying import followed, write_ranges
from moecover.files.resumable import Partial

ALIGNMENT = 8  # bytes: tensor data of a safetensors file starts at a multiple of it


def safetensors_head(pieces: Sequence[Piece], metadata: Mapping[str, str] | None) -> bytes:
    """What precedes the tensor data of a safetensors file: the length of its header and the header, padded with spaces.

    Args:
        pieces: tensors of the file, in order; they lie back to back.
        metadata: the ``__metadata__`` entry; None for none.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for p in pieces:
        header[p.name] = {"dtype": p.dtype, "shape": list(p.shape), "data_offsets": [position, position + p.num_bytes]}
        position += p.num_bytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % ALIGNMENT)
    return struct.pack("<Q", len(raw)) + raw


def write_shard(
    source: Path,
    target: Path,
    pieces: list[Piece],
    head: bytes,
    tell: Callable[[Path | int | None], None],
    advance: Callable[[int], None],
) -> None:
    """Write one file from byte ranges of others.

    Args:
        source: shard that holds the pieces whose own ``file`` is None.
        target: file to write.
        pieces: its tensors, in order.
        head: what precedes the tensor data.
        tell: reports progress to the hashing thread, see `copying.followed`; the caller reports completion.
        advance: called with the number of tensor bytes written since the last call.

    Raises:
        MoecoverError: the source ends early (it changed while it was read).
        OSError: reading or writing failed.
    """
    sizes: list[int] = []

    def written(size: int) -> None:
        if sizes:
            advance(size - sizes.pop())
        else:
            tell(target)
        tell(size)
        sizes.append(size)

    groups = itertools.groupby(pieces, key=lambda p: p.file or source)
    parts = ((file, coalesced(of_file)) for file, of_file in groups)
    write_ranges(target, head, parts, written)


def _changed(shard: Path, partial: Partial) -> bool:
    try:
        return bool(stamp(shard) != partial.inputs[shard.name][:2])
    except OSError:
        return False  # missing, but it may come back


def write_shards(
    checkpoint: Checkpoint,
    shards: Mapping[str, list[Piece]],
    heads: Mapping[str, bytes],
    partial: Partial,
    advance: Callable[[int], None],
    *,
    names: Mapping[str, str] = NOTHING,
) -> None:
    """Write the unfinished shards, in order.

    Args:
        checkpoint: the source; the inputs of ``partial`` hold the stamp of each of its shards under its name.
        shards: tensors of every output shard, by the source's shard.
        heads: what precedes the tensor data, by the source's shard.
        partial: where the shards are written.
        advance: called with the bytes of every chunk written, and of every shard that is there.
        names: of the output's shards, by the source's, where they differ.

    Raises:
        MoecoverError: a shard changed while it was read.
        OSError: reading or writing failed.
    """
    try:
        with followed(partial.finish) as tell:
            for shard, pieces in shards.items():
                name = names.get(shard, shard)
                if name in partial.finished:
                    advance(sum(p.num_bytes for p in pieces))
                    continue
                source = checkpoint.path / shard
                write_shard(source, partial.files / name, pieces, heads[shard], tell, advance)
                if stamp(source) != partial.inputs[shard][:2]:
                    raise MoecoverError(
                        f"{source} changed while it was read. Run again when no other program writes to it"
                    )
                tell(None)
    except MoecoverError:
        if any(_changed(checkpoint.path / shard, partial) for shard in checkpoint.shard_metadata):
            partial.forget()  # the next run will find other inputs
        raise


def check_space(
    shards: Mapping[str, list[Piece]],
    partial: Partial,
    output: str | Path,
    disk: Path,
    *,
    names: Mapping[str, str] = NOTHING,
) -> None:
    """Refuse a disk that has no space for the unfinished shards.

    Raises:
        MoecoverError: says how much is missing.
    """
    needed = sum(
        p.num_bytes
        for shard, pieces in shards.items()
        if names.get(shard, shard) not in partial.finished
        for p in pieces
    )
    if (free := shutil.disk_usage(partial.folder).free) < needed:
        raise MoecoverError(
            f"{output} needs {needed / 1e9:.2f} GB, {disk} has {free / 1e9:.2f} GB free. "
            "Free some space or choose another folder"
        )


def edited_index(checkpoint: Checkpoint, shards: Mapping[str, Sequence[Piece]]) -> str:
    """The text of model.safetensors.index.json for the tensors that remain; entries unknown to us are kept.

    Args:
        checkpoint: the source, which has an index.
        shards: remaining tensors by shard.
    """
    assert checkpoint.index is not None
    metadata = dict(checkpoint.index.get("metadata") or {})
    pieces = [p for ps in shards.values() for p in ps]
    metadata["total_size"] = sum(p.num_bytes for p in pieces)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(p.shape) for p in pieces)
    weight_map = {p.name: shard for shard, ps in shards.items() for p in ps}
    index = {**checkpoint.index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"
