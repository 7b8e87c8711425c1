"""Bytes from file to file: every way the system may offer, short copies, errors; the thread that hashes."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from moecover.errors import MoecoverError
from moecover.files import copying
from moecover.files.copying import followed, write_ranges
from moecover.files.hashing import file_hash

CONTENT = os.urandom(1_000_000)
RANGES = [(0, 10), (500_000, 900_000), (100, 300_000), (999_999, 1_000_000)]
EXPECTED = b"head" + b"".join(CONTENT[start:end] for start, end in RANGES)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(CONTENT)
    return tmp_path / "source"


def refusing(number: int) -> Callable[..., int]:
    def refuse(*arguments: object, **options: object) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


def no_write(size: int) -> None:
    pass


WAYS = ("copy_file_range", "sendfile", "write")  # the system calls that copy, in the order of preference


@pytest.mark.parametrize("way", WAYS)
def test_every_way_copies_the_same(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    for better in WAYS[: WAYS.index(way)]:
        monkeypatch.delattr(os, better)
    real, calls = getattr(os, way), list[int]()

    def counted(*arguments: object, **options: object) -> int:
        calls.append(1)
        return int(real(*arguments, **options))

    monkeypatch.setattr(os, way, counted)
    monkeypatch.setattr(copying, "CHUNK_BYTES", 70_000)
    sizes: list[int] = []
    write_ranges(tmp_path / "t", b"head", [(source, RANGES)], sizes.append)
    assert (tmp_path / "t").read_bytes() == EXPECTED
    assert len(calls) > 5
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (4, len(EXPECTED))
    assert len(sizes) > 5
    write_ranges(tmp_path / "t", b"short", [(source, [])], no_write)  # replaced, not written over
    assert (tmp_path / "t").read_bytes() == b"short"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("refused", [["copy_file_range"], ["copy_file_range", "sendfile"]])
def test_what_the_system_cannot_do_is_done_another_way(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: list[str], number: int
) -> None:
    for name in refused:
        monkeypatch.setattr(os, name, refusing(number))
    write_ranges(tmp_path / "t", b"head", [(source, RANGES)], no_write)
    assert (tmp_path / "t").read_bytes() == EXPECTED


def test_a_system_without_the_calls(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("copy_file_range", "sendfile", "posix_fadvise"):
        monkeypatch.delattr(os, name)
    with followed(lambda path, digest: None) as tell:
        write_ranges(tmp_path / "t", b"head", [(source, RANGES)], telling(tell, tmp_path / "t"))
        tell(None)
    assert (tmp_path / "t").read_bytes() == EXPECTED


@pytest.mark.parametrize("refused_after", [0, 3])
def test_short_copies_and_a_way_that_ends_midway(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_after: int
) -> None:
    """The kernel may copy less than it was asked for, and some file systems copy nothing without an error."""
    real, calls = os.copy_file_range, []

    def short(reader: int, writer: int, count: int, **options: int) -> int:
        calls.append(count)
        if len(calls) == refused_after:
            return 0
        return real(reader, writer, min(count, 33_333), **options)

    monkeypatch.setattr(os, "copy_file_range", short)
    write_ranges(tmp_path / "t", b"head", [(source, RANGES)], no_write)
    assert (tmp_path / "t").read_bytes() == EXPECTED
    assert len(calls) == (refused_after or len(calls))
    monkeypatch.setattr(os, "copy_file_range", refusing(errno.ENOSYS))
    monkeypatch.delattr(os, "sendfile")
    written = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: written(descriptor, content[:1000]))
    write_ranges(tmp_path / "t", b"head", [(source, RANGES)], no_write)
    assert (tmp_path / "t").read_bytes() == EXPECTED


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_an_error_names_both_files(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "copy_file_range", refusing(number))
    with pytest.raises(OSError, match=rf"{os.strerror(number)}: '.*source' -> '.*t'") as caught:
        write_ranges(tmp_path / "t", b"head", [(source, RANGES)], no_write)
    assert caught.value.errno == number


def test_a_source_that_is_too_short(source: Path, tmp_path: Path) -> None:
    with pytest.raises(MoecoverError, match=r"source ended at byte 1000000, 1000001 is needed: it changed while"):
        write_ranges(tmp_path / "t", b"head", [(source, [(5, 1_000_001)])], no_write)


def test_the_hash_of_a_file_is_that_of_its_bytes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "BUFFER_BYTES", 1000)
    assert file_hash(source) == xxhash.xxh3_128(CONTENT).hexdigest()


# ----------------------------------------------------------------------------------------------- the second thread
def telling(tell: Callable[[Path | int | None], None], path: Path) -> Callable[[int], None]:
    told: list[int] = []

    def written(size: int) -> None:
        if not told:
            tell(path)
        told.append(size)
        tell(size)

    return written


def test_files_are_hashed_while_they_grow(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "CHUNK_BYTES", 70_000)
    found: dict[str, str] = {}
    with followed(lambda path, digest: found.update({path.name: digest})) as tell:
        for name in ("a", "b"):
            write_ranges(tmp_path / name, name.encode(), [(source, RANGES)], telling(tell, tmp_path / name))
            tell(None)
    assert found == {name: file_hash(tmp_path / name) for name in ("a", "b")}
    assert found["a"] != found["b"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_a_failing_block_ends_the_thread(source: Path, tmp_path: Path, error: BaseException) -> None:
    found: list[str] = []
    with pytest.raises(type(error)), followed(lambda path, digest: found.append(path.name)) as tell:
        write_ranges(tmp_path / "a", b"", [(source, RANGES)], telling(tell, tmp_path / "a"))
        tell(None)
        write_ranges(tmp_path / "b", b"", [(source, RANGES)], telling(tell, tmp_path / "b"))
        raise error
    assert not any(thread.name == "follower" for thread in threading.enumerate())
    assert found == ["a"] or (found == [] and isinstance(error, KeyboardInterrupt))


@pytest.mark.parametrize("at_once", [False, True])
def test_a_failure_in_the_thread_is_raised(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), followed(lambda path, digest: None) as tell:
        write_ranges(tmp_path / "a", b"", [(source, RANGES)], telling(tell, tmp_path / "a"))
        tell(None)
        while at_once:  # told while the block still runs, too
            tell(tmp_path / "a")
