"""The bytes before the tensor data of a GGUF file: takes another header with some values replaced, and its tensors."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

from moecover.gguf.fields import pair_bytes, scalar_bytes, string_bytes
from moecover.gguf.header import MAGIC, Header
from moecover.gguf.types import TYPE_NUMBERS


def padding(num_bytes: int, alignment: int) -> int:
    """Bytes behind so many, up to the next multiple of the alignment."""
    return -num_bytes % alignment


def edited_pairs(header: Header, numbers: Mapping[str, int], added: Mapping[str, int | str]) -> tuple[int, bytes]:
    """The key-value pairs of a header after a change.

    Args:
        header: as it was read.
        numbers: new values of integers, by key; each is stored in the type that it has.
        added: keys that are appended (integers as uint32), in place of those of the same name.

    Returns:
        Their number and their bytes.
    """
    parts, count = list[bytes](), len(added)
    for key, field in header.fields.items():
        if key in added:
            continue
        start, value, end = (at - header.pairs_start for at in (field.start, field.value, field.end))
        changed = scalar_bytes(field.kind, numbers[key]) if key in numbers else header.pairs[value:end]
        parts += [header.pairs[start:value], changed]
        count += 1
    return count, b"".join([*parts, *(pair_bytes(key, value) for key, value in added.items())])


def head_bytes(
    header: Header,
    tensors: Sequence[tuple[str, str, Sequence[int], int]],
    *,
    numbers: Mapping[str, int],
    added: Mapping[str, int | str],
) -> bytes:
    """What precedes the tensor data, padded to the alignment.

    Args:
        header: of the file that is edited; version and alignment are kept.
        tensors: name, type, shape (slowest axis first) and bytes of each, padded ones one after the other.
        numbers: see `edited_pairs`.
        added: see `edited_pairs`.
    """
    count, pairs = edited_pairs(header, numbers, added)
    infos = b"".join(_infos(tensors, header.alignment))
    head = MAGIC + struct.pack("<IQQ", header.version, len(tensors), count) + pairs + infos
    return head + bytes(padding(len(head), header.alignment))


def _infos(tensors: Sequence[tuple[str, str, Sequence[int], int]], alignment: int) -> Iterable[bytes]:
    offset = 0
    for name, kind, shape, num_bytes in tensors:
        axes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        yield string_bytes(name) + axes + struct.pack("<IQ", TYPE_NUMBERS[kind], offset)
        offset += num_bytes + padding(num_bytes, alignment)
