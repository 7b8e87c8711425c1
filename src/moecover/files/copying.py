"""Bytes from file to file as fast as the system can, and the hash of a file.

The kernel copies where it knows how, so no byte passes through this process but the hasher's small buffer, and memory does
not grow with the files. The hash is taken from the written file, in a second thread that follows the copying: it reads
what the page cache still holds. The same thread has the disk write early, so that little is left to wait for at the end.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import xxhash

from moecover.errors import MoecoverError

HASH = "xxh3_128"  # as the manifest calls it
CHUNK_BYTES = 4 << 20  # at most so much between two looks at signals and at the second thread
AHEAD_CHUNKS = 32  # what the disk is asked for before its turn
BUFFER_BYTES = 256 << 10  # fits the second-level cache: the hasher is a fifth faster than with megabytes
# What a system says that has the call, but not for these files; the next way is tried.
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
    """How this system can append a byte range of one file to another, fastest first."""
    found = [way for name, way in (("copy_file_range", _in_kernel), ("sendfile", _sent)) if hasattr(os, name)]
    return [*found, _by_hand]


def _advise(descriptor: int, start: int, count: int, advice: str) -> None:
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, start, count, getattr(os, f"POSIX_FADV_{advice}"))


@contextlib.contextmanager
def _read_ahead(descriptor: int, ranges: list[tuple[int, int]]) -> Iterator[Iterator[tuple[int, int]]]:
    """The ranges in chunks, which a second thread asks of the disk some time before their turn.

    The system's own reading ahead goes on into the experts that are skipped and starts anew behind them, at half the speed;
    asking takes long, since it makes room in the page cache, hence the thread.
    """
    chunks = [(at, min(at + CHUNK_BYTES, end)) for start, end in ranges for at in range(start, end, CHUNK_BYTES)]
    room, over = threading.Semaphore(AHEAD_CHUNKS), threading.Event()

    def ask() -> None:
        for start, end in chunks:
            room.acquire()
            if over.is_set():
                return
            _advise(descriptor, start, end - start, "WILLNEED")

    def in_turn() -> Iterator[tuple[int, int]]:
        for chunk in chunks:
            yield chunk
            room.release()

    if not hasattr(os, "posix_fadvise"):
        yield iter(chunks)
        return
    _advise(descriptor, 0, 0, "RANDOM")  # no reading ahead but ours
    thread = threading.Thread(target=ask, name="reader ahead", daemon=True)
    thread.start()
    try:
        yield in_turn()
    finally:
        over.set()
        room.release()
        thread.join()  # before the descriptor is closed and its number given to another file


def write_ranges(
    target: Path, head: bytes, parts: Iterable[tuple[Path, Iterable[tuple[int, int]]]], written: Callable[[int], None]
) -> None:
    """Write a file from some bytes and byte ranges of other files.

    Args:
        target: file to write; replaced.
        head: what comes first.
        parts: other files, each with starts and ends in it, in the order of the target.
        written: called with the size of the target, first when it is there with ``head``, then as it grows.

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
                size = _append(source, writer, list(ranges), size, written)
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(source), None, str(target)) from error
        raise


def _append(
    source: Path, writer: io.FileIO, ranges: list[tuple[int, int]], size: int, written: Callable[[int], None]
) -> int:
    """Append byte ranges of one file; the new size."""
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
                if count == 0:  # the end of the file, or one that this way cannot read: reading itself tells
                    if len(ways) == 1:
                        raise MoecoverError(f"{source} ended at byte {start}, {end} is needed: it changed while it was read")  # fmt: skip
                    del ways[0]
                start, size = start + count, size + count
                if size - told >= CHUNK_BYTES:
                    written(told := size)
    written(size)
    return size


def _feed(digest: xxhash.xxh3_128, file: io.FileIO, stop: int = sys.maxsize) -> None:
    """Read on to the position ``stop`` or the end."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    while (left := stop - file.tell()) > 0 and (count := file.readinto(buffer[:left])):
        digest.update(buffer[:count])


def file_hash(path: Path) -> str:
    """The hash of a file's bytes (`HASH`), in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        _feed(digest, file)
    return digest.hexdigest()


ABANDON = -1  # in place of a size: the file will not be completed


class _StoppedError(Exception):
    """The second thread is to end."""


@contextlib.contextmanager
def followed(finished: Callable[[Path, str], None]) -> Iterator[Callable[[Path | int | None], None]]:
    """A second thread that hashes and flushes files while they are written.

    Yields the function that tells it how far the writing is: the path of a file that has just been made, then its sizes as
    it grows, then None when it is complete. The block ends when all files are hashed and on the disk. When it fails, those
    that are complete are still finished; when it is interrupted, the thread stops where it is.

    Args:
        finished: called in the second thread with every complete file, once it is on the disk, and its hash.

    Raises:
        OSError: a file could not be read or flushed; raised by the function that tells, or at the end.
    """
    told: queue.SimpleQueue[Path | int | None] = queue.SimpleQueue()
    stopped, failures = threading.Event(), list[BaseException]()

    def get() -> Path | int | None:
        item = told.get()
        if stopped.is_set() or item == ABANDON:
            raise _StoppedError
        return item

    def hashed(path: Path) -> str:
        digest = xxhash.xxh3_128()
        with path.open("rb", buffering=0) as file:
            for size in iter(get, None):
                assert isinstance(size, int)
                start = file.tell()
                _feed(digest, file, size)
                # What is not on the disk yet stays in the cache, but its writing begins now.
                _advise(file.fileno(), start, size - start, "DONTNEED")
            os.fsync(file.fileno())
        return digest.hexdigest()

    def follow() -> None:
        with contextlib.suppress(_StoppedError):
            for path in iter(get, None):
                assert isinstance(path, Path)
                try:
                    digest = hashed(path)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(path)) from error
                finished(path, digest)

    def work() -> None:
        try:
            follow()
        except BaseException as error:
            failures.append(error)

    def tell(item: Path | int | None) -> None:
        if failures:
            raise failures[0]
        told.put(item)

    thread = threading.Thread(target=work, name="follower", daemon=True)
    thread.start()
    try:
        yield tell
        told.put(None)
        thread.join()
    except BaseException as error:
        if not isinstance(error, Exception):
            stopped.set()
        told.put(ABANDON)
        thread.join()
        raise
    if failures:
        raise failures[0]
