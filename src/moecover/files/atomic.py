"""Writing so that nothing half-written ever looks finished: write to a hidden name beside the output, fsync, rename.

Also what error messages say of a failed write, and the check of an output before any work.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from moecover.errors import InputError, MoecoverError, arg

PARTIAL = ".partial"


def canonical_json(value: object) -> str:
    """JSON text with sorted keys and no NaN, for hashing: equal values have equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """SHA-256 of a JSON value, in hexadecimal: equal values have equal digests, whatever the order of their keys."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def stamp(path: Path) -> list[int]:
    """Size in bytes and modification time in nanoseconds of a file: both stay the same while nobody writes to it."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(doing: str, error: OSError) -> str:
    """One line on what was being done to which file, the error that the system reported, and the remedy."""
    remedy = "; free some space or choose another folder" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    file = " -> ".join(str(name) for name in (error.filename, error.filename2) if name)
    return f"{doing}: {file}{': ' if file else ''}{error.strerror or error}{remedy}"


@contextlib.contextmanager
def explained(doing: str, *, left: str = "Nothing was left behind") -> Iterator[None]:
    """Turn an OSError (disk full, no permission, ...) into a one-line MoecoverError.

    Args:
        doing: what the block does, such as ``writing FILE``.
        left: sentence on what a failure leaves behind.

    Raises:
        MoecoverError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise MoecoverError(f"{reason(doing, error)}. {left}") from error


def _beside(path: Path, ending: str) -> Path:
    """A unique hidden name next to ``path``."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{ending}")


@contextlib.contextmanager
def made_parents(path: Path) -> Iterator[None]:
    """Create the missing folders above ``path``; they are removed again if the block fails."""
    missing = [p for p in path.parents if not p.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears only when complete; see `new_file`."""
    write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name ``path`` only when the block ends without an error.

    Raises:
        InputError: ``path`` is a folder.
        MoecoverError: the disk is full or the folder cannot be written.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder, a file is to be written there. Give a file name")
    partial = _beside(path, PARTIAL)
    with explained(f"writing {path}"), made_parents(path):
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextlib.contextmanager
def kept_file(path: Path, draft: Path) -> Iterator[BinaryIO]:
    """Open a file for writing as `new_file` does, but under a fixed name that is kept for another attempt on failure.

    Args:
        path: the output.
        draft: where it is written; opened without truncation if it exists.

    Raises:
        MoecoverError: the disk is full or a folder cannot be written.
    """
    with explained(f"writing {path}", left=f"What was written is kept in {draft.parent}"):
        draft.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("r+b" if draft.exists() else "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.replace(path)
        sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that appears only when complete; see `new_file`."""
    with new_file(path) as file:
        file.write(content)


def resolved(path: str | Path) -> Path:
    """The absolute path of an output: a link is followed, its target is what gets replaced, on the disk where it lies.

    Raises:
        InputError: it leads nowhere (a link to itself, a name that no file system takes, a home folder of nobody).
    """
    try:
        found = Path(path).expanduser().resolve()
        found.exists()
        return found
    except (OSError, RuntimeError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{str(path)!r} cannot be an output: {what}. Choose another one") from error


def check_output(path: Path, *, overwrite: bool, marker: str, names: Sequence[str] | None = None) -> None:
    """Refuse an output folder that exists, unless it may be overwritten and was written by this program.

    Args:
        path: the folder to be written.
        overwrite: whether the user permits it.
        marker: name of a file by which a folder that this program wrote is recognised.
        names: shell patterns of the files that this program writes there, relative to the folder; any other file is the
            user's and is not overwritten. None where the caller looks itself.

    Raises:
        InputError: the folder exists, holds a file of the user's, cannot be read, or is a mount point.
    """
    path = resolved(path)
    try:
        _check_output(path, overwrite=overwrite, marker=marker)
        _check_files(path, names)
    except OSError as error:
        raise InputError(f"{reason(f'looking at the output {path}', error)}. Choose another one") from error


def _check_files(path: Path, names: Sequence[str] | None) -> None:
    """Refuse to replace a folder that holds other files than this program writes."""
    for file in sorted(path.rglob("*")) if names is not None and path.is_dir() else ():
        name = file.relative_to(path).as_posix()
        if (file.is_dir() and not file.is_symlink()) or any(fnmatch.fnmatchcase(name, p) for p in names or ()):
            continue
        raise InputError(
            f"{file} was not written by moecover, and overwriting would remove it. Move it away, or choose another "
            "output"
        )


def _check_output(path: Path, *, overwrite: bool, marker: str) -> None:
    if path.is_mount():
        raise InputError(f"{path} is a mount point, which cannot be replaced as a whole. Choose a folder inside it")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise InputError(f"{path} exists. Choose another output, or give {arg('overwrite')}")
    if not (path / marker).is_file():
        raise InputError(f"{path} was not written by moecover (it holds no {marker}), so it is not overwritten")


def put_in_place(folder: Path, path: Path, *, replaced: Path) -> None:
    """Flush a filled folder to disk and rename it to ``path``; what is there is renamed to ``replaced`` before."""
    for file in folder.rglob("*"):
        sync(file)
    sync(folder)
    if path.exists():
        path.rename(replaced)
    folder.rename(path)
    sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Create a folder to fill, which takes the name ``path`` only when the block ends without an error.

    A folder that existed at ``path`` is replaced; on any error or interrupt the unfinished folder is removed.

    Raises:
        MoecoverError: the disk is full or the folder cannot be written.
    """
    partial, replaced = _beside(path, PARTIAL), _beside(path, ".replaced")
    with explained(f"writing {path}"), made_parents(path):
        try:
            partial.mkdir()
            yield partial
            put_in_place(partial, path, replaced=replaced)
        except BaseException:
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(replaced, ignore_errors=True)
