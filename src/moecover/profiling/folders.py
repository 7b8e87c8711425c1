"""Where a profile goes, and the state of its pass: folders, and what is refused of them."""

from __future__ import annotations

from pathlib import Path

from moecover.errors import InputError, arg
from moecover.files.atomic import PARTIAL
from moecover.profiling.artifact import FILE


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that no profile may be written to.

    Raises:
        InputError: it is a file, or holds a profile and ``overwrite`` is False.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file. Give a folder for the profile")
    if (folder / FILE).exists() and not overwrite:
        raise InputError(f"{folder / FILE} exists. Choose another folder, or give {arg('overwrite')}")


def scratch_beside(output: Path, what: str) -> Path:
    """The hidden folder beside an output where an interrupted job of it keeps its state."""
    return output.with_name(f".{output.name}.{what}{PARTIAL}")


def check_folder(folder: Path | None, keep_inputs: int | None, *, overwrite: bool) -> None:
    """Refuse a folder that no profile may be written to, and inputs that would be saved nowhere.

    Raises:
        InputError: see `check_output`; or there is no folder.
    """
    if folder is not None:
        check_output(folder, overwrite=overwrite)
    elif keep_inputs is not None:
        raise InputError(f"{arg('keep_inputs', keep_inputs)} has no folder to save them in: give {arg('output')}")
