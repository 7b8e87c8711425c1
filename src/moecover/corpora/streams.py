"""Text out of files and standard input: reads bytes, packed ones too, yields text as far as it is asked for.

Text is UTF-8, with or without a byte-order mark, and without a zero byte. Line ends become line feeds.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, ClassVar, TextIO, cast
from weakref import WeakKeyDictionary

from moecover.errors import InputError
from moecover.files.reading import MAX_JSON_BYTES

PACKED = (".gz", ".zst")
CHUNK_CHARS = 1 << 20  # bytes that are read at a time
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@contextlib.contextmanager
def opened(path: Path, where: str) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked; ``-`` is standard input, which may be opened again.

    Args:
        path: of the file.
        where: what messages call it.

    Raises:
        InputError: it cannot be opened or, within the block, read.
    """
    try:
        with _open(path) as file:
            yield file
    except UnicodeDecodeError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{where} could not be read: {error}") from error


def _open(path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
    if str(path) == "-":
        return contextlib.nullcontext(cast(BinaryIO, io.BufferedReader(_StandardInput())))
    if (packed := path.suffix.lower()) == ".gz":
        return contextlib.closing(cast(BinaryIO, gzip.open(path, "rb")))
    if packed == ".zst":
        import pyarrow

        return contextlib.closing(
            cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
        )
    return path.open("rb")


def chunks(file: BinaryIO, where: str, longest: int = sys.maxsize) -> Iterator[str]:
    """The first ``longest`` characters of a file, in parts.

    Raises:
        InputError: bytes that are not UTF-8, or zero; names the first of them.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    read = 0
    while longest > 0:
        part = file.read(min(CHUNK_CHARS, longest))
        if read == 0:
            _check_mark(part, where)
        _check_zero(part, read, where)
        read += len(part)
        try:
            text = decoder.decode(part, final=not part)
        except UnicodeDecodeError as error:
            raise _not_utf8(error, read, where) from None
        longest -= len(text)
        if text:
            yield text
        if not part:
            return


def lines(file: BinaryIO, where: str) -> Iterator[str]:
    """The lines of a file, with their ends; only a line feed ends one.

    Raises:
        InputError: bytes that are not UTF-8, or zero; names the first of them.
    """
    read = 0
    while line := file.readline(MAX_JSON_BYTES + 1):
        if read == 0:
            _check_mark(line, where)
        if len(line) > MAX_JSON_BYTES:
            raise InputError(f"{where}: a line of more than {MAX_JSON_BYTES} bytes, behind byte {read}")
        _check_zero(line, read, where)
        first, read = read == 0, read + len(line)
        try:
            yield (line.removeprefix(codecs.BOM_UTF8) if first else line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(error, read, where) from None


def _check_mark(start: bytes, where: str) -> None:
    """Refuse UTF-16 by its byte-order mark."""
    if start.startswith(UTF_16):
        raise InputError(f"{where} is UTF-16 by its first bytes, UTF-8 is read. Convert it: iconv -f UTF-16 -t UTF-8")


def _check_zero(part: bytes, read: int, where: str) -> None:
    """Refuse a byte that no text has; ``read`` is the number of bytes before the part."""
    if (place := part.find(b"\0")) >= 0:
        raise InputError(
            f"{where}: byte {read + place} is zero, so it is a binary file, or UTF-16 without a byte-order mark. Leave "
            "it out, or convert it: iconv -f UTF-16LE -t UTF-8"
        )


def _not_utf8(error: UnicodeDecodeError, read: int, where: str) -> InputError:
    """The message on a byte; ``read`` is the number of bytes up to the end of those that were being decoded."""
    place = read - len(error.object) + error.start
    byte = error.object[error.start]
    return InputError(f"{where}: byte {place} (0x{byte:02x}) is not UTF-8. Convert the file, as with iconv -t UTF-8")


class _StandardInput(io.RawIOBase):
    """Standard input from its beginning: what was read of it before is kept in a temporary file."""

    _kept: ClassVar[WeakKeyDictionary[TextIO, IO[bytes]]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._at, self._source = 0, sys.stdin
        if self._source not in self._kept:
            self._kept[self._source] = tempfile.TemporaryFile()  # noqa: SIM115  # until the process ends

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        kept = self._kept[self._source]
        kept.seek(self._at)
        part = kept.read(len(buffer))
        if not part:
            part = self._source.buffer.read(len(buffer))
            kept.write(part)
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)
