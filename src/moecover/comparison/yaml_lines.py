"""YAML with line numbers, so that an error names its line: reads a YAML file, places errors in it.

A place within the file is a `KeyPath`: the keys and list positions that lead to it from the top, ``("methods", 1)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from moecover.errors import InputError, arg
from moecover.files.reading import keys_of, read_yaml

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Places:
    """Where the fields of a configuration come from.

    Attributes:
        file: the YAML file; empty if there is none.
        lines: line of every key and value in it.
        flags: fields that were given on the command line, which have no line.
    """

    file: str = ""
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    def error(self, text: str, at: KeyPath) -> InputError:
        """The error for a place: it names the flag, or the file and the line of the nearest place that has one."""
        if at and at[0] in self.flags:
            return InputError(f"{arg(str(at[0]))}: {text}")
        if not self.file:
            return InputError(text)
        while at and at not in self.lines:
            at = at[:-1]
        return InputError(f"{self.file}, line {self.lines[at]}: {text}" if at else f"{self.file}: {text}")


def load(path: Path) -> tuple[dict[str, object], dict[KeyPath, int]]:
    """The fields of a YAML file, and the line of every place in it.

    Raises:
        InputError: no such file, not YAML, not a mapping, or a key that is given twice.
    """
    try:
        value, node = read_yaml(path)
    except FileNotFoundError:
        raise InputError(f"no configuration {path}. docs/compare.md says how to write one") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict) or node is None:
        raise InputError(f"{path} holds no keys with values. docs/compare.md says how to write one")
    try:
        return value, dict(_lines(node))
    except ValueError as error:
        raise InputError(f"{path}, {error}") from error


def _lines(node: yaml.Node, at: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    """The line of every key and value below a node.

    Raises:
        ValueError: a key is given twice.
    """
    yield at, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        lines = keys_of(node)
        for key, value in node.value:
            yield from _lines(value, (*at, key.value))
            yield (*at, key.value), lines[key.value]
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _lines(value, (*at, number))
