"""Locks on outputs, so that two runs do not write the same one: kernel locks on hidden files beside the outputs.

Claims are such locks on files that the caller names, for parts of a work that several processes share.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from moecover import rehearsal
from moecover.errors import InputError
from moecover.files.atomic import explained, made_parents

NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}  # from network file systems without locks
POLL_S = 0.2  # between two looks at a lock that another process holds
_held = threading.local()  # the lock files that this thread holds


def _lock(file: Path) -> int | None:
    """A descriptor that holds the lock of a lock file; None if another process holds it."""
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
        os.close(descriptor)  # its holder has removed the file in the meantime


def claim(file: Path) -> Callable[[], None] | None:
    """Take a lock file, which stays when it is given back: unlike an output's, many processes look at it all the time.

    Args:
        file: the lock file; its folder exists.

    Returns:
        What gives it back; None while another claim on it, of this process or another one, is held.

    Raises:
        MoecoverError: the folder cannot be written.
    """
    with explained(f"locking {file}"):
        descriptor = _lock(file)
    return None if descriptor is None else partial(os.close, descriptor)


def is_claimed(file: Path) -> bool:
    """Whether a claim on a lock file is held."""
    try:
        descriptor = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    finally:
        os.close(descriptor)
    return False


def _waited(file: Path, waiting: Callable[[], None]) -> int:
    """A descriptor that holds the lock of a lock file, which another process may hold until then."""
    if (descriptor := _lock(file)) is not None:
        return descriptor
    waiting()
    while (descriptor := _lock(file)) is None:
        time.sleep(POLL_S)
    return descriptor


def _busy(path: Path) -> InputError:
    return InputError(f"{path} is being written by another run. Wait until it ends, or choose another output")


@contextlib.contextmanager
def locked(path: Path, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Lock an output for this run until the block ends; nested blocks of the same thread pass.

    The kernel holds the lock, on a hidden file beside the output, and releases it when the process ends for any reason:
    no lock is ever stale, although the empty file may remain. On file systems without locks nothing is locked.

    Args:
        path: the output, a file or folder, resolved; missing folders above it are created.
        waiting: called once before waiting for another run that holds the lock; None refuses instead.

    Raises:
        InputError: another run holds the lock, and nobody is to wait for it.
        MoecoverError: the folder cannot be written.
    """
    file = path.with_name(f".{path.name}.lock")
    held: set[Path] = _held.__dict__.setdefault("files", set())
    if file in held:
        yield
        return
    if rehearsal.on():
        if waiting is None and is_claimed(file):
            raise _busy(path)
        yield
        return
    with contextlib.ExitStack() as stack:
        with explained(f"writing {path}"):
            stack.enter_context(made_parents(path))
            descriptor = _lock(file) if waiting is None else _waited(file, waiting)
        if descriptor is None:
            raise _busy(path)
        stack.callback(os.close, descriptor)
        stack.callback(file.unlink, missing_ok=True)
        stack.callback(held.discard, file)
        held.add(file)
        yield
