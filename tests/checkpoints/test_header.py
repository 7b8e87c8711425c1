"""The header of a safetensors file: what the library writes is read, what it would not open is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moecover.checkpoints.header import DTYPE_BITS, read_header
from moecover.errors import InputError


def write(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_of_the_library(tmp_path: Path, dtype: str) -> None:
    """Eight numbers of any type fill whole bytes; the library takes the same size, and no other."""
    size = DTYPE_BITS[dtype]
    file = write(tmp_path / "x", {"w": entry(dtype, [2, 4], [0, size])}, bytes(size))
    entries, metadata = read_header(file)
    assert (entries["w"].dtype, entries["w"].shape, entries["w"].num_bytes, metadata) == (dtype, (2, 4), size, None)
    with safe_open(file, "np") as opened:
        assert opened.get_slice("w").get_shape() == [2, 4]
    with pytest.raises(InputError, match="but the header gives it bytes"):
        read_header(write(tmp_path / "y", {"w": entry(dtype, [2, 5], [0, size])}, bytes(size)))


def test_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "fp8": torch.zeros(3, 2, dtype=torch.float8_e4m3fn),
        "scale": torch.zeros(3, dtype=torch.float8_e8m0fnu),
        "scalar": torch.tensor(1.0, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "complex": torch.zeros(2, dtype=torch.complex64),
    }
    save_file(tensors, tmp_path / "x", metadata={"format": "pt", "ü": ""})
    entries, metadata = read_header(tmp_path / "x")
    assert {name: e.shape for name, e in entries.items()} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert metadata == {"format": "pt", "ü": ""}


BAD: list[tuple[Any, str]] = [
    ({"__metadata__": {"a": 5}}, "__metadata__ has int under 'a', a text is needed"),
    ({"__metadata__": {"a": None}}, "__metadata__ has NoneType under 'a'"),
    ({"__metadata__": {"a": {}}}, "__metadata__ has dict under 'a'"),
    ({"__metadata__": 5}, "__metadata__ is int, an object of texts is needed"),
    ({"__metadata__": "x"}, "__metadata__ is str"),
    ({"__metadata__": []}, "__metadata__ is list"),
    ({"w": entry(dtype=None)}, "has the unknown type None"),
    ({"w": entry(dtype="float32")}, "has the unknown type float32"),
    ({"w": entry(dtype="f32")}, "has the unknown type f32"),
    ({"w": entry(shape="2")}, "no valid safetensors header"),
    ({"w": entry(shape={"2": 1})}, "no valid safetensors header"),
    ({"w": entry(shape=[2.0])}, "no valid safetensors header"),
    ({"w": entry(shape=[True, 2])}, "no valid safetensors header"),
    ({"w": entry(shape=None)}, "no valid safetensors header"),
    ({"w": entry(offsets=[0, 8, 16])}, "no valid safetensors header"),
    ({"w": entry(offsets=[0, 8.0])}, "no valid safetensors header"),
    ({"w": entry(offsets=[-8, 0])}, "no valid safetensors header"),
    ({"w": entry(offsets=[8, 0])}, "but the header gives it bytes 8 to 0"),
    ({"w": entry(offsets=[4, 12])}, "but the header gives it bytes 4 to 12"),
    ({"w": entry(), "v": entry()}, "but the header gives it bytes 0 to 8"),
    ({"w": entry(shape=[10**40] * 200)}, "has a shape or offsets that no file can hold"),
    ({"w": entry(shape=[10**9] * 10_000)}, "has a shape or offsets that no file can hold"),
    ({"w": entry(offsets=[0, 10**30])}, "has a shape or offsets that no file can hold"),
    ({"w": entry("F4", [3], [0, 2])}, "but the header gives it bytes"),
    ({"w": []}, "no valid safetensors header"),
    ({"w": "F32"}, "no valid safetensors header"),
    ([entry()], "no valid safetensors header"),
    (b'{"w":{"dtype":"F32","shape":[1' + b"0" * 5000 + b'],"data_offsets":[0,8]}}', "no valid safetensors header"),
    (b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,NaN]}}', "no valid safetensors header"),
    (json.dumps({"w": entry()}).encode("utf-16"), "no valid safetensors header"),
    (b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "no valid safetensors header"),
    ({"\ud800": entry()}, "which is not Unicode"),
    ({"__metadata__": {"a": "\udfff"}}, "which is not Unicode"),
]


@pytest.mark.parametrize("header, message", BAD)
def test_a_header_that_the_library_does_not_open_is_refused(tmp_path: Path, header: Any, message: str) -> None:
    file = write(tmp_path / "x", header, bytes(8))
    with pytest.raises(SafetensorError):
        safe_open(file, "np").__enter__()
    with pytest.raises(InputError, match=message) as caught:
        read_header(file)
    assert str(caught.value).startswith(str(file))
