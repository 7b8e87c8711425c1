"""Loading: what is refused before or after a model is loaded."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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


def test_threads_load_one_after_the_other(structure: Structure, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library replaces while it loads is put back: two at once would leave models without tied weights."""
    from transformers import PreTrainedModel, initialization

    ties, real = PreTrainedModel.tie_weights, initialization.no_tie_weights
    one_more = threading.Semaphore(0)

    @contextlib.contextmanager
    def slow() -> Iterator[None]:
        """Ends after another one has begun, if that is possible."""
        with real():
            one_more.release()
            one_more.acquire(timeout=0.1)
            one_more.acquire(timeout=0.1)
            yield

    monkeypatch.setattr(initialization, "no_tie_weights", slow)
    with ThreadPoolExecutor(2) as pool:
        for loaded in [pool.submit(load_model, structure, dtype="float32") for _ in range(2)]:
            loaded.result()
    assert PreTrainedModel.tie_weights is ties
