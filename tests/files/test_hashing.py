"""Hashes and seals: against the libraries, and that any change is found."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from moecover.files.hashing import SEAL, array_hash, file_hash, hash_of, sealed, unsealed
from moecover.files.tensor_file import read_tensors, tensor_bytes

DOCUMENT = {"b": [1, 2.5, None, {"x": "é"}], "a": {"2": True, "10": 0.1}}
TENSORS = {"c/sum": np.linspace(0, 1, 6).reshape(2, 3), "c/count": np.arange(6, dtype=np.int64).reshape(2, 3)}


def test_hashes_are_those_of_the_library(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "f").write_bytes(content)
    assert file_hash(tmp_path / "f") == hash_of(content) == xxhash.xxh3_128(content).hexdigest()


def test_a_seal_is_the_hash_of_the_canonical_text() -> None:
    text = json.dumps(DOCUMENT, sort_keys=True, separators=(",", ":"))
    made = sealed(DOCUMENT)
    assert made == {**DOCUMENT, SEAL: hashlib.sha256(text.encode()).hexdigest()}
    assert unsealed(json.loads(json.dumps(made))) == DOCUMENT


@pytest.mark.parametrize("value", [{1: "a", 10: "b", 2: "c"}, {"t": (1, 2)}])
def test_a_seal_survives_the_way_through_a_file(value: dict[Any, Any]) -> None:
    assert unsealed(json.loads(json.dumps(sealed(value)))) == json.loads(json.dumps(value))


def test_changes_are_found() -> None:
    made: dict[str, Any] = sealed(copy.deepcopy(DOCUMENT))
    made["b"][3]["x"] = "e"
    with pytest.raises(ValueError, match="was changed since it was written"):
        unsealed(made)
    with pytest.raises(ValueError, match="has no `sha256`"):
        unsealed(DOCUMENT)
    assert unsealed(DOCUMENT, required=False) == DOCUMENT
    with pytest.raises(ValueError, match="holds list"):
        unsealed([])


def test_the_hash_of_an_array_depends_on_type_and_shape() -> None:
    array = np.arange(6, dtype=np.int64)
    same = (array.reshape(2, 3), array.reshape(3, 2), array.view(np.uint64), array.view(np.float64), array.byteswap())
    assert len({array_hash(a) for a in (array, *same)}) == 6
    assert array_hash(array.reshape(2, 3).T.copy().T) == array_hash(array.reshape(2, 3))


def test_every_flipped_bit_of_a_tensor_file_is_found_or_changes_nothing(tmp_path: Path) -> None:
    content, path = tensor_bytes(TENSORS, DOCUMENT), tmp_path / "t"
    path.write_bytes(content)
    document, tensors = read_tensors(path)
    assert document == DOCUMENT
    assert all(np.array_equal(tensors[name], TENSORS[name]) for name in TENSORS)
    rng, harmless = np.random.default_rng(0), 0
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            document, tensors = read_tensors(path)
        except ValueError:
            continue
        harmless += 1
        assert document == DOCUMENT
        for name, tensor in tensors.items():
            assert tensor.dtype == TENSORS[name].dtype
            assert np.array_equal(tensor, TENSORS[name])
    assert harmless <= 8  # the spaces that pad the header
