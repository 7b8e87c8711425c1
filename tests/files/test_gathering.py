"""Entries of blocks of a file, against numpy's own indexing; blocks larger than what is read at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moecover.errors import MoecoverError
from moecover.files import gathering
from moecover.files.gathering import ZEROS, Gather, contents, num_bytes


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


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(20))
    with pytest.raises(MoecoverError, match="ended at byte 20, 24 is needed"):
        gathered(tmp_path / "f", Gather(0, 24, 6, 2, (0,)))
