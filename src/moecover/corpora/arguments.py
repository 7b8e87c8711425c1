"""Corpora that arguments name: reads ``NAME``, ``NAME=SOURCE`` and MIX.yaml, finds where each one's text comes from.

A source is written as `moecover.corpora.grammar` has it: a file, a data set of the hub, a folder, a named corpus. A
folder with 1.jsonl, 2.jsonl and so on holds the corpora NAME-1, NAME-2 and so on.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.corpora.documents import FileCorpus, FolderCorpus, NamedCorpus
from moecover.corpora.encoding import Encoder
from moecover.corpora.formats import ALLOWED, FORMATS, IN_FOLDERS, suffix_of
from moecover.corpora.forms import Row
from moecover.corpora.grammar import (
    HUB,
    ID,
    MIX_ENDINGS,
    STANDARD_INPUT,
    Source,
    SourceOptions,
    hub_place,
    parse_source,
    with_options,
)
from moecover.corpora.hub import HubCorpus
from moecover.corpora.mixes import read_mix
from moecover.corpora.sources import CORPORA, check_name
from moecover.errors import InputError
from moecover.registry import unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OF_ROWS = ("text", "n", "chat_template", "parse_special")  # options that say how rows are read
RECORDED = ("text", "n", "weight")
OF_PLACE = {"revision": "data sets of the hub", "glob": "folders", "format": "standard input"}


@dataclass(frozen=True)
class GivenCorpus:
    """A corpus and the options of its source.

    Attributes:
        corpus: where its text comes from.
        source: as it was written.
    """

    corpus: NamedCorpus
    source: Source

    @property
    def options(self) -> SourceOptions:
        """See `moecover.corpora.grammar.OPTIONS`."""
        return self.source.options

    def resolved(self) -> GivenCorpus:
        """The same, a data set of the hub at a commit: see `HubCorpus.resolved`."""
        return replace(self, corpus=self.corpus.resolved())

    def where(self, name: str) -> str:
        """What messages call it."""
        return f"corpus {name}, {self.corpus.address}" if self.corpus.address else f"corpus {name}"

    def facts(self) -> dict[str, Any]:
        """Entries for the record of a corpus: which of its text was read, and its weight."""
        return {key: value for key, value in self.options.items() if key in RECORDED}

    def record(self, name: str) -> dict[str, Any]:
        """Where the text comes from, for the record of a corpus; of a data set of the hub so that it can be read again.

        See also `facts`.
        """
        if isinstance(self.corpus, HubCorpus) and self.source.is_hub:
            pinned: dict[str, Any] = {"revision": self.corpus.revision} if self.corpus.revision else {}
            kept = {key: value for key, value in self.options.items() if key in OF_ROWS}
            return {"source": with_options(self.corpus.place, {**kept, **pinned}, f"corpus {name}"), **self.facts()}
        place = self.source.place  # of a named corpus its own name, whatever it is called here
        return {"source": self.corpus.source(place if place in CORPORA else name), **self.facts()}

    def encoder(self, tokenizer: PreTrainedTokenizerBase, where: str) -> Encoder:
        """What turns its documents into token ids.

        Raises:
            InputError: the chat template cannot be read.
        """
        template = None
        if file := self.options.get("chat_template"):
            try:
                template = Path(file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{where}: chat template {file} could not be read: {error}") from error
        special = self.options.get("parse_special", False)
        return Encoder(tokenizer, where, chat_template=template, parse_special=special)

    def rows(self, seed: int) -> Iterator[Row]:
        """Yield the rows to calibrate on, as many as the options want."""
        return itertools.islice(self.corpus.rows(seed), self.options.get("n"))

    def held_out_rows(self, longest: int) -> Iterator[Row]:
        """Yield the rows to measure on, as many as the options want."""
        return itertools.islice(self.corpus.held_out_rows(longest), self.options.get("n"))


def source_of(name: str, text: str | Path | None = None) -> GivenCorpus:
    """What a source stands for; nothing is read yet.

    Args:
        name: of the corpus.
        text: of the source, see `moecover.corpora.grammar`; None, or nothing, for the named corpus.

    Raises:
        InputError: an unknown name or option, an option that has no meaning here, or a file that does not exist or
            whose ending is unknown.
    """
    what = f"corpus {name}"
    source = parse_source(str(text) if text else name, what)
    place, options = source
    if place in CORPORA and place != name and Path(place).exists():
        raise InputError(f"{what}: {place} is a named corpus, and a file or folder here. Write ./{place} for that")
    corpus, used = (CORPORA[place], ()) if not text or place in CORPORA else _found(what, place, options)
    if unused := [key for key in OF_PLACE if key in options and key not in used]:
        raise InputError(f"{what}: {unused[0]} says nothing of {place}. It is for {OF_PLACE[unused[0]]}: leave it out")
    if "chat_template" in options and not Path(options["chat_template"]).is_file():
        raise InputError(f"{what}: chat template {options['chat_template']} does not exist")
    return GivenCorpus(corpus, source)


def _found(what: str, place: str, options: SourceOptions) -> tuple[NamedCorpus, tuple[str, ...]]:
    """The corpus at a place, and which options of the place it used."""
    path, columns = Path(place), (options["text"],) if "text" in options else ()
    if place.startswith(HUB):
        data, config, split = hub_place(place, what)
        return HubCorpus(path=data, config=config, split=split, revision=options.get("revision")), ("revision",)
    if place == STANDARD_INPUT:
        given = options.get("format", "txt")
        if given not in FORMATS:
            raise InputError(f"{what}: {unknown_name('format', given, FORMATS)}")
        return FileCorpus(place, file_format=given), ("format",)
    if path.is_dir():
        if "glob" not in options:
            raise InputError(f"corpus folder {place}: give {place}?glob=PATTERN for its files as one corpus")
        corpus = FolderCorpus(path, options["glob"], columns=columns)
        corpus.files()
        return corpus, ("glob",)
    if not path.is_file():
        raise InputError(f"corpus file {place} {_why_no_file(place)}")
    if suffix_of(place) is None:
        raise InputError(f"corpus file {place}: unknown file type. Allowed: {ALLOWED}")
    return FileCorpus(place, columns=columns), ()


def _why_no_file(place: str) -> str:
    """What is wrong with a place that is no file, and what may have been meant."""
    if found := re.match(rf"https?://(?:huggingface\.co|hf\.co)/datasets/({ID})", place):
        return f"is an address of the hub. Write {HUB}{found[1]}"
    if "://" in place:
        return "is an address. Fetch it, or pipe it into NAME=-"
    if Path(place).exists():
        return "is no regular file. Pipe it into NAME=-"
    hub = f". Of the hub it would be {HUB}{place}" if re.fullmatch(ID, place) and suffix_of(place) is None else ""
    return f"does not exist{hub}"


def parse_corpora(arguments: Sequence[str]) -> dict[str, str]:
    """Names and sources from ``NAME``, ``NAME=SOURCE`` and MIX.yaml arguments; a folder stands for all of its files.

    Returns:
        Source by name, empty for a named corpus.

    Raises:
        InputError: what `source_of` raises, a name given twice, or one that cannot be part of a tensor's name.
    """
    sources: dict[str, str] = {}
    for name, text in expanded(_checked(arguments)):
        check_name(name)
        if name in sources:
            raise InputError(f"corpus {name} is given twice. Corpora are kept apart by name: give each its own")
        sources[name] = text
    if not sources:
        raise InputError(f"no corpus. Give at least one as NAME or NAME=PATH; known names: {', '.join(CORPORA)}")
    for name, text in sources.items():
        source_of(name, text)
    if len(read := [name for name, text in sources.items() if text.partition("?")[0] == STANDARD_INPUT]) > 1:
        raise InputError(f"corpora {read[0]} and {read[1]} are both standard input. Give one of them as a file")
    return sources


def with_reading(arguments: Sequence[str], options: Mapping[str, object]) -> list[str]:
    """``NAME`` and ``NAME=SOURCE`` arguments with options for all of them; those that a source has stay.

    Args:
        arguments: see `parse_corpora`.
        options: see `moecover.corpora.grammar.OPTIONS`; those that are None are left out.

    Raises:
        InputError: see `parse_corpora`.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if not given:
        return list(arguments)
    pairs = expanded(_checked(arguments))
    return [f"{name}={with_options(text or name, given, f'corpus {name}')}" for name, text in pairs]


def expanded(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Name and source of every corpus of ``NAME``, ``NAME=SOURCE`` and MIX.yaml arguments, folders by their files.

    Raises:
        InputError: a file that is no mix, or a folder without files.
    """
    return [pair for one in _singly(arguments) for pair in each_file(*one.partition("=")[::2]).items()]


def _singly(arguments: Sequence[str]) -> list[str]:
    """Arguments of one corpus or folder each: a mix is replaced by its own."""
    mixes = {one for one in arguments if one.lower().endswith(MIX_ENDINGS) and "=" not in one}
    return [each for one in arguments for each in (read_mix(Path(one)) if one in mixes else [one])]


def _checked(arguments: Sequence[str]) -> list[str]:
    """Arguments of one corpus or folder each, refused where they are neither ``NAME=SOURCE`` nor a known name."""
    given = _singly(arguments)
    for one in given:
        _check_argument(one)
    return given


def _check_argument(argument: str) -> None:
    name, equals, text = argument.partition("=")
    if not name or ("/" in name and equals):
        raise InputError(f"corpus {argument}: give NAME=PATH for a file, or one of {', '.join(CORPORA)}")
    if equals and not text:
        raise InputError(f"corpus {argument}: there is no path after the equals sign")
    if not equals and name not in CORPORA:
        if suffix_of(name) or name.startswith(HUB):
            stem = re.split(r"[/\\[?]", name.removeprefix(HUB).removesuffix("/"))
            short = (stem[1] if name.startswith(HUB) and len(stem) > 1 else Path(name).name).partition(".")[0]
            raise InputError(f"corpus {name}: give it a name, as --corpus {short}={name}")
        if re.fullmatch(ID, name):
            raise InputError(f"corpus {name}: give NAME=PATH for a file, NAME={HUB}{name} for a data set of the hub")
        raise unknown_name("corpus", name, CORPORA)


def each_file(name: str, text: str) -> dict[str, str]:
    """The files of a folder as the corpora NAME-FILE, numbers in order; any other source as it is.

    Raises:
        InputError: the folder has no file that can be read, or two of one name.
    """
    source = parse_source(text, f"corpus {name}")
    if not text or "glob" in source.options or source.place in CORPORA or not Path(source.place).is_dir():
        return {name: text}
    files: dict[str, Path] = {}
    for file in sorted(Path(source.place).iterdir()):
        if (suffix := suffix_of(file.name, IN_FOLDERS)) is None or not file.is_file():
            continue
        stem = file.name[: -len(suffix)]
        if stem in files:
            raise InputError(
                f"corpus folder {source.place} holds {files[stem].name} and {file.name}, which would both be corpus "
                f"{name}-{stem}. Rename one"
            )
        files[stem] = file
    if not files:
        raise InputError(
            f"corpus folder {source.place} holds no corpus file. Allowed: {ALLOWED}; or give "
            f"{name}={source.place}?glob=PATTERN for its files as one corpus"
        )
    order = sorted(files, key=lambda stem: (not stem.isdecimal(), int(stem) if stem.isdecimal() else 0, stem))
    return {f"{name}-{stem}": source._replace(place=str(files[stem])).text() for stem in order}
