"""Where the documents of a named corpus come from: the hub, the package, the standard library, a file.

Each class here is one kind of entry of `moecover.corpora.sources.CORPORA`. A kind of your own is a subclass of
`NamedCorpus` with a ``summary``, a ``licence`` and `NamedCorpus.documents`.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from moecover.corpora.rows import Row, file_rows, jsonl_rows, texts, whole_texts
from moecover.errors import InputError


class NamedCorpus(ABC):
    """Text that is found by its name.

    Attributes:
        summary: one line for listings.
        licence: of the text.
        streaming: whether `documents` shuffles the text itself and reads no more than is asked for.
        has_held_out: whether there is text that calibration never sees, for perplexity.
        address: where the text lies, for listings; empty where the name says it.
    """

    summary: str
    licence: str
    streaming: bool = False

    @property
    def has_held_out(self) -> bool:
        return False

    @property
    def address(self) -> str:
        return ""

    def source(self, name: str) -> str:
        """What the record of a sample calls the text, which is entered as ``name``."""
        return name

    @abstractmethod
    def documents(self, seed: int) -> Iterator[str]:
        """Yield the documents to calibrate on.

        Args:
            seed: of the order, for a corpus that is streamed; others are shuffled after they are read.
        """

    def rows(self, seed: int) -> Iterator[Row]:
        """Yield the documents as rows, see `moecover.corpora.rows`."""
        return ({"text": document} for document in self.documents(seed))

    def held_out_documents(self) -> Iterator[str]:
        """Yield the documents that perplexity is measured on, in a fixed order."""
        return self.documents(0)

    def held_out_record(self, name: str) -> dict[str, str]:
        """The origin of the held-out text, for the record of its windows."""
        return {"source": self.source(name)}


@dataclass(frozen=True, kw_only=True)
class HubCorpus(NamedCorpus):
    """A data set on the hub at a pinned revision.

    Attributes:
        path: the data set's id.
        config: the data set's configuration.
        split: read for calibration.
        held_out: the split that perplexity is measured on.
        revision: commit hash.
        streaming: download only the documents that are used.
        rows_are_lines: whether the rows are lines of one text instead of documents.
    """

    summary: str
    path: str
    config: str
    split: str
    held_out: str
    revision: str
    licence: str
    streaming: bool = False
    rows_are_lines: bool = False

    @property
    def has_held_out(self) -> bool:
        return True

    @property
    def address(self) -> str:
        return self.path

    def source(self, name: str) -> str:
        return f"{self.path}@{self.revision}"

    def documents(self, seed: int) -> Iterator[str]:
        return self._documents(self.split, seed)

    def held_out_documents(self) -> Iterator[str]:
        return self._documents(self.held_out, None)

    def held_out_record(self, name: str) -> dict[str, str]:
        return {"source": self.source(name), "split": self.held_out}

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
            raise InputError(
                f"corpus {self.path} could not be read from the hub: {reason}. Give a local copy as NAME=PATH"
            ) from error


@dataclass(frozen=True)
class ShippedCorpus(NamedCorpus):
    """Text that is part of the package, written for this project.

    Attributes:
        file: name of the .jsonl file.
        held_out: whether perplexity may be measured on it.
    """

    summary: str
    file: str
    held_out: bool = False
    licence: str = "MIT, with this package"

    @property
    def has_held_out(self) -> bool:
        return self.held_out

    def documents(self, seed: int) -> Iterator[str]:
        del seed
        with resources.as_file(resources.files("moecover") / "assets" / "corpora" / self.file) as path:
            yield from texts(jsonl_rows(path), self.file)


@dataclass(frozen=True)
class StdlibCorpus(NamedCorpus):
    """Python source of the running interpreter's standard library; one module in eight is held out."""

    summary: str
    held_out: bool
    licence: str = "PSF-2.0"

    @property
    def has_held_out(self) -> bool:
        return self.held_out

    def documents(self, seed: int) -> Iterator[str]:
        del seed
        return stdlib_documents(held_out=self.held_out)


@dataclass(frozen=True)
class FileCorpus(NamedCorpus):
    """A file of documents or token ids, see `moecover.corpora.rows`.

    Attributes:
        path: .txt, .jsonl, .jsonl.gz or .parquet file.
        held_out: another file, that perplexity may be measured on.
    """

    path: str | Path
    summary: str = "a file"
    licence: str = ""
    held_out: str | Path | None = None

    @property
    def has_held_out(self) -> bool:
        return self.held_out is not None

    @property
    def address(self) -> str:
        return str(self.path)

    def source(self, name: str) -> str:
        return Path(self.path).name

    def rows(self, seed: int) -> Iterator[Row]:
        del seed
        return file_rows(Path(self.path))

    def documents(self, seed: int) -> Iterator[str]:
        return texts(self.rows(seed), f"corpus file {self.path}")

    def held_out_documents(self, longest: int = sys.maxsize) -> Iterator[str]:
        return whole_texts(Path(self.path if self.held_out is None else self.held_out), longest=longest)

    def held_out_record(self, name: str) -> dict[str, str]:
        return {"source": Path(self.path if self.held_out is None else self.held_out).name}


def stdlib_documents(*, held_out: bool) -> Iterator[str]:
    """Yield the modules of the running interpreter's standard library, except tests and vendored packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "__pycache__", "lib2to3", "ensurepip"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        held = hashlib.sha256(relative.as_posix().encode()).digest()[0] % 8 == 0
        if held == held_out and skipped.isdisjoint(relative.parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if 200 < len(text) < 200_000:
                yield text
