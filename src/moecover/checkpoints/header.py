"""The header of a safetensors file: reads the names, types, shapes and byte offsets of its tensors.

They are checked against the size of the file. Only JSON is parsed; no weight is loaded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moecover.errors import InputError
from moecover.files.reading import parse_json

BITS_DTYPES = {
    4: ("F4",),
    6: ("F6_E2M3", "F6_E3M2"),
    8: ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    16: ("I16", "U16", "F16", "BF16"),
    32: ("I32", "U32", "F32"),
    64: ("C64", "F64", "I64", "U64"),
}
DTYPE_BITS = {dtype: bits for bits, dtypes in BITS_DTYPES.items() for dtype in dtypes}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
LARGEST = 2**60  # bytes or numbers: beyond every file

Row = tuple[str, str, tuple[int, ...], int, int]  # name, dtype, shape, begin and end within the tensor data


@dataclass(frozen=True)
class TensorEntry:
    """One tensor on disk.

    Attributes:
        name: its name.
        dtype: safetensors' name of its type, such as ``BF16``.
        shape: its shape.
        shard: name of the file that holds it.
        start: byte offset of its first byte in that file.
        end: byte offset behind its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Its size on disk."""
        return self.end - self.start


def _read_json(path: Path, size: int) -> tuple[bytes, int]:
    """The JSON text of a header, and the offset behind it."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise InputError(
                f"{path} is truncated or no safetensors file: {size} bytes, header of {length} bytes. Fetch it again"
            )
        return file.read(length), 8 + length


def _sizes(values: object) -> tuple[int, ...]:
    found = tuple(n for n in values if type(n) is int and n >= 0) if isinstance(values, list) else ()
    if not isinstance(values, list) or len(found) != len(values):
        raise ValueError("a shape or offsets are no list of sizes")
    return found


def row_of(name: str, dtype: str, shape: object, offsets: object) -> Row:
    """The row of a tensor for `entries_of`, from the JSON values of a header.

    Raises:
        ValueError: shape or offsets are no list of integers from 0.
    """
    begin, end = _sizes(offsets)
    return name, dtype, _sizes(shape), begin, end


def _count(shape: Sequence[int]) -> int:
    """Numbers in a tensor; `LARGEST` where there are more, so that no product grows beyond all bounds."""
    count = 1
    for size in shape:
        if (count := count * size) >= LARGEST:
            return LARGEST
    return count


def _checked_metadata(value: object, where: str) -> dict[str, str] | None:
    """The ``__metadata__`` of a header, which safetensors requires to be texts by texts."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InputError(f"{where}: __metadata__ is {type(value).__name__}, an object of texts is needed")
    for key, text in value.items():
        if not isinstance(text, str):
            raise InputError(f"{where}: __metadata__ has {type(text).__name__} under {key!r}, a text is needed")
    return value


def entries_of(rows: Iterable[Row], shard: str, where: str, *, offset: int = 0) -> dict[str, TensorEntry]:
    """The tensors of one file by name, in the order of their bytes, after their sizes were checked.

    Args:
        rows: from `row_of`.
        shard: name of the file.
        where: the file in messages.
        offset: bytes before the tensor data.

    Raises:
        InputError: a dtype is unknown, a shape does not fit its bytes, or the bytes have gaps.
    """
    entries, position = dict[str, TensorEntry](), 0
    for name, dtype, shape, begin, end in sorted(rows, key=lambda row: (row[3], row[4])):
        if (bits := DTYPE_BITS.get(dtype)) is None:
            raise InputError(f"{where}: tensor {name} has the unknown type {dtype}")
        if (count := _count(shape)) >= LARGEST or max(begin, end) >= LARGEST:
            raise InputError(f"{where}: tensor {name} has a shape or offsets that no file can hold")
        if begin != position or (end - begin) * 8 != count * bits:
            raise InputError(
                f"{where}: tensor {name} has shape {list(shape)} of {dtype}, {count * bits // 8} bytes, "
                f"but the header gives it bytes {begin} to {end}"
            )
        position = end
        entries[name] = TensorEntry(name, dtype, shape, shard, offset + begin, offset + end)
    return entries


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str] | None]:
    """Tensors and ``__metadata__`` of one safetensors file, checked against the size of the file.

    Raises:
        InputError: the file is truncated or malformed.
    """
    size = path.stat().st_size
    text, offset = _read_json(path, size)
    try:
        header = parse_json(text)
        metadata = header.pop("__metadata__", None)
        rows = []
        for name, v in header.items():
            rows.append(row_of(name, str(v["dtype"]), v["shape"], v["data_offsets"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} has no valid safetensors header: {error}") from error
    metadata = _checked_metadata(metadata, str(path))
    entries = entries_of(rows, path.name, str(path), offset=offset)
    end = max((entry.end for entry in entries.values()), default=offset)
    if end != size:
        raise InputError(f"{path} is truncated: {size} bytes, its header describes {end}. Fetch it again")
    return entries, metadata
