"""Writing so that nothing half-written ever looks finished: write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moecover.errors import InputError, MoecoverError

PARTIAL = ".partial"


def canonical_json(value: Any) -> str:
    """JSON text that depends on the value alone (sorted keys, no NaN), for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn an OSError (disk full, no permission, ...) into one line that says what was being done."""
    try:
        yield
    except OSError as error:
        remedy = "; free some space or choose another folder" if error.errno == errno.ENOSPC else ""
        raise MoecoverError(f"{doing}: {error.strerror or error}{remedy}. Nothing was left behind.") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears only when complete."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that appears only when complete.

    Raises:
        MoecoverError: the disk is full or the folder cannot be written.

    """
    partial = path.with_name(path.name + PARTIAL)
    with explained(f"writing {path}"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


def check_output(path: Path, *, overwrite: bool, marker: str) -> None:
    """Refuse an output that exists, unless it may be overwritten and is one of ours.

    Args:
        path: the folder to be written.
        overwrite: the user's permission.
        marker: a file that tells that the folder was written by this program.

    Raises:
        InputError: the folder exists.

    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise InputError(f"{path} exists. Choose another output, or give --overwrite")
    if not (path / marker).is_file():
        raise InputError(f"{path} was not written by moecover (it holds no {marker}), so it is not overwritten")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name ``path`` only when the block ends without an error.

    What stood at ``path`` before is replaced; on any error or interrupt the unfinished folder is removed.
    """
    partial, replaced = path.with_name(path.name + PARTIAL), path.with_name(path.name + ".replaced")
    with explained(f"writing {path}"):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            for file in partial.rglob("*"):
                sync(file)
            sync(partial)
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                path.rename(replaced)
            partial.rename(path)
            sync(path.parent)
        except BaseException:
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
