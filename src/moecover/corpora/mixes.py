"""A mix of corpora in a file: reads YAML, returns what `--corpus` would have been given, one argument a corpus.

The file is a list of entries: ``name``, ``source`` (without one, the named corpus) and any option of a source, such as
``weight``, ``sequences`` and ``seed``; or of arguments, ``NAME`` and ``NAME=SOURCE``. Paths are relative to its folder.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from moecover.corpora.grammar import HUB, OPTIONS, STANDARD_INPUT, Source, home, parse_source, with_options
from moecover.corpora.sources import CORPORA
from moecover.errors import InputError
from moecover.files.reading import keys_of, read_yaml
from moecover.registry import unknown_name

KEYS = ("name", "source", *OPTIONS)


def read_mix(path: Path) -> list[str]:
    """The arguments that a mix stands for.

    Raises:
        InputError: no such file, not YAML, or an entry with an unknown key, one twice, or no name; with the line.
    """
    try:
        value, node = read_yaml(path)
    except OSError as error:
        raise InputError(f"mix {path} could not be read: {error.strerror or error}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"mix {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, list) or not isinstance(node, yaml.SequenceNode) or not value:
        raise InputError(f"mix {path}: it must be a list of corpora, each with a name")
    lines = [entry.start_mark.line + 1 for entry in node.value]
    try:
        for entry in node.value:
            if isinstance(entry, yaml.MappingNode):
                keys_of(entry)
    except ValueError as error:
        raise InputError(f"mix {path}, {error}") from error
    return [_argument(entry, f"mix {path}, line {line}", path.parent) for entry, line in zip(value, lines, strict=True)]


def _argument(entry: object, where: str, folder: Path) -> str:
    """One corpus as an argument."""
    if isinstance(entry, str):
        before, equals, text = entry.partition("=")
        return f"{before}={placed(text, where, folder)}" if equals else before
    if not isinstance(entry, dict):
        raise InputError(f"{where}: {entry!r} is no corpus. Give its name, source, weight, sequences and seed")
    if unknown := [key for key in entry if key not in KEYS]:
        raise InputError(f"{where}: {unknown_name('key', str(unknown[0]), KEYS)}")
    name = entry.get("name")
    if name is None or name == "":
        raise InputError(f"{where}: the corpus has no name. Give it one")
    for key in ("name", "source", "chat_template"):
        if key in entry and (not isinstance(entry[key], str) or not entry[key]):
            raise InputError(f"{where}: {key} is {entry[key]!r}, which is no text. Put it in quotes")
    text = placed(str(entry.get("source", name)), where, folder)
    options = {key: _value(value) for key, value in entry.items() if key in OPTIONS}
    if "chat_template" in options:
        options["chat_template"] = folder / home(str(options["chat_template"]))
    if not options:
        return f"{name}={text}" if "source" in entry else name
    given = with_options(text, options, where)
    parse_source(given, where)
    return f"{name}={given}"


def _value(value: object) -> object:
    """A value as it is written in a source."""
    return ("yes" if value else "no") if isinstance(value, bool) else value


def placed(text: str, where: str, folder: Path) -> str:
    """A source whose relative paths begin at a folder: that of the file that names it.

    Args:
        text: the source.
        where: what messages call it.
        folder: of the mix or the configuration.

    Raises:
        InputError: see `parse_source`.
    """
    place, options = parse_source(text, where)
    if "chat_template" in options:
        options = {**options, "chat_template": str(folder / options["chat_template"])}
    named = place == STANDARD_INPUT or place.startswith(HUB) or place in CORPORA
    return Source(place if named else str(folder / place), options).text()
