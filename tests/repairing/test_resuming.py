"""An interrupted or damaged repair: resumed at its layer, made anew from other inputs, the same result."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moecover.checkpoints.structure import Structure, read_structure
from moecover.errors import MoecoverError
from moecover.repairing import one_layer as repairing
from moecover.repairing.store import kept_for_later
from tests.support.repairs import CORPORA, half, mended


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every layer that is fitted; the one at -1 is interrupted."""
    real, made = repairing.fit, list[int]()

    def counted(*args: Any, **options: Any) -> Any:
        if made and made[0] == -1 and len(made) == 2:
            raise KeyboardInterrupt
        made.append(0)
        return real(*args, **options)

    monkeypatch.setattr(repairing, "fit", counted)
    return made


def test_a_repair_goes_on_at_the_layer_it_was_at(structure: Structure, tmp_path: Path, fits: list[int]) -> None:
    plan, folder = half(structure), tmp_path / "state"
    once = mended(structure, plan, tmp_path / "once")
    layers = len(plan.layers)
    fits[:] = [-1]
    with pytest.raises(KeyboardInterrupt) as interrupt, kept_for_later(folder):
        mended(structure, plan, folder)
    assert interrupt.value.__notes__ == [
        f"Progress of the repair (1 layers) saved in {folder}; rerun the same command to resume"
    ]
    fits.clear()
    said: list[str] = []
    again = mended(structure, plan, folder, say=said.append)
    assert said == [f"resuming: 1 of {layers} layers are repaired"]
    assert len(fits) == layers - 1
    assert again.manifest() == once.manifest()

    def never() -> Any:
        raise AssertionError("nothing is left to be done, no model is needed")

    class Never(contextlib.AbstractContextManager[Any]):
        def __enter__(self) -> Any:
            never()

        def __exit__(self, *args: object) -> None: ...

    assert mended(structure, plan, folder, model=Never()).manifest() == once.manifest()


@pytest.mark.parametrize(
    "options, differs",
    [
        ({"kind": "scale"}, "--repair"),
        ({"corpora": CORPORA[:1]}, "the calibration text"),
        ({"batch_size": 2}, "--batch-size"),
    ],
)
def test_layers_of_other_inputs_are_made_anew(
    checkpoints: Callable[..., Path], tmp_path: Path, options: dict[str, Any], differs: str
) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    plan, folder, said = half(structure), tmp_path / "state", list[str]()
    mended(structure, plan, folder)
    again = mended(structure, plan, folder, say=said.append, **options)
    assert said == [f"starting the repair over: {folder} was made from other inputs, {differs} differs"]
    assert again.manifest() == mended(structure, plan, tmp_path / "new", **options).manifest()


def test_a_damaged_layer_is_made_anew(checkpoints: Callable[..., Path], tmp_path: Path, fits: list[int]) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    plan, folder, said = half(structure), tmp_path / "state", list[str]()
    whole = mended(structure, plan, folder)
    file = folder / "layer-2.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    fits.clear()
    assert mended(structure, plan, folder, say=said.append).manifest() == whole.manifest()
    assert said == ["resuming: 1 of 2 layers are repaired"]
    assert len(fits) == 1


def test_a_changed_digit_in_what_a_layer_says_of_itself_is_found(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    plan, folder = half(structure), tmp_path / "state"
    whole, file = mended(structure, plan, folder).manifest(), folder / "layer-1.safetensors"
    layers = {path: path.read_bytes() for path in folder.iterdir()}
    content, rng = layers[file], np.random.default_rng(0)
    places = [content.rindex(f'\\"{name}\\"'.encode()) for name in ("inputs", "row", "hashes", "sha256")]
    for (start, end), flips in zip(itertools.pairwise(places), (1, 3, 1), strict=True):
        digits = [i for i in range(start, end) if content[i : i + 1].isdigit()]
        for position in rng.choice(digits, size=flips, replace=False):
            (folder / "layer-2.safetensors").unlink()  # interrupted after the first layer
            changed = bytearray(content)
            changed[position] ^= 1  # another digit: still JSON
            file.write_bytes(changed)
            assert mended(structure, plan, folder).manifest() == whole
            assert {path: path.read_bytes() for path in folder.iterdir()} == layers


def test_a_source_that_changes_meanwhile_is_noticed(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoints("qwen2_moe"), tmp_path / "m"))
    structure = read_structure(source)

    def touch(layers: int) -> None:
        os.utime(source / "model.safetensors", ns=(1, 1))

    with pytest.raises(MoecoverError, match="changed while it was read"):
        mended(structure, half(structure), tmp_path / "state", advance=touch)
    assert not (tmp_path / "state").exists()
