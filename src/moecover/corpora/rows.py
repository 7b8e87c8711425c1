"""Files of text or token ids: reads .txt, .jsonl, .jsonl.gz and .parquet, yields their rows.

A row is one document (``text``) or one sequence of token ids (``input_ids``, with an optional ``attention_mask``).
"""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from moecover.errors import InputError
from moecover.files.reading import parse_json

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
PIECE_CHARS = 20_000  # longer documents are cut at line ends, so that a sample does not come from one book
CHUNK_CHARS, CHUNK_ROWS = 1 << 20, 256  # of a file, that are read at a time
COLUMNS = ("text", "input_ids", "attention_mask")

Row = dict[str, object]


def file_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, read as they are used, in a format that is chosen by the file's suffix (`SUFFIXES`).

    A .txt file is one document, whose pieces are the rows.

    Raises:
        InputError: the file cannot be read, or a row holds neither text nor token ids.
    """
    try:
        if path.suffix == ".txt":
            with path.open(encoding="utf-8") as file:
                for piece in pieces(_chunks(file)):
                    yield {"text": piece}
        else:
            yield from _parquet_rows(path) if path.suffix == ".parquet" else jsonl_rows(path)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"corpus file {path} could not be read: {error}") from error


def _chunks(file: TextIO, longest: int = sys.maxsize) -> Iterator[str]:
    """The first ``longest`` characters of a file; one read of as many would claim the memory for all of them first."""
    while chunk := file.read(min(CHUNK_CHARS, longest)):
        yield chunk
        longest -= len(chunk)


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """A document in pieces of about `PIECE_CHARS` characters, cut at line ends where there are any.

    Args:
        chunks: its text in any parts, in order.
    """
    rest = ""
    for chunk in chunks:
        rest, start = rest + chunk, 0
        while len(rest) - start > PIECE_CHARS:
            end = rest.rfind("\n", start + 1, start + PIECE_CHARS) + 1 or start + PIECE_CHARS
            yield rest[start:end]
            start = end
        rest = rest[start:]
    yield rest


def whole_texts(path: Path, *, longest: int) -> Iterator[str]:
    """Yield the documents of a file, of a longer one its first ``longest`` characters; a .txt file is one document.

    Raises:
        InputError: see `file_rows` and `texts`.
    """
    if path.suffix != ".txt":
        yield from (text[:longest] for text in texts(file_rows(path), f"text file {path}"))
        return
    try:
        with path.open(encoding="utf-8") as file:
            yield "".join(_chunks(file, longest))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"corpus file {path} could not be read: {error}") from error


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a .jsonl or .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") if path.name.endswith(".gz") else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line, any_text=True)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict) or not ("text" in row or "input_ids" in row):
                raise InputError(f"{path}, line {number}: a row must hold `text` or `input_ids`")
            yield row


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.lib
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.lib.ArrowException as error:
        raise InputError(f"corpus file {path} is not a parquet file: {str(error).splitlines()[0]}") from error
    wanted = [column for column in COLUMNS if column in file.schema_arrow.names]
    if "text" not in wanted and "input_ids" not in wanted:
        names = ", ".join(file.schema_arrow.names)
        raise InputError(f"{path} has the columns {names}; `text` or `input_ids` is required")
    for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=wanted):
        yield from batch.to_pylist()


def texts(rows: Iterable[Row], where: str) -> Iterator[str]:
    """Yield the text of every row.

    Args:
        rows: documents.
        where: what the error message calls their source.

    Raises:
        InputError: a row has no text.
    """
    for number, row in enumerate(rows, 1):
        if not isinstance(text := row.get("text"), str):
            raise InputError(f"{where}: row {number} has no `text`; rows with and without it do not mix")
        yield text
