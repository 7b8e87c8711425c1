"""Entries of blocks of a file, against numpy's own indexing; blocks larger than what is read at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moecover.errors import MoecoverError
from moecover.files import gathering
from moecover.files.gathering import ZEROS, Gather, Scratch, as_ranges, contents, num_bytes


def gathered(path: Path, part: Gather) -> bytes:
    with path.open("rb", buffering=0) as file:
        return b"".join(contents(file, part))


@pytest.mark.parametrize("block", [1, 40, 1000, 1 << 20])
@pytest.mark.parametrize("shape, unit", [((1, 50), 6), ((7, 30), 2), ((3, 11), 16), ((2, 5), 1)])
def test_as_numpy_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, shape: tuple[int, int], unit: int
) -> None:
    """Whatever part of a block is in memory at a time, in any order, and with entries of zeros."""
    monkeypatch.setattr(gathering, "BLOCK_BYTES", block)
    rng = np.random.default_rng(0)
    array = rng.integers(1, 255, size=(*shape, unit), dtype=np.uint8)
    (tmp_path / "f").write_bytes(b"before" + array.tobytes() + b"after")
    for ids in ([3, 1, 4], sorted(rng.choice(shape[1], 4, replace=False).tolist()), [0], [*range(shape[1])]):
        padded = [*ids, ZEROS, ZEROS]
        expected = np.concatenate([array[:, ids], np.zeros((shape[0], 2, unit), np.uint8)], axis=1)
        part = Gather(6, 6 + array.size, shape[1], unit, tuple(padded))
        assert gathered(tmp_path / "f", part) == expected.tobytes()
        assert num_bytes(part) == expected.size


@pytest.mark.parametrize("long", [1, 12, 1000])
def test_long_runs_are_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: int) -> None:
    monkeypatch.setattr(gathering, "LONG_BYTES", long)
    (tmp_path / "f").write_bytes(content := bytes(range(100)))
    for ids in ((2, 3, 4, 7, 8), (5,), (0, 1, 2), (9, 3, 4)):
        part = Gather(10, 70, 10, 6, ids)
        found = as_ranges(part)
        assert b"".join(gathered(tmp_path / "f", one) for one in found) == gathered(tmp_path / "f", part)
        assert b"".join(content[10 + 6 * i : 16 + 6 * i] for i in ids) == gathered(tmp_path / "f", part)
    assert as_ranges(Gather(10, 70, 10, 6, (2, 3, 4, 7, 8))) == (
        [(22, 40), (52, 64)] if long <= 15 else [Gather(10, 70, 10, 6, (2, 3, 4, 7, 8))]
    )
    for other in (Gather(10, 70, 5, 6, (0, 1)), Gather(10, 70, 10, 6, (1, 2, ZEROS)), (3, 9)):
        assert as_ranges(other) == [other]


def test_memory_that_is_used_again(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(content := bytes(range(96)))
    scratch = Scratch()
    with (tmp_path / "f").open("rb", buffering=0) as file:
        for part in (Gather(0, 96, 8, 3, (1, 5)), Gather(0, 24, 4, 3, (3, ZEROS)), Gather(48, 96, 16, 1, (2, 15))):
            again = b"".join(bytes(view) for view in contents(file, part, scratch))
            assert again == b"".join(contents(file, part))
    assert again == bytes(content[i] for i in (50, 63, 66, 79, 82, 95))


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(20))
    with pytest.raises(MoecoverError, match="ended at byte 20, 24 is needed"):
        gathered(tmp_path / "f", Gather(0, 24, 6, 2, (0,)))
