"""All files of a GGUF model: reads the file that was named, and the other parts of a split one, which must fit it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moecover.errors import InputError
from moecover.gguf.header import MAGIC, Header, TensorInfo, read_header

ENDING = ".gguf"
PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
MAX_PARTS = 99_999  # what five digits hold


@dataclass(frozen=True)
class GgufFiles:
    """The files of a model, headers read.

    Attributes:
        parts: in order; one of a model that is not split. The first has the keys that describe the model.
    """

    parts: tuple[Header, ...]

    @property
    def first(self) -> Header:
        """The part that has the model's keys."""
        return self.parts[0]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name, in the order of the parts and of their headers."""
        return {name: info for part in self.parts for name, info in part.tensors.items()}


def is_gguf(path: str | Path) -> bool:
    """Whether a model is given as a GGUF file, by its name."""
    return str(path).lower().endswith(ENDING)


def begins_as_gguf(path: Path) -> bool:
    """Whether a file is one by its first bytes, whatever its name, as those that Ollama keeps."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def part_name(stem: str, number: int, count: int) -> str:
    """The name of a part, as llama.cpp looks for it; numbers count from 0."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}{ENDING}"


def stem_of(path: Path) -> str:
    """The name of a file without the ending, and without the number of a part."""
    found = PART_NAME.fullmatch(path.name)
    return found[1] if found else path.name[: -len(ENDING)] if is_gguf(path) else path.name


def open_gguf(path: Path) -> GgufFiles:
    """Read the headers of a model's files.

    Args:
        path: the file, of a split model the first part.

    Raises:
        InputError: a file is missing or malformed, it is not the first part, or a part belongs to another model.
    """
    if not path.is_file():
        raise InputError(f"no file {path}{_meant(path)}")
    first = read_header(path)
    count = first.number(COUNT) or 1
    if not 1 <= count <= MAX_PARTS:
        raise InputError(f"{path}: {COUNT} is {count}. Allowed: 1 to {MAX_PARTS}")
    if count == 1:
        return GgufFiles((first,))
    if (number := first.number(NUMBER)) != 0:
        raise InputError(
            f"{path} is part {(number or 0) + 1} of {count}. Give the first, {part_name('NAME', 0, count)}"
        )
    stem = stem_of(path)
    if path.name != part_name(stem, 0, count):
        raise InputError(
            f"{path} is the first of {count} parts, whose names end in {part_name('', 0, count)}. Rename it"
        )
    parts = [first]
    for number in range(1, count):
        file = path.with_name(part_name(stem, number, count))
        if not file.is_file():
            raise InputError(f"{file} is missing: {path.name} is the first of {count} parts. Fetch it")
        parts.append(read_header(file))
    _check(parts)
    return GgufFiles(tuple(parts))


def _meant(path: Path) -> str:
    """What may have been meant by a file that is not there."""
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    for one in beside:
        if (found := PART_NAME.fullmatch(one.name)) and (found[1], int(found[2])) == (stem_of(path), 1):
            return f". The model is split: give its first part, {one.name}"
    owner, *rest = path.parts
    if owner.endswith(":") or (len(rest) >= 2 and not path.is_absolute() and not beside):
        return ". Fetch it from the hub: hf download OWNER/NAME FILE.gguf --local-dir ."
    return ""


def _check(parts: list[Header]) -> None:
    """Refuse parts that do not make up one model.

    Raises:
        InputError: names the part.
    """
    first, where = parts[0], dict[str, Path]()
    for number, part in enumerate(parts):
        same = [part.number(key) == first.number(key) for key in (COUNT, TENSORS)]
        if part.number(NUMBER) != number or not all(same) or part.alignment != first.alignment:
            raise _another(part, first, f"it has {NUMBER} {part.number(NUMBER)}, {COUNT} {part.number(COUNT)}")
        if part.version != first.version:
            raise _another(part, first, f"it is GGUF of version {part.version}, not {first.version}")
        for name in part.tensors:
            if name in where:
                raise _another(part, first, f"tensor {name} is in {where[name].name} too")
            where[name] = part.path
        keys = [key for key in part.fields if key in first.fields and not key.startswith("split.")]
        if other := [key for key in keys if part.raw(key) != first.raw(key)]:
            raise _another(part, first, f"{other[0]} differs")
    if (total := first.number(TENSORS)) is not None and total != len(where):
        raise InputError(
            f"{first.path}: {TENSORS} is {total}, its {len(parts)} parts have {len(where)} tensors: a part is of "
            "another model. Fetch them again"
        )


def _another(part: Header, first: Header, why: str) -> InputError:
    return InputError(f"{part.path} is no part of the model of {first.path.name}: {why}. Fetch it again")
