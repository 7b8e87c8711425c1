"""Writing so that nothing half-written ever looks finished: write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from moecover.errors import InputError, MoecoverError

PARTIAL = ".partial"
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}  # said by some network file systems
_held = threading.local()  # the lock files that this thread holds


def canonical_json(value: Any) -> str:
    """JSON text that depends on the value alone (sorted keys, no NaN), for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """SHA-256 of a JSON value, in hexadecimal: equal values have equal digests, whatever the order of their keys."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def stamp(path: Path) -> list[int]:
    """Size in bytes and modification time in nanoseconds of a file: both stay the same while nobody writes to it."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(doing: str, error: OSError) -> str:
    """One line on what was being done, to which file, what the system said to it, and the remedy."""
    remedy = "; free some space or choose another folder" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    file = " -> ".join(str(name) for name in (error.filename, error.filename2) if name)
    return f"{doing}: {file}{': ' if file else ''}{error.strerror or error}{remedy}"


@contextlib.contextmanager
def explained(doing: str, *, left: str = "Nothing was left behind") -> Iterator[None]:
    """Turn an OSError (disk full, no permission, ...) into one line that says what was being done."""
    try:
        yield
    except OSError as error:
        raise MoecoverError(f"{reason(doing, error)}. {left}") from error


def _beside(path: Path, ending: str) -> Path:
    """A name next to ``path`` that nothing else has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{ending}")


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Make the folders above ``path``; those that were made go again when the block fails."""
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
    """Write a text file that appears only when complete."""
    write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to fill, which takes the name ``path`` only when the block ends without an error.

    Raises:
        MoecoverError: the disk is full or the folder cannot be written.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder, a file is to be written there. Give a file name")
    partial = _beside(path, PARTIAL)
    with explained(f"writing {path}"), _parents(path):
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
    """A file to fill as in `new_file`, but in a place of its own, where it stays for another try when the block fails.

    Raises:
        MoecoverError: the disk is full or a folder cannot be written.
    """
    with explained(f"writing {path}", left=f"What was written stays in {draft.parent}"):
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


def check_output(path: Path, *, overwrite: bool, marker: str) -> None:
    """Refuse an output that exists, unless it may be overwritten and is one of ours.

    Args:
        path: the folder to be written.
        overwrite: the user's permission.
        marker: a file that tells that the folder was written by this program.

    Raises:
        InputError: the folder exists.
    """
    if path.is_mount():
        raise InputError(f"{path} is a mount point, which cannot be replaced as a whole. Choose a folder inside it")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise InputError(f"{path} exists. Choose another output, or give --overwrite")
    if not (path / marker).is_file():
        raise InputError(f"{path} was not written by moecover (it holds no {marker}), so it is not overwritten")


def _lock(file: Path) -> int | None:
    """A descriptor that holds the lock of a lock file, None when another process holds it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in NO_LOCKS:
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)  # the one who held it has removed the file meanwhile: there is a newer one, or none


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an output for this run until the block ends; a block within a block of the same thread passes.

    The lock is the kernel's, on a hidden file beside the output, and goes with the process however that ends: no lock is
    ever stale, though the empty file may stay. Where the file system knows no locks, nothing is held.

    Args:
        path: the output, a file or a folder, resolved; folders above it are made.

    Raises:
        InputError: another run holds it.
        MoecoverError: the folder cannot be written.
    """
    file = path.with_name(f".{path.name}.lock")
    held: set[Path] = _held.__dict__.setdefault("files", set())
    if file in held:
        yield
        return
    with contextlib.ExitStack() as stack:
        with explained(f"writing {path}"):
            stack.enter_context(_parents(path))
            descriptor = _lock(file)
        if descriptor is None:
            raise InputError(f"{path} is being written by another run. Wait for its end, or choose another output")
        stack.callback(os.close, descriptor)
        stack.callback(file.unlink, missing_ok=True)
        stack.callback(held.discard, file)
        held.add(file)
        yield


def put_in_place(folder: Path, path: Path, *, replaced: Path) -> None:
    """Flush a filled folder to the disk and give it the name ``path``; what stood there takes the name ``replaced``."""
    for file in folder.rglob("*"):
        sync(file)
    sync(folder)
    if path.exists():
        path.rename(replaced)
    folder.rename(path)
    sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name ``path`` only when the block ends without an error.

    What stood at ``path`` before is replaced; on any error or interrupt the unfinished folder is removed.
    """
    partial, replaced = _beside(path, PARTIAL), _beside(path, ".replaced")
    with explained(f"writing {path}"), _parents(path):
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
