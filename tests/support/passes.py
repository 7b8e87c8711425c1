"""Passes for tests: corpora, profiles that must be equal, passes that stop, memory limits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moecover.checkpoints.structure import Structure
from moecover.corpora.packing import Corpus
from moecover.profiling.artifact import Profile
from moecover.runtime.cost import cost
from moecover.runtime.pass_state import State
from tests.conftest import random_corpus


def hooks_of(model: torch.nn.Module) -> list[object]:
    """All forward hooks on the modules of a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return [hook for module in model.modules() for kind in kinds for hook in vars(module)[kind].values()]


class Stop(BaseException):
    """What ends a pass in the middle, as an interrupt would."""


def same(one: Profile, two: Profile) -> None:
    """Every statistic and every running sum equal to the last bit."""
    assert one.fingerprint == two.fingerprint
    for corpus, statistics in one.statistics.items():
        for name, values in statistics.items():
            np.testing.assert_array_equal(values, two.statistics[corpus][name], err_msg=f"{corpus}, {name}")
            np.testing.assert_array_equal(one.parts[corpus][name], two.parts[corpus][name], err_msg=f"{corpus}, {name}")
    assert one.channels.keys() == two.channels.keys()
    for corpus, energy in one.channels.items():
        np.testing.assert_array_equal(energy, two.channels[corpus], err_msg=f"{corpus}, channels")


def corpora(vocab: int = 128) -> list[Corpus]:
    """Two of different shapes, one with a last batch of another size."""
    return [
        random_corpus("a", sequences=5, length=20, vocab=vocab),
        random_corpus("b", sequences=3, length=17, vocab=vocab),
    ]


def stop_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """The pass ends after so many saved states."""
    left, save = [saves], State.save

    def stopping(self: State, *args: object, **kwargs: object) -> None:
        save(self, *args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    monkeypatch.setattr(State, "save", stopping)


def limit_between(structure: Structure, *, tokens: int = 64, batch_tokens: int = 64, head: bool = True) -> int:
    """A limit that one layer keeps and the whole model does not."""
    made = cost(structure, tokens=tokens, batch_tokens=batch_tokens, limit=0, head=head)
    assert made.streamed < made.whole
    return (made.streamed + made.whole) // 2


def spoiled(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with changed tensors."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
