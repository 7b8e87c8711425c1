"""The header of a GGUF file: reads keys, and the names, types, shapes and byte offsets of the tensors, all checked.

The layout is that of ``docs/gguf.md`` in ggml's repository: magic, version, two counts, key-value pairs, tensor infos,
padding, tensor data. Versions 2 and 3 in little-endian byte order are read, which have the same layout.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from moecover.errors import InputError
from moecover.gguf.fields import INTEGERS, MAX_KEY_BYTES, Cursor, Field, Malformed, value_of
from moecover.gguf.types import BLOCK_TYPES, RETIRED, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_NAME_BYTES = 63  # GGML_MAX_NAME, less a zero
MAX_TENSORS = MAX_FIELDS = 1 << 20
LARGEST = 2**60  # bytes or numbers: beyond every file
ALIGNMENT_KEY = "general.alignment"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        name: its name.
        kind: how its numbers are stored.
        shape: slowest axis first (the file has them in the opposite order).
        start: byte offset of its first byte in the file.
        end: byte offset behind its last byte.
    """

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of one file.

    Attributes:
        path: the file.
        version: of the format.
        fields: where the key-value pairs lie, by key.
        values: strings and numbers by key; arrays, and strings that are not UTF-8, are left out.
        pairs: bytes of all pairs, as they are in the file, the first at byte ``pairs_start``.
        pairs_start: where they begin.
        tensors: by name, in the order of the header.
        infos: bytes of what the header says of the tensors, directly behind the pairs.
        alignment: tensor data begin at multiples of this many bytes.
        size: bytes of the file.
    """

    path: Path
    version: int
    fields: dict[str, Field]
    values: dict[str, int | float | bool | str]
    pairs: bytes
    pairs_start: int
    tensors: dict[str, TensorInfo]
    infos: bytes
    alignment: int
    size: int

    def raw(self, key: str) -> bytes:
        """The bytes of a key's value, with its type before it."""
        field = self.fields[key]
        return self.pairs[field.value - 4 - self.pairs_start : field.end - self.pairs_start]

    def is_unchanged(self) -> bool:
        """Whether the file has the size and the header that were read; much faster than reading it again."""
        with self.path.open("rb") as file:
            start, rest = file.read(self.pairs_start), file.read(len(self.pairs) + len(self.infos))
            size = os.fstat(file.fileno()).st_size
        counts = struct.pack("<IQQ", self.version, len(self.tensors), len(self.fields))
        return size == self.size and start == MAGIC + counts and rest == self.pairs + self.infos

    def number(self, key: str) -> int | None:
        """An integer; None where there is no such key.

        Raises:
            InputError: it holds something else.
        """
        if key not in self.fields:
            return None
        value = self.values.get(key)
        if self.fields[key].kind not in INTEGERS or not isinstance(value, int):
            raise InputError(f"{self.path}: {key} is no integer, one number for all layers is needed")
        return value

    def text(self, key: str) -> str | None:
        """A string; None where there is no such key.

        Raises:
            InputError: it holds something else, or is not UTF-8.
        """
        if key not in self.fields:
            return None
        value = self.values.get(key)
        if not isinstance(value, str):
            raise InputError(f"{self.path}: {key} is no text in UTF-8")
        return value


def read_header(path: Path) -> Header:
    """The header of a GGUF file, checked against the size of the file.

    Raises:
        InputError: no GGUF file of a version that is read, or truncated or malformed; says what and where.
    """
    try:
        with path.open("rb") as file:
            _check_start(file.read(8))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(path, data)
    except Malformed as error:
        raise InputError(f"{path}: {error}. Fetch or convert it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _check_start(start: bytes) -> None:
    """Refuse another format, version or byte order."""
    if start[:4] != MAGIC:
        raise Malformed(f"it is no GGUF file, it begins with {start[:4]!r}")
    if len(start) < 8:
        raise Malformed(f"it is truncated: {len(start)} bytes")
    version: int = struct.unpack_from("<I", start, 4)[0]
    if version in VERSIONS:
        return
    if struct.unpack_from(">I", start, 4)[0] in VERSIONS:
        raise Malformed("it is in big-endian byte order, little-endian files are read")
    raise Malformed(f"it is GGUF of version {version}, versions {' and '.join(map(str, VERSIONS))} are read")


def _header(path: Path, data: mmap.mmap) -> Header:
    cursor = Cursor(data, 4)
    version, num_tensors, num_fields = cursor.u32(), cursor.u64(), cursor.u64()
    for what, count, most in (("tensors", num_tensors, MAX_TENSORS), ("keys", num_fields, MAX_FIELDS)):
        if count > most:
            raise Malformed(f"it says that it has {count} {what}, at most {most} are read")
    start = cursor.at
    fields = _fields(cursor, num_fields)
    end, values = cursor.at, dict[str, int | float | bool | str]()
    for key, field in fields.items():
        try:
            if (value := value_of(data, field)) is not None:
                values[key] = value
        except Malformed:
            continue  # refused when it is asked for
    alignment = _alignment(fields, values)
    tensors = _tensors(cursor, num_tensors, alignment)
    pairs, infos = data[start:end], data[end : cursor.at]
    return Header(path, version, fields, values, pairs, start, tensors, infos, alignment, len(data))


def _fields(cursor: Cursor, count: int) -> dict[str, Field]:
    fields = dict[str, Field]()
    for _ in range(count):
        start = cursor.at
        key = cursor.text(MAX_KEY_BYTES, "a key")
        kind, value = cursor.u32(), cursor.at
        if key in fields:
            raise Malformed(f"key {key} is there twice")
        cursor.skip_value(kind)
        fields[key] = Field(kind, start, value, cursor.at)
    return fields


def _alignment(fields: dict[str, Field], values: dict[str, int | float | bool | str]) -> int:
    if ALIGNMENT_KEY not in fields:
        return DEFAULT_ALIGNMENT
    value = values.get(ALIGNMENT_KEY)
    if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise Malformed(f"{ALIGNMENT_KEY} is {value!r}, a power of two up to {MAX_ALIGNMENT} is needed")
    return value


def _tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    """The tensors, by name, after it was checked that each lies in the file and none in another."""
    rows = [_tensor(cursor) for _ in range(count)]
    begin, size = -(-cursor.at // alignment) * alignment, len(cursor.data)
    tensors = dict[str, TensorInfo]()
    for name, kind, shape, offset in rows:
        if name in tensors:
            raise Malformed(f"tensor {name} is there twice")
        if offset % alignment:
            raise Malformed(f"tensor {name} begins at byte {offset} of the data, no multiple of {alignment}")
        start = begin + offset
        end = start + _num_bytes(name, kind, shape)
        if end > size:
            raise Malformed(f"it is truncated: tensor {name} takes bytes {start} to {end} of {size}")
        tensors[name] = TensorInfo(name, kind, shape, start, end)
    behind, before = 0, ""
    for one in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if one.start < behind:
            raise Malformed(f"tensors {before} and {one.name} overlap at byte {one.start}")
        behind, before = one.end, one.name
    return tensors


def _tensor(cursor: Cursor) -> tuple[str, BlockType, tuple[int, ...], int]:
    name = cursor.text(MAX_NAME_BYTES, "a tensor's name")
    dims = cursor.u32()
    if not 1 <= dims <= MAX_DIMS:
        raise Malformed(f"tensor {name} has {dims} axes, 1 to {MAX_DIMS} are allowed")
    shape = tuple(reversed([cursor.u64() for _ in range(dims)]))
    number, offset = cursor.u32(), cursor.u64()
    if number not in BLOCK_TYPES:
        what = f"retired type {RETIRED[number]}" if number in RETIRED else f"unknown type {number}"
        raise Malformed(f"tensor {name} has the {what}")
    return name, BLOCK_TYPES[number], shape, offset


def _num_bytes(name: str, kind: BlockType, shape: tuple[int, ...]) -> int:
    count = 1
    for places in shape:
        count *= places
        if not 0 < count < LARGEST:
            raise Malformed(f"tensor {name} has the shape {list(shape)}, which no file can hold")
    if shape[-1] % kind.block:
        raise Malformed(
            f"tensor {name} has rows of {shape[-1]} numbers, {kind.name} has them in blocks of {kind.block}"
        )
    return count // kind.block * kind.num_bytes
