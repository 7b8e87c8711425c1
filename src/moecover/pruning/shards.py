"""The shards of a pruned checkpoint: reads byte ranges of the source's shards, writes safetensors files.

Nothing is decoded: a tensor is a name, a dtype, a shape and the byte ranges that hold it (`checkpoints.pieces`).
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moecover.checkpoints.pieces import Piece, coalesced
from moecover.checkpoints.source import Checkpoint
from moecover.files.copying import write_ranges

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
    metadata: dict[str, str] | None,
    tell: Callable[[Path | int | None], None],
    advance: Callable[[int], None],
) -> None:
    """Write one safetensors file from byte ranges of others.

    Args:
        source: shard that holds the pieces whose own ``file`` is None.
        target: file to write.
        pieces: its tensors, in order.
        metadata: its ``__metadata__``.
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
    write_ranges(target, safetensors_head(pieces, metadata), parts, written)


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
