"""Copying bytes from file to file as fast as the system allows, and hashing files.

The kernel copies where it can, so that no byte passes through this process except the hasher's small buffer, and memory
does not grow with the files. The hash is taken from the written file, in a second thread that follows the copying and
reads what the page cache still holds. The same thread starts the writing to disk early, so that little remains to wait
for at the end.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from moecover.errors import MoecoverError
from moecover.files.gathering import Gather, Range, Scratch, as_ranges, contents
from moecover.files.hashing import BUFFER_BYTES, feed

CHUNK_BYTES = 4 << 20  # the most that is copied between two checks for signals and for errors of the second thread
AHEAD_CHUNKS = 32  # how far ahead the disk is asked to read
# Errors of a system that has the call, but not for these files; the next way is tried.
UNSUPPORTED = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.ENOTSOCK}


def _in_kernel(source: int, target: int, start: int, count: int) -> int:
    return os.copy_file_range(source, target, count, offset_src=start)


def _sent(source: int, target: int, start: int, count: int) -> int:
    return os.sendfile(target, source, start, count)


def _by_hand(source: int, target: int, start: int, count: int) -> int:
    content = os.pread(source, min(count, BUFFER_BYTES), start)
    view = memoryview(content)
    while view:
        view = view[os.write(target, view) :]
    return len(content)


def _ways() -> list[Callable[[int, int, int, int], int]]:
    """The functions by which this system can append a byte range of one file to another, fastest first."""
    found = [way for name, way in (("copy_file_range", _in_kernel), ("sendfile", _sent)) if hasattr(os, name)]
    return [*found, _by_hand]


def advise(descriptor: int, start: int, count: int, advice: str) -> None:
    """Tell the system how a byte range of a file is going to be read (``WILLNEED``, ...), where it can be told."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, start, count, getattr(os, f"POSIX_FADV_{advice}"))


@contextlib.contextmanager
def _read_ahead(descriptor: int, ranges: list[tuple[int, int]]) -> Iterator[Iterator[tuple[int, int]]]:
    """The ranges in chunks, which a second thread requests from the disk ahead of time.

    The system's own read-ahead continues into the experts that are skipped and starts again after them, at half the
    speed. A request takes long, since it makes room in the page cache, hence the thread.
    """
    chunks = [(at, min(at + CHUNK_BYTES, end)) for start, end in ranges for at in range(start, end, CHUNK_BYTES)]
    room, over = threading.Semaphore(AHEAD_CHUNKS), threading.Event()

    def ask() -> None:
        for start, end in chunks:
            room.acquire()
            if over.is_set():
                return
            advise(descriptor, start, end - start, "WILLNEED")

    def in_turn() -> Iterator[tuple[int, int]]:
        for chunk in chunks:
            yield chunk
            room.release()

    if not hasattr(os, "posix_fadvise"):
        yield iter(chunks)
        return
    advise(descriptor, 0, 0, "RANDOM")  # no read-ahead but ours
    thread = threading.Thread(target=ask, name="reader ahead", daemon=True)
    thread.start()
    try:
        yield in_turn()
    finally:
        over.set()
        room.release()
        thread.join()  # before the descriptor is closed and its number given to another file


def write_ranges(
    target: Path, head: bytes, parts: Iterable[tuple[Path, Iterable[Range]]], written: Callable[[int], None]
) -> None:
    """Write a file that consists of some bytes followed by byte ranges of other files.

    Args:
        target: file to write; replaced.
        head: its first bytes.
        parts: source files, each with its ranges (start and end offset, or a `Gather`), in the order of the target.
        written: called with the size of the target, first when ``head`` is written, then as it grows.

    Raises:
        MoecoverError: a source ends before a range does.
        OSError: reading or writing failed; it names both files.
    """
    source = target
    try:
        with target.open("wb", buffering=0) as writer:
            writer.write(head)
            size = len(head)
            written(size)
            for source, ranges in parts:
                simpler = itertools.chain.from_iterable(map(as_ranges, ranges))
                for gathered, some in itertools.groupby(simpler, key=lambda part: isinstance(part, Gather)):
                    append = _append_gathered if gathered else _append
                    size = append(source, writer, list(some), size, written)
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(source), None, str(target)) from error
        raise


def _append_gathered(
    source: Path, writer: io.FileIO, ranges: list[Any], size: int, written: Callable[[int], None]
) -> int:
    """Append entries of blocks of one file; returns the new size."""
    told, scratch = size, Scratch()
    with source.open("rb", buffering=0) as reader:
        for number, part in enumerate(ranges):
            ahead = ranges[number : number + 4]
            advise(reader.fileno(), part.start, max(p.end for p in ahead) - part.start, "WILLNEED")
            for view in contents(reader, part, scratch):
                while view:
                    count = writer.write(view)
                    view, size = view[count:], size + count
                if size - told >= CHUNK_BYTES:
                    written(told := size)
    written(size)
    return size


def _append(source: Path, writer: io.FileIO, ranges: list[Any], size: int, written: Callable[[int], None]) -> int:
    """Append byte ranges of one file; returns the new size."""
    told, ways = size, _ways()
    with source.open("rb", buffering=0) as reader, _read_ahead(reader.fileno(), ranges) as chunks:
        for start, end in chunks:
            while start < end:
                try:
                    count = ways[0](reader.fileno(), writer.fileno(), start, end - start)
                except OSError as error:
                    if error.errno not in UNSUPPORTED or len(ways) == 1:
                        raise
                    count = 0
                if count == 0:  # the end of the file, or a file that this way cannot read: the last way tells
                    if len(ways) == 1:
                        raise MoecoverError(
                            f"{source} ended at byte {start}, {end} is needed: it changed while it was read"
                        )
                    del ways[0]
                start, size = start + count, size + count
                if size - told >= CHUNK_BYTES:
                    written(told := size)
    written(size)
    return size


# ------------------------------------------------------------------------------------------- hashing while writing
ABANDON = -1  # in place of a size: the file will not be completed
Told = Path | int | None  # a new file, its size so far, or that it is complete


class _StoppedError(Exception):
    """The second thread is to end."""


class _Follower:
    """The second thread of `followed`: reads what it is told from a queue, hashes and flushes the files."""

    def __init__(self, finished: Callable[[Path, str], None]) -> None:
        self._finished = finished
        self._told: queue.SimpleQueue[Told] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="follower", daemon=True)
        self._thread.start()

    def tell(self, item: Told) -> None:
        """Pass on an item, or raise what went wrong in the thread."""
        if self._failure is not None:
            raise self._failure
        self._told.put(item)

    def end(self, item: Told, *, at_once: bool = False) -> None:
        """Wait for the thread: until it has done what it was told, or with ``at_once`` until it notices."""
        if at_once:
            self._stopped.set()
        self._told.put(item)
        self._thread.join()

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            for path in iter(self._get, None):
                assert isinstance(path, Path)
                self._finished(path, self._hashed(path))
        except _StoppedError:
            pass
        except BaseException as error:
            self._failure = error

    def _get(self) -> Told:
        item = self._told.get()
        if self._stopped.is_set() or item == ABANDON:
            raise _StoppedError
        return item

    def _hashed(self, path: Path) -> str:
        digest = xxhash.xxh3_128()
        try:
            with path.open("rb", buffering=0) as file:
                for size in iter(self._get, None):
                    assert isinstance(size, int)
                    start = file.tell()
                    feed(digest, file, size)
                    # What is not on disk yet stays in the cache, but its writing begins now.
                    advise(file.fileno(), start, size - start, "DONTNEED")
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        return digest.hexdigest()


@contextlib.contextmanager
def followed(finished: Callable[[Path, str], None]) -> Iterator[Callable[[Told], None]]:
    """Hash and flush files in a second thread while the block writes them.

    Yields the function that reports how far the writing is: the path of a file that was just created, then its sizes as
    it grows, then None when it is complete. The block ends when all files are hashed and on disk. If it fails, the
    files that are complete are still finished; if it is interrupted, the thread stops at once.

    Args:
        finished: called in the second thread with every complete file, once it is on disk, and its hash.

    Raises:
        OSError: a file could not be read or flushed; raised by the yielded function or at the end.
    """
    follower = _Follower(finished)
    try:
        yield follower.tell
        follower.end(None)
    except BaseException as error:
        follower.end(ABANDON, at_once=not isinstance(error, Exception))
        raise
    follower.check()
