"""The header of a safetensors file: reads the names, types, shapes and byte offsets of its tensors.

They are checked against the size of the file. Only JSON is parsed; no weight is loaded.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
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


def _sizes(values: Iterable[object]) -> tuple[int, ...]:
    sizes = tuple(n for n in values if type(n) is int and n >= 0)
    if len(sizes) != len(tuple(values)):
        raise ValueError(f"{values} are no sizes")
    return sizes


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
            begin, end = _sizes(v["data_offsets"])
            rows.append((name, str(v["dtype"]), _sizes(v["shape"]), begin, end))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} has no valid safetensors header: {error}") from error
    rows.sort(key=lambda row: (row[3], row[4]))
    entries, position = {}, 0
    for name, dtype, shape, begin, end in rows:
        bits = DTYPE_BITS.get(dtype)
        if bits is None:
            raise InputError(f"{path}: tensor {name} has the unknown type {dtype}")
        count = math.prod(shape)
        if begin != position or (end - begin) * 8 != count * bits:
            raise InputError(
                f"{path}: tensor {name} has shape {list(shape)} of {dtype}, {count * bits // 8} bytes, "
                f"but the header gives it bytes {begin} to {end}"
            )
        position = end
        entries[name] = TensorEntry(name, dtype, shape, path.name, offset + begin, offset + end)
    if offset + position != size:
        raise InputError(f"{path} is truncated: {size} bytes, its header describes {offset + position}. Fetch it again")
    return entries, metadata
