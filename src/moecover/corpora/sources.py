"""Where text comes from: reads the hub, the package, the standard library or a file, gives documents or rows.

A named corpus is one row of `CORPORA`. A file is read by its ending: .txt, .jsonl, .jsonl.gz or .parquet. A folder of such files is one
corpus a file, NAME-1, NAME-2 and so on after the files 1.jsonl, 2.jsonl.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from moecover.errors import InputError
from moecover.registry import unknown_name

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class HubCorpus:
    """A text corpus on the hub at a pinned revision; ``streaming`` reads only the documents that are used.

    Attributes:
        split: calibration reads this one.
        held_out: perplexity is measured on this one, in order.
    """

    summary: str
    path: str
    config: str
    split: str
    held_out: str
    revision: str
    streaming: bool
    licence: str
    rows_are_lines: bool = False

    def documents(self, seed: int) -> Iterator[str]:
        yield from self._documents(self.split, seed)

    def held_out_documents(self) -> Iterator[str]:
        yield from self._documents(self.held_out, None)

    def _documents(self, split: str, seed: int | None) -> Iterator[str]:
        from datasets import load_dataset

        try:
            data = load_dataset(self.path, self.config, split=split, revision=self.revision, streaming=self.streaming)
            if self.streaming and seed is not None:
                data = data.shuffle(seed=seed, buffer_size=10_000)
            rows = (row["text"] for row in data)
            if self.rows_are_lines:
                yield "\n\n".join(rows)
            else:
                yield from rows
        except Exception as error:  # the clients below raise many unrelated types
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"corpus {self.path} could not be read from the hub: {reason}. Give a local copy as NAME=PATH") from error  # fmt: skip


@dataclass(frozen=True)
class ShippedCorpus:
    """A corpus inside the package, the project's own text."""

    summary: str
    file: str
    licence: str = "MIT, with this package"

    def documents(self, seed: int) -> Iterator[str]:
        del seed
        with resources.as_file(resources.files("moecover") / "assets" / "corpora" / self.file) as path:
            yield from (row["text"] for row in jsonl_rows(path))


@dataclass(frozen=True)
class StdlibCorpus:
    """Python source of the running interpreter's standard library; one module in eight is held out."""

    summary: str
    held_out: bool
    licence: str = "PSF-2.0"

    def documents(self, seed: int) -> Iterator[str]:
        del seed
        return stdlib_documents(held_out=self.held_out)


CORPORA: dict[str, HubCorpus | ShippedCorpus | StdlibCorpus] = {
    "wikitext2": HubCorpus(
        "encyclopedic articles, train split", "Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test",
        "b08601e04326c79dfdd32d625aee71d232d685c3", streaming=False, licence="CC BY-SA 3.0, GFDL", rows_are_lines=True,
    ),
    "c4": HubCorpus(
        "cleaned web crawl, train split, streamed", "allenai/c4", "en", "train", "validation",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2", streaming=True, licence="ODC-BY 1.0, Common Crawl terms",
    ),
    "encyclopedia": ShippedCorpus("articles written for this project, calibration part", "encyclopedia.jsonl"),
    "encyclopedia-heldout": ShippedCorpus("the same, held-out part", "encyclopedia-heldout.jsonl"),
    "web": ShippedCorpus("web pages written for this project, calibration part", "web.jsonl"),
    "web-heldout": ShippedCorpus("the same, held-out part", "web-heldout.jsonl"),
    "python": StdlibCorpus("source of the running interpreter's standard library", held_out=False),
    "python-heldout": StdlibCorpus("the same, modules that the shipped model was not trained on", held_out=True),
}  # fmt: skip


def stdlib_documents(*, held_out: bool) -> Iterator[str]:
    """Modules of the running interpreter's standard library, tests and vendored packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "__pycache__", "lib2to3", "ensurepip"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        held = hashlib.sha256(relative.as_posix().encode()).digest()[0] % 8 == 0
        if held == held_out and skipped.isdisjoint(relative.parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if 200 < len(text) < 200_000:
                yield text


def parse_corpora(arguments: Sequence[str]) -> dict[str, str]:
    """Names and sources from ``NAME`` and ``NAME=PATH`` arguments; of a folder, every file of it.

    Raises:
        InputError: unknown name, name given twice, or a name that cannot stand in a tensor name.
    """
    sources: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not name or ("/" in name and equals):
            raise InputError(f"--corpus {argument}: give NAME=PATH for a file, or one of {', '.join(CORPORA)}")
        if equals and not path:
            raise InputError(f"--corpus {argument}: no path after the equals sign")
        if not equals and name not in CORPORA:
            if name.endswith(SUFFIXES):
                raise InputError(
                    f"--corpus {name}: give the file a name, as --corpus {Path(name).name.partition('.')[0]}={name}"
                )
            raise unknown_name("corpus", name, CORPORA)
        for one, file in each_file(name, path).items():
            if one in sources:
                raise InputError(f"--corpus {one} is given twice. Corpora are kept apart by name: give each its own")
            sources[one] = file
    if not sources:
        raise InputError(f"no corpus. Give at least one --corpus NAME or NAME=PATH; named ones: {', '.join(CORPORA)}")
    for path in filter(None, sources.values()):
        if not Path(path).is_file():
            raise InputError(f"corpus file {path} does not exist")
        if not path.endswith(SUFFIXES):
            raise InputError(f"corpus file {path}: unknown ending. Allowed: {', '.join(SUFFIXES)}")
    return sources


def each_file(name: str, path: str) -> dict[str, str]:
    """The files of a folder, each a corpus NAME-FILE in the order of numbers in their names; else the source itself.

    Raises:
        InputError: the folder has no file that can be read, or two of one name.
    """
    if not (path and Path(path).is_dir()):
        return {name: path}
    files: dict[str, Path] = {}
    for file in sorted(Path(path).iterdir()):
        stem = next((file.name[: -len(ending)] for ending in SUFFIXES if file.name.endswith(ending)), None)
        if stem is None or not file.is_file():
            continue
        if stem in files:
            raise InputError(f"corpus folder {path} holds {files[stem].name} and {file.name}, which would both be corpus {name}-{stem}. Rename one")  # fmt: skip
        files[stem] = file
    if not files:
        raise InputError(f"corpus folder {path} holds no file. Allowed: {', '.join(SUFFIXES)}")
    order = sorted(files, key=lambda stem: (not stem.isdecimal(), int(stem) if stem.isdecimal() else 0, stem))
    return {f"{name}-{stem}": str(files[stem]) for stem in order}


def in_rows(corpora: Sequence[str]) -> list[str]:
    """Names of corpora, those that are numbered in a row as one: self-1..8."""

    def row(placed: tuple[int, str]) -> tuple[str, int | None]:
        place, name = placed
        stem, _, number = name.rpartition("-")
        return (stem, int(number) - place) if stem and number.isdecimal() else (name, None)

    parts = []
    for _, members in itertools.groupby(enumerate(corpora), key=row):
        names = [name for _, name in members]
        parts.append(names[0] if len(names) == 1 else f"{names[0]}..{names[-1].rpartition('-')[2]}")
    return parts


def set_name(corpora: Sequence[str], joint: str = "+") -> str:
    """The corpora of a calibration set as one name, see `in_rows`."""
    return joint.join(in_rows(corpora))


def set_folder(corpora: Sequence[str]) -> str:
    """The same as a part of a file name: what is too long for one ends in a hash."""
    name = set_name(corpora)
    return name if len(name.encode()) <= 100 else f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .jsonl or .jsonl.gz file; each holds ``text`` or ``input_ids``."""
    with gzip.open(path, "rt", encoding="utf-8") if path.name.endswith(".gz") else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict) or not ("text" in row or "input_ids" in row):
                raise InputError(f"{path}, line {number}: a row must hold `text` or `input_ids`")
            yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.lib
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.lib.ArrowException as error:
        raise InputError(f"corpus file {path} is no parquet file: {str(error).splitlines()[0]}") from error
    wanted = [c for c in ("text", "input_ids", "attention_mask") if c in file.schema_arrow.names]
    if "text" not in wanted and "input_ids" not in wanted:
        raise InputError(f"{path}: columns {', '.join(file.schema_arrow.names)}; `text` or `input_ids` is needed")
    for batch in file.iter_batches(columns=wanted):
        yield from batch.to_pylist()


def file_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file by its ending (`SUFFIXES`).

    Raises:
        InputError: it cannot be read, or a row holds neither text nor token ids.
    """
    try:
        if path.suffix == ".txt":
            yield {"text": path.read_text(encoding="utf-8")}
        else:
            yield from _parquet_rows(path) if path.suffix == ".parquet" else jsonl_rows(path)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"corpus file {path} could not be read: {error}") from error
