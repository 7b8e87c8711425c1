"""Bounded readers of JSON and YAML that come from outside: read text, return plain values, or say in one line why not.

A document is refused before it can exhaust the stack or the memory: by its size, its number of values, its depth, and
in YAML by what its aliases expand to. Text that is not Unicode (lone surrogates) is refused too, because no file,
terminal or tokenizer accepts it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

MAX_JSON_BYTES = 100_000_000  # as the safetensors library has it for headers; the index of 90,000 tensors takes 10 MB
MAX_VALUES = 3_000_000
MAX_DEPTH = 100
MAX_YAML_BYTES = 200_000
MAX_YAML_NODES = 20_000


class RepeatedKey(ValueError):
    """A JSON object has a key twice, of which Python's JSON would silently take the last one."""

    def __init__(self, key: str) -> None:
        """A repeated key.

        Args:
            key: as the document has it.
        """
        self.key = key
        super().__init__(f"it has the key {key[:40]!r} twice")


def parse_json(text: str | bytes, *, finite: bool = False, any_text: bool = False, unique: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: JSON; bytes are UTF-8.
        finite: refuse NaN and infinities, which Python's JSON accepts.
        any_text: accept lone surrogates, which crawled text has.
        unique: refuse a key that an object has twice, for what users write by hand.

    Raises:
        RepeatedKey: a key is there twice where that is refused; a ValueError too.
        ValueError: not JSON, too large, nested too deeply, not Unicode, or a number that is not finite where asked.
    """
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{len(text)} bytes of JSON, {MAX_JSON_BYTES} are allowed")
    document = text.decode("utf-8") if isinstance(text, bytes) else text
    if sum(map(document.count, "[{,")) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values in one JSON document")
    try:
        value = json.loads(document, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    _check(value, finite=finite, any_text=any_text)
    return value


def read_json(path: Path, *, finite: bool = False, unique: bool = False) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: see `parse_json`.
    """
    return parse_json(_read(path, MAX_JSON_BYTES), finite=finite, unique=unique)


def read_yaml(path: Path) -> tuple[object, yaml.Node | None]:
    """The value of a YAML file and its syntax tree, see `parse_yaml`.

    Raises:
        OSError: the file cannot be read.
        ValueError: see `parse_yaml`.
        yaml.YAMLError: not YAML.
    """
    return parse_yaml(_read(path, MAX_YAML_BYTES).decode("utf-8"))


def parse_yaml(text: str) -> tuple[object, yaml.Node | None]:
    """The value of a YAML text and its syntax tree, which has the line numbers; aliases may be used, within bounds.

    Raises:
        ValueError: too large, nested too deeply, aliases that expand to too much, or values that YAML does not define.
        yaml.YAMLError: not YAML.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"{len(text)} characters of YAML, {MAX_YAML_BYTES} are allowed")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None, None
        _check_nodes(node)
        value: object = yaml.safe_load(text)  # again from the text: merge keys change the tree
    except RecursionError:
        raise ValueError(_too_deep()) from None
    except (TypeError, AttributeError, LookupError, OverflowError) as error:  # PyYAML's, on tags that do not fit
        raise ValueError(f"a value that does not fit its tag: {error}") from None
    _check(value)
    return value, node


def keys_of(node: yaml.MappingNode) -> dict[str, int]:
    """The keys of a YAML mapping, each with its line.

    Raises:
        ValueError: a key is there twice, of which PyYAML would silently take the last one; begins with the line.
    """
    found: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in found:
            raise ValueError(f"line {line}: {key.value} is given twice, first in line {found[key.value]}")
        found[key.value] = line
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its pairs, none of the keys repeated."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKey(next(key for number, key in enumerate(keys) if key in keys[:number]))
    return found


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise ValueError(f"larger than {limit} bytes")
    return text


def _too_deep() -> str:
    return f"nested deeper than {MAX_DEPTH} levels"


def _check(value: object, *, finite: bool = False, any_text: bool = False) -> None:
    """Refuse what is too deep, text that is not Unicode and, where asked, numbers that are not finite."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for one in level:
            if isinstance(one, str):
                if not any_text:
                    _check_text(one)
            elif isinstance(one, float):
                if finite and not math.isfinite(one):
                    raise ValueError(f"it holds {one}, which is not a finite number")
            elif isinstance(one, (dict, list)):
                inner.extend(_parts(one))
        if not inner:
            return
        level = inner
    raise ValueError(_too_deep())


def _parts(value: dict[object, object] | list[object]) -> Iterable[object]:
    """Members of a container that have to be looked at."""
    members = (*value.keys(), *value.values()) if isinstance(value, dict) else value
    return (one for one in members if isinstance(one, (str, float, dict, list)))


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds the lone surrogate U+{ord(text[error.start]):04X}, which is not Unicode") from None


def _check_nodes(node: yaml.Node) -> None:
    """Refuse a syntax tree that is too deep or too large once its aliases are expanded."""
    level, seen = [node], 1
    for _ in range(MAX_DEPTH):
        children = (child for one in level for child in _children(one))
        level = list(islice(children, MAX_YAML_NODES + 1))
        seen += len(level)
        if seen > MAX_YAML_NODES:
            raise ValueError(f"more than {MAX_YAML_NODES} values, aliases expanded")
        if not level:
            return
    raise ValueError(_too_deep())


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value
