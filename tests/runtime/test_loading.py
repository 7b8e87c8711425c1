"""Loading: what is refused before or after a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moecover.checkpoints.structure import Structure, read_structure
from moecover.errors import InputError
from moecover.runtime.loading import load_model
from tests.support.passes import spoiled


def test_missing_tensor_is_refused_not_filled_at_random(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    folder = spoiled(checkpoints("qwen2_moe"), tmp_path / "m", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(InputError, match=r"1 tensors are missing from the files, the first is model\.norm\.weight"):
        load_model(read_structure(folder))


def test_unknown_dtype_and_device(structure: Structure) -> None:
    with pytest.raises(InputError, match="unknown dtype=float17"):
        load_model(structure, dtype="float17")
    with pytest.raises(InputError, match="device=nowhere is not available"):
        load_model(structure, device="nowhere")
