"""Where the documents of a corpus come from: the package, the standard library, a file, a folder (`hub`: the hub).

Each class here is one kind of entry of `moecover.corpora.sources.CORPORA`. A kind of your own is a subclass of
`NamedCorpus` with a ``summary``, a ``licence`` and `NamedCorpus.documents`.
"""

from __future__ import annotations

import hashlib
import itertools
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from moecover.corpora.formats import file_rows, first_text, is_text, where_of
from moecover.corpora.forms import FileRow, Row, documents
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

    def resolved(self) -> NamedCorpus:
        """The same text, at a state that its record can name."""
        return self

    @abstractmethod
    def documents(self, seed: int) -> Iterator[str]:
        """Yield the documents to calibrate on.

        Args:
            seed: of the order, for a corpus that is streamed; others are shuffled after they are read.
        """

    def rows(self, seed: int) -> Iterator[Row]:
        """Yield the documents as rows, see `moecover.corpora.forms`."""
        return ({"text": document} for document in self.documents(seed))

    def held_out_documents(self) -> Iterator[str]:
        """Yield the documents that perplexity is measured on, in a fixed order."""
        return self.documents(0)

    def held_out_rows(self, longest: int) -> Iterator[Row]:
        """Yield these documents as rows.

        Args:
            longest: characters of a document that are looked at; no more need be read.
        """
        del longest
        return ({"text": document} for document in self.held_out_documents())

    def held_out_record(self, name: str) -> dict[str, str]:
        """The origin of the held-out text, for the record of its windows."""
        return {"source": self.source(name)}


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
            yield from (str(row["text"]) for row in file_rows(path))


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
    """A file of documents, chats or token ids, see `moecover.corpora.formats`.

    Attributes:
        path: its ending is one of `moecover.corpora.formats.SUFFIXES`; ``-`` is standard input.
        held_out: another file, that perplexity may be measured on.
        file_format: a key of `moecover.corpora.formats.FORMATS`, whatever the ending.
        columns: keys that are read beside those of the known forms.
    """

    path: str | Path
    summary: str = "a file"
    licence: str = ""
    held_out: str | Path | None = None
    file_format: str | None = None
    columns: tuple[str, ...] = ()

    @property
    def has_held_out(self) -> bool:
        return self.held_out is not None

    @property
    def address(self) -> str:
        return str(self.path)

    def source(self, name: str) -> str:
        return "standard input" if str(self.path) == "-" else Path(self.path).name

    def rows(self, seed: int) -> Iterator[Row]:
        del seed
        return file_rows(Path(self.path), file_format=self.file_format, columns=self.columns)

    def documents(self, seed: int) -> Iterator[str]:
        where = where_of(Path(self.path))
        return (one for one in documents(self.rows(seed), where) if isinstance(one, str))

    def held_out_rows(self, longest: int) -> Iterator[Row]:
        path = Path(self.path if self.held_out is None else self.held_out)
        if is_text(path, self.file_format):
            return iter([{"text": first_text(path, longest)}])
        return file_rows(path, file_format=self.file_format, columns=self.columns)

    def held_out_record(self, name: str) -> dict[str, str]:
        return {"source": self.source(name) if self.held_out is None else Path(self.held_out).name}


@dataclass(frozen=True)
class FolderCorpus(NamedCorpus):
    """The files of a folder as one corpus, in the order of their names; hidden ones are left out.

    Attributes:
        path: of the folder.
        pattern: of the files, as ``**/*.py``.
        columns: keys that are read beside those of the known forms.
    """

    path: Path
    pattern: str
    summary: str = "a folder"
    licence: str = ""
    columns: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        return str(self.path)

    def source(self, name: str) -> str:
        return f"{self.path.resolve().name}/{self.pattern}"

    def files(self) -> Iterator[Path]:
        """Yield the files, sorted within every folder.

        Raises:
            InputError: there is none, or the pattern cannot be used.
        """
        try:
            found = sorted(path for path in self.path.glob(self.pattern) if path.is_file() and self._shown(path))
        except (ValueError, NotImplementedError, OSError) as error:
            raise InputError(f"corpus folder {self.path}: the glob {self.pattern!r} cannot be used: {error}") from error
        if not found:
            raise InputError(f"corpus folder {self.path} holds no file of the glob {self.pattern!r}")
        return iter(found)

    def _shown(self, path: Path) -> bool:
        return not any(part.startswith(".") for part in path.relative_to(self.path).parts)

    def rows(self, seed: int) -> Iterator[Row]:
        del seed
        return itertools.chain.from_iterable(map(self._rows_of, self.files()))

    def _rows_of(self, path: Path) -> Iterator[Row]:
        name = path.relative_to(self.path).as_posix()
        return (FileRow(row, name, number) for number, row in enumerate(file_rows(path, columns=self.columns), 1))

    def documents(self, seed: int) -> Iterator[str]:
        where = f"corpus folder {self.path}"
        return (one for one in documents(self.rows(seed), where) if isinstance(one, str))

    def held_out_rows(self, longest: int) -> Iterator[Row]:
        for path in self.files():
            if is_text(path):
                yield {"text": first_text(path, longest)}
            else:
                yield from self._rows_of(path)


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
