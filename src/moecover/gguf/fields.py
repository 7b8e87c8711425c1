"""The key-value pairs of a GGUF header: reads where each lies, decodes one when asked, writes new ones.

Arrays of strings (a tokenizer has hundreds of thousands) are walked by their lengths alone; no Python string is made.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from mmap import mmap

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
SCALAR_BYTES = {kind: struct.calcsize("<" + code) for kind, code in SCALARS.items()}
INTEGERS = {0, 1, 2, 3, 4, 5, 10, 11}
UINT32 = 4
MAX_KEY_BYTES = 65_535  # the specification's limit
MAX_ITEMS = 1 << 25  # of one array: a hundred times the largest vocabulary

_u32, _u64 = struct.Struct("<I"), struct.Struct("<Q")


class Malformed(Exception):  # becomes an InputError that names the file
    """What is wrong with a header, without the file's name."""


class Field(NamedTuple):
    """Where a key-value pair lies in its file.

    Attributes:
        kind: number of the value's type.
        start: of the pair.
        value: of the value, behind its type.
        end: behind the value.
    """

    kind: int
    start: int
    value: int
    end: int


@dataclass
class Cursor:
    """A position in the bytes of a file; every read is checked against their end.

    Attributes:
        data: the file.
        at: the position.
    """

    data: mmap | bytes
    at: int

    def skip(self, count: int) -> int:
        """Move on; returns the position before."""
        before = self.at
        if count > len(self.data) - before:
            raise Malformed(f"it is truncated, or a length is wrong: {count} bytes at byte {before}")
        self.at = before + count
        return before

    def u32(self) -> int:
        """An unsigned integer of 4 bytes."""
        return int(_u32.unpack_from(self.data, self.skip(4))[0])

    def u64(self) -> int:
        """An unsigned integer of 8 bytes."""
        return int(_u64.unpack_from(self.data, self.skip(8))[0])

    def text(self, most: int, what: str) -> str:
        """A string of at most so many bytes, decoded.

        Raises:
            Malformed: it is longer, ends behind the file, or is not UTF-8.
        """
        length = self.u64()
        if length > most:
            raise Malformed(f"{what} at byte {self.at} has {length} bytes, at most {most} are allowed")
        start = self.skip(length)
        return decoded(self.data[start : self.at], what)

    def skip_value(self, kind: int) -> None:
        """Move behind a value of a type.

        Raises:
            Malformed: an unknown type, an array of arrays, or it ends behind the file.
        """
        if kind == STRING:
            self.skip(self.u64())
        elif kind == ARRAY:
            self._skip_array(self.u32(), self.u64())
        elif kind in SCALAR_BYTES:
            self.skip(SCALAR_BYTES[kind])
        else:
            raise Malformed(f"a value at byte {self.at} has the unknown type {kind}")

    def _skip_array(self, kind: int, count: int) -> None:
        if count > MAX_ITEMS:
            raise Malformed(f"an array at byte {self.at} has {count} items, at most {MAX_ITEMS} are read")
        if kind in SCALAR_BYTES:
            self.skip(count * SCALAR_BYTES[kind])
            return
        if kind != STRING:
            raise Malformed(f"an array at byte {self.at} holds items of type {kind}, which llama.cpp does not read")
        self.at = _behind_strings(_u64.unpack_from, self.data, self.at, count)


def _behind_strings(unpack: Callable[..., tuple[int]], data: mmap | bytes, at: int, count: int) -> int:
    """The position behind consecutive strings, each a length of 8 bytes and so many bytes."""
    size, first = len(data), at
    for _ in range(count):
        if at > size - 8:
            break
        (length,) = unpack(data, at)
        at += 8 + length
    else:
        if at <= size:
            return at
    raise Malformed(f"it is truncated, or a length is wrong: {count} strings at byte {first}")


def decoded(raw: bytes, what: str) -> str:
    """The text of a string.

    Raises:
        Malformed: it is not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed(f"{what} is not UTF-8: {raw[:40]!r}") from None


def value_of(data: mmap | bytes, field: Field) -> int | float | bool | str | None:
    """A scalar or a string; None for an array.

    Raises:
        Malformed: a string that is not UTF-8.
    """
    if field.kind == STRING:
        return decoded(data[field.value + 8 : field.end], "a string value")
    if field.kind == ARRAY:
        return None
    value: int | float | bool = struct.unpack_from("<" + SCALARS[field.kind], data, field.value)[0]
    return value


def scalar_bytes(kind: int, value: int) -> bytes:
    """An integer as a type of a header stores it."""
    return struct.pack("<" + SCALARS[kind], value)


def string_bytes(text: str) -> bytes:
    """A string as a header stores it."""
    raw = text.encode("utf-8")
    return _u64.pack(len(raw)) + raw


def pair_bytes(key: str, value: int | str) -> bytes:
    """A key with a string, or with an integer as uint32."""
    if isinstance(value, str):
        return string_bytes(key) + _u32.pack(STRING) + string_bytes(value)
    return string_bytes(key) + _u32.pack(UINT32) + _u32.pack(value)
