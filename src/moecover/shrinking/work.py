"""The folder of what `shrink` makes on the way: whose it is, so that another call does not take it for its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.errors import InputError, arg
from moecover.files.atomic import resolved, write_text
from moecover.files.hashing import sealed, unsealed
from moecover.files.reading import read_json

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure

FILE = "shrink.json"
PROFILE, PLAN, EVALUATION = "profile", "plan.json", "evaluation"  # the last two in a folder of the budget


def check_folder(work: Path, others: Sequence[str | Path]) -> None:
    """Refuse a folder that nothing may be written to, before any work is done.

    Args:
        work: the folder.
        others: the output and the model, which it may not be, lie in, or hold.

    Raises:
        InputError: it overlaps one of them, is a file, or holds something else.
    """
    place = resolved(work)
    for other in map(resolved, others):
        if place == other or other in place.parents or place in other.parents:
            raise InputError(f"{arg('work', work)} and {other} overlap. Choose another folder")
    if work.exists() and not work.is_dir():
        raise InputError(f"{work} is a file. Give another folder as {arg('work')}")
    if work.is_dir() and not (work / FILE).is_file() and any(work.iterdir()):
        raise InputError(f"{work} holds other files. Give another folder as {arg('work')}")


def claim(work: Path, structure: Structure, quality: str, *, own_text: bool) -> None:
    """Note in a folder what it is for, or refuse it where it is for something else; see `check_claim`."""
    inputs = check_claim(work, structure, quality, own_text=own_text)
    if not (file := work / FILE).is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(sealed(inputs), indent=1) + "\n")


def check_claim(work: Path, structure: Structure, quality: str, *, own_text: bool) -> dict[str, object]:
    """What a folder is for, refused where its note says something else.

    The text that the model writes and the profile depend on the model and on how much text is read, not on the budget:
    one folder serves several.

    Args:
        work: the folder; one without a note is for anything.
        structure: the model.
        quality: by name.
        own_text: whether the model writes text.

    Raises:
        InputError: it belongs to another model or quality, or its note is damaged.
    """
    inputs: dict[str, object] = {"model": structure.model_fingerprint, "quality": quality, "own_text": own_text}
    if not (file := work / FILE).is_file():
        return inputs
    try:
        found = unsealed(read_json(file))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be used: {error}. Give another folder as {arg('work')}") from error
    if differs := [name for name, value in inputs.items() if found.get(name) != value]:
        raise InputError(
            f"{work} was made with another {differs[0]}: {found.get(differs[0])}, now {inputs[differs[0]]}. Give "
            f"another folder as {arg('work')}, or remove it"
        )
    return inputs
