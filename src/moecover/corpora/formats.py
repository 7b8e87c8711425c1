"""Formats of files: reads .txt, .md, .json, .jsonl, .csv, .tsv and .parquet, packed ones too, yields their rows.

A format is one entry of `FORMATS`. Rows are read as they are used; what they hold is for `moecover.corpora.forms`.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from moecover.corpora.forms import COLUMNS, Row
from moecover.corpora.json_objects import objects
from moecover.corpora.pieces import pieces
from moecover.corpora.streams import PACKED, chunks, lines, opened
from moecover.errors import InputError
from moecover.files.reading import MAX_JSON_BYTES, parse_json

CHUNK_ROWS = 256  # of a table, that are read at a time


class Format(NamedTuple):
    """A format of files: its rows, and what it is, for the documentation."""

    rows: Callable[[BinaryIO, str], Iterator[Row]]
    summary: str


def _text(file: BinaryIO, where: str) -> Iterator[Row]:
    """The pieces of one document."""
    return ({"text": piece} for piece in pieces(chunks(file, where)))


def _jsonl(file: BinaryIO, where: str) -> Iterator[Row]:
    for number, line in enumerate(lines(file, where), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, any_text=True)
        except ValueError as error:
            raise InputError(f"{where}, line {number}: not JSON ({_reason(error)})") from error
        if not isinstance(row, dict):
            raise InputError(f"{where}, line {number}: {line.strip()[:20]} is no JSON object, which a row is")
        yield row


def _reason(error: ValueError) -> str:
    """Why a line is not JSON; of a place within it the column alone, since it is a text of one line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return str(error)


def _json(file: BinaryIO, where: str) -> Iterator[Row]:
    return objects(chunks(file, where), where)


def _separated(delimiter: str) -> Callable[[BinaryIO, str], Iterator[Row]]:
    """Rows of a table with names in its first line; every value is text."""

    def rows(file: BinaryIO, where: str) -> Iterator[Row]:
        csv.field_size_limit(MAX_JSON_BYTES)
        reader = csv.reader(lines(file, where), delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            if twice := [name for name in names if names.count(name) > 1]:
                raise InputError(f"{where}, line 1: two columns are called {twice[0]!r}")
            for values in reader:
                if values and len(values) != len(names):
                    raise InputError(
                        f"{where}, line {reader.line_num}: {len(values)} values, the first line names {len(names)}"
                    )
                if values:
                    yield dict(zip(names, values, strict=True))
        except csv.Error as error:
            raise InputError(f"{where}, line {reader.line_num}: {error}") from None

    return rows


FORMATS = {
    "txt": Format(_text, "one document"),
    "md": Format(_text, "one document"),
    "jsonl": Format(_jsonl, "a JSON object a line"),
    "ndjson": Format(_jsonl, "the same"),
    "json": Format(_json, "a list of JSON objects, or one after the other"),
    "csv": Format(_separated(","), "a table, names in the first line"),
    "tsv": Format(_separated("\t"), "the same with tabs"),
}
PARQUET = ".parquet"  # read by columns, not as a stream
SUFFIXES = (*(f".{name}{packed}" for name in FORMATS for packed in ("", *PACKED)), PARQUET)
IN_FOLDERS = tuple(suffix for suffix in SUFFIXES if suffix.split(".")[1] != "json")  # there .json describes the others
ALLOWED = ", ".join([*(f".{name}" for name in FORMATS), PARQUET]) + "; all but the last also with .gz or .zst"


def suffix_of(path: str | Path, known: Sequence[str] = SUFFIXES) -> str | None:
    """The ending that says a file's format, ``.jsonl.gz``, in small letters; None where it is not a known one."""
    name = str(path).lower()
    return next((suffix for suffix in known if name.endswith(suffix)), None)


def file_rows(path: Path, *, file_format: str | None = None, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of a file, read as they are used; a document of plain text in pieces.

    Args:
        path: the file; ``-`` is standard input.
        file_format: a key of `FORMATS`; None goes by the file's ending, and takes one that has none of them as text.
        columns: keys that are needed beside those of the known forms.

    Raises:
        InputError: the file cannot be read, or is not what its ending says; names the line, row or byte.
    """
    where = where_of(path)
    if suffix_of(path) == PARQUET:
        yield from _parquet_rows(path, where, [*COLUMNS, *columns])
        return
    with opened(path, where) as file:
        yield from FORMATS[file_format or _format_of(path)].rows(file, where)


def is_text(path: Path, file_format: str | None = None) -> bool:
    """Whether a file is one document of plain text."""
    return suffix_of(path) != PARQUET and FORMATS[file_format or _format_of(path)].rows is _text


def first_text(path: Path, longest: int = sys.maxsize) -> str:
    """The first ``longest`` characters of a file of plain text.

    Raises:
        InputError: see `file_rows`.
    """
    where = where_of(path)
    with opened(path, where) as file:
        return "".join(chunks(file, where, longest))[:longest]


def where_of(path: Path) -> str:
    """What messages call a file."""
    return "standard input" if str(path) == "-" else f"corpus file {path}"


def _format_of(path: Path) -> str:
    suffix = suffix_of(path)
    return suffix.split(".")[1] if suffix else "txt"


def _parquet_rows(path: Path, where: str, wanted: Sequence[str]) -> Iterator[Row]:
    import pyarrow.lib
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        columns = [name for name in names if name in wanted] or names  # of others the message names the keys
        for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=columns):
            yield from map(without_nulls, batch.to_pylist())
    except pyarrow.lib.ArrowException as error:
        raise InputError(f"{where} is not a parquet file: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise InputError(f"{where} could not be read: {error}") from error


def without_nulls(row: Row) -> Row:
    """A row of a table without the nulls within its values: columns have them where an object lacks a key."""
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: object) -> object:
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return value
