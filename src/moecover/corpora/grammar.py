"""How a source of text is written: reads ``PLACE?KEY=VALUE&KEY=VALUE``, returns the place and the values.

A place is a file, a folder, ``-``, ``hf:OWNER/NAME[CONFIG]/SPLIT`` or a named corpus. Values are percent-decoded, so
that ``%26`` is an ampersand. A file whose name has a question mark in it is found under that name, without options.
``~`` at the beginning of a place or a file is the home folder: no shell expands it behind an equals sign.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypedDict
from urllib.parse import quote, unquote

from moecover.errors import InputError
from moecover.registry import unknown_name

HUB, STANDARD_INPUT = "hf:", "-"
MIX_ENDINGS = (".yaml", ".yml")  # of a file of corpora, see `moecover.corpora.mixes`
ID = r"[\w.-]+/[\w.-]+"  # of a data set
MOST_DIGITS = 18  # of a number
_HUB = re.compile(rf"(?P<path>{ID})(\[(?P<config>[^\]/]+)\])?(/(?P<split>[\w.-]+))?")


class SourceOptions(TypedDict, total=False):
    """The values of a source, see `OPTIONS`."""

    text: str
    n: int
    revision: str
    glob: str
    format: str
    chat_template: str
    parse_special: bool
    sequences: int
    seed: int
    weight: int


class Option(NamedTuple):
    """An option of a source: how its value is read, and what it means."""

    parse: Callable[[str], object]
    metavar: str
    summary: str


class Source(NamedTuple):
    """A place and its options."""

    place: str
    options: SourceOptions

    @property
    def is_hub(self) -> bool:
        return self.place.startswith(HUB)

    def text(self) -> str:
        """As it is written; reading that gives the same source."""
        given = [f"{key}={_value(value)}" for key, value in self.options.items()]
        return self.place + ("?" + "&".join(given) if given else "")


def _number(text: str, least: int) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > MOST_DIGITS or int(text) < least:
        raise ValueError(f"a whole number of {least} or more, {MOST_DIGITS} digits at most")
    return int(text)


def _count(text: str) -> int:
    return _number(text, 1)


def _seed(text: str) -> int:
    return _number(text, 0)


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError("yes or no")
    return text == "yes"


def _filled(text: str) -> str:
    if not text:
        raise ValueError("not empty")
    return text


def home(text: str) -> str:
    """A path whose ``~`` is the home folder.

    Raises:
        ValueError: it is empty.
    """
    return os.path.expanduser(_filled(text))  # noqa: PTH111  # as text: what is no path stays as it is


OPTIONS: Mapping[str, Option] = {
    "text": Option(_filled, "KEY", "the key, or column, that holds the text, whatever form the row has"),
    "n": Option(_count, "N", "rows that are read at most (of a data set of the hub, of its rows in seeded order)"),
    "revision": Option(_filled, "REF", "branch, tag or commit of a data set of the hub (default: main)"),
    "glob": Option(_filled, "PATTERN", "the files of a folder that are read as one corpus, such as **/*.py"),
    "format": Option(_filled, "FORMAT", "of standard input: txt, json, jsonl, csv or tsv (default: txt)"),
    "chat_template": Option(home, "FILE", "Jinja template for chats, instead of the tokenizer's"),
    "parse_special": Option(_yes, "yes|no", "whether text that spells a special token is that token (default: no)"),
    "sequences": Option(_count, "N", "blocks of this corpus, instead of --sequences"),
    "seed": Option(_seed, "N", "of this corpus's sample, instead of --seed"),
    "weight": Option(_seed, "N", "of this corpus, for methods that have --weight; 0 leaves it out of the plan"),
}


def parse_source(text: str, what: str) -> Source:
    """Read a source.

    Args:
        text: a place, perhaps with options.
        what: it is called in messages.

    Raises:
        InputError: an unknown option, one that is given twice, or a value that is none.
    """
    text = home(text) if text.startswith("~") else text
    place, mark, given = text.partition("?")
    if not mark or (not text.startswith(HUB) and Path(text).exists()):
        return Source(text, {})
    found: dict[str, object] = {}
    for part in given.split("&"):
        key, equals, value = part.partition("=")
        if key not in OPTIONS:
            raise InputError(f"{what}: {unknown_name('option', key, OPTIONS)}")
        if not equals:
            raise InputError(f"{what}: {key} has no value. Give {key}={OPTIONS[key].metavar}")
        if key in found:
            raise InputError(f"{what}: {key} is given twice. Give it once")
        try:
            found[key] = OPTIONS[key].parse(unquote(value))
        except ValueError as error:
            raise InputError(f"{what}: {part} is out of range. Allowed: {error}") from None
    return Source(place, SourceOptions(**found))  # type: ignore[typeddict-item]  # the table gives the types


def with_options(text: str, options: Mapping[str, object], what: str) -> str:
    """A source with further options; those that it has stay.

    Raises:
        InputError: see `parse_source`.
    """
    source = parse_source(text, what)
    both = {**options, **source.options}
    return source._replace(options=SourceOptions(**both)).text()  # type: ignore[typeddict-item]  # as above


def hub_place(place: str, what: str) -> tuple[str, str | None, str]:
    """Data set, configuration and split of ``hf:OWNER/NAME[CONFIG]/SPLIT``; the split is ``train`` by default.

    Raises:
        InputError: it is written in another way.
    """
    found = _HUB.fullmatch(place.removeprefix(HUB))
    if found is None:
        raise InputError(f"{what}: {place} is no data set. Write hf:OWNER/NAME, hf:OWNER/NAME[CONFIG]/SPLIT")
    return found["path"], found["config"], found["split"] or "train"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return quote(str(value), safe="/*@:,+ ")
