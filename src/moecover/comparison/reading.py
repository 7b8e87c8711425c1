"""From a YAML file, flags, or a mapping to a checked configuration: gives a `Request`.

An error is one line with the file and the line number (or the flag) of the mistake.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from moecover.comparison.config import Config, FileEntry, MethodEntry, ModelEntry
from moecover.comparison.yaml_lines import KeyPath, Places, load
from moecover.corpora.grammar import MIX_ENDINGS
from moecover.corpora.mixes import placed, read_mix
from moecover.errors import InputError, arg
from moecover.gguf.parts import is_gguf
from moecover.runtime.placement import WAYS, map_in

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

TEXTS = ("calibration", "perplexity")  # fields that hold corpora
FOLDERS = ("data_dir", "include_path", "libllama", "plugins")  # fields that hold paths
PATHS = ("model", "files", "file")  # keys of a model, and of its files
MOST_KEYS = 12  # known keys that a message lists
BUDGETS = ("retain", "keep", "shapes")  # fields of which one says what is kept


@dataclass(frozen=True)
class Request:
    """A configuration, and where its fields come from, so that a mistake that is found later has its line too."""

    config: Config
    places: Places = field(default_factory=Places)

    def error(self, error: InputError | str, *at: str | int) -> InputError:
        """The error with its place in the file."""
        return self.places.error(str(error), at)


def read(path: Path | None, flags: Mapping[str, object]) -> Request:
    """Read a configuration from a YAML file, from flags, or from both: a flag replaces the file's field.

    Args:
        path: the file; None if there are only flags. Paths in it are relative to its folder.
        flags: fields of `Config` by name. Paths are relative to the current folder.

    Raises:
        InputError: no such file, not YAML, an unknown key, a wrong value; with the line.
    """
    value: dict[str, object] = {}
    lines: dict[KeyPath, int] = {}
    if path is not None:
        value, lines = load(path)
    places = Places("" if path is None else str(path), lines, tuple(flags))
    if path is not None:
        value = _absolute({k: v for k, v in value.items() if k not in flags}, path.absolute().parent, places)
    value = {**value, **_absolute(flags, Path.cwd(), places)}
    if any(name in flags for name in BUDGETS):
        value = {k: v for k, v in value.items() if k not in BUDGETS or k in flags}
    return Request(_validated(value, places), places)


def request(config: Config | Mapping[str, object] | Path | str) -> Request:
    """What `read` gives, from any form of a configuration: an object, its fields, or the path of a YAML file.

    Raises:
        InputError: as `read`.
    """
    if isinstance(config, Config):
        return Request(config)
    if isinstance(config, Mapping):
        return Request(_validated(_absolute(config, Path.cwd(), Places()), Places()))
    return read(Path(config), {})


def _validated(value: Mapping[str, object], places: Places) -> Config:
    try:
        return Config.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise places.error(_message(first), first["loc"]) from error


def _message(error: ErrorDetails) -> str:
    """What pydantic found, in one line."""
    at = tuple(part for part in error["loc"] if not (isinstance(part, str) and part.startswith(("function-", "list["))))
    name = ".".join(str(part) for part in at)
    if error["type"] == "extra_forbidden":
        known = list(_keys_at(at[:-1]))
        close = difflib.get_close_matches(str(at[-1]), known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        more = " ... (`moecover init` writes all of them)" if len(known) > MOST_KEYS else ""
        return f"unknown key {at[-1]!r}.{hint} Known: {', '.join(known[:MOST_KEYS])}{more}"
    if error["type"] == "missing":
        return f"`{name}` is missing"
    if error["type"] == "too_short":
        return f"`{name}`: at least one value is needed"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    got = f", not {error['input']!r}" if not isinstance(error["input"], (dict, BaseModel)) else ""
    return f"`{name}`: {error['msg'][0].lower()}{error['msg'][1:]}{got}"


def _keys_at(at: KeyPath) -> Iterable[str]:
    """The keys that are allowed at a place."""
    entries: dict[str, type[BaseModel]] = {"models": ModelEntry, "methods": MethodEntry, "files": FileEntry}
    keys = [part for part in at if isinstance(part, str)]
    entry = entries.get(keys[-1]) if keys else Config
    return entry.model_fields if entry is not None else ()


def _absolute(value: Mapping[str, object], folder: Path, places: Places) -> dict[str, object]:
    """The fields with relative paths joined to a folder, mixes and files of devices by what they hold; others stay.

    Raises:
        InputError: a mix or a file of devices that cannot be read, or a source that is none, with its place.
    """

    def path(text: object) -> object:
        return str(folder / text) if isinstance(text, str) else text

    def devices(asked: object) -> object:
        if not isinstance(asked, str) or asked in WAYS:
            return asked
        try:
            return map_in(folder / asked, arg("device_map", asked))
        except InputError as error:
            raise places.error(str(error), ("device_map",)) from error

    def model(entry: object) -> object:
        if isinstance(entry, dict):
            return {key: each(model, one) if key in PATHS else one for key, one in entry.items()}
        if isinstance(entry, str) and is_gguf(entry):
            path = folder / os.path.expanduser(entry)  # noqa: PTH111
            return os.path.abspath(path)  # noqa: PTH100  # links stay: in the hub's cache they have the names
        return str((folder / entry).resolve()) if isinstance(entry, str) and (folder / entry).is_dir() else entry

    def each(change: Callable[[object], object], found: object) -> object:
        return [each(change, one) for one in found] if isinstance(found, list) else change(found)

    changes: dict[str, Callable[[object], object]] = {
        "models": model,
        "device_map": devices,
        **dict.fromkeys(FOLDERS, path),
    }
    found = {key: each(changes[key], one) if key in changes else one for key, one in value.items()}
    return found | {key: _sources(value[key], folder, places, (key,)) for key in TEXTS if key in value}


def _sources(value: object, folder: Path, places: Places, at: KeyPath) -> object:
    """Corpora with absolute paths, a mix as its corpora; values that are no corpora stay.

    Args:
        value: an argument, a list of them, or a list of such lists.
        folder: relative paths begin there.
        places: of the configuration.
        at: where the value is in it.
    """
    if isinstance(value, str):
        try:
            if value.lower().endswith(MIX_ENDINGS) and "=" not in value:
                return read_mix(folder / value)
            name, equals, source = value.partition("=")
            return [f"{name}={placed(source, f'corpus {name}', folder)}" if equals and source else value]
        except InputError as error:
            raise places.error(str(error), at) from error
    if not isinstance(value, list):
        return value
    found: list[object] = []
    for number, one in enumerate(value):
        made = _sources(one, folder, places, (*at, number))
        found += made if isinstance(one, str) and isinstance(made, list) else [made]
    return found
