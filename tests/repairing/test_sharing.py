"""A repair that two processes share: one that fails, the restart, and processes that were given other plans."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecover.checkpoints.structure import Structure, read_structure
from moecover.errors import InputError, MoecoverError
from moecover.planning.artifact import Plan
from moecover.repairing import one_layer as repairing
from moecover.repairing.artifact import Repaired
from moecover.runtime.distributed import GONE
from moecover.runtime.loading import load_model
from moecover.runtime.running import running
from moecover.runtime.world import World
from tests.conftest import hand_plan
from tests.support.ranks import in_ranks
from tests.support.repairs import half, mended


@pytest.fixture
def structure(checkpoints: Callable[..., Path]) -> Structure:
    return read_structure(checkpoints("qwen2_moe"))


def shared(structure: Structure, plan: Plan, folder: Path) -> Callable[[World], Repaired]:
    def one(here: World) -> Repaired:
        model = contextlib.nullcontext(running(load_model(structure), structure, here))
        return mended(structure, plan, folder, model=model, here=here)

    return one


def test_a_process_that_fails_ends_the_repair_which_goes_on_later(
    structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, fit, calls = half(structure), repairing.fit, []
    whole, again = in_ranks(monkeypatch, shared(structure, plan, tmp_path / "whole"))
    assert whole.manifest() == again.manifest()

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:  # the first to arrive at the second layer
            raise MemoryError("no room")
        return fit(*arguments, **options)

    monkeypatch.setattr(repairing, "fit", failing)
    errors = in_ranks(monkeypatch, shared(structure, plan, tmp_path / "folder"))
    assert {type(error) for error in errors} == {MoecoverError, MemoryError}
    assert GONE in [str(error) for error in errors]
    assert len(list((tmp_path / "folder").glob("layer-*.safetensors"))) == 1
    calls[:] = [None] * 3
    for found in in_ranks(monkeypatch, shared(structure, plan, tmp_path / "folder")):
        assert found.manifest() == whole.manifest()
    assert len(calls) == 3 + 2 * (len(plan.layers) - 1)
    calls[:] = [None] * 3
    for found in in_ranks(monkeypatch, shared(structure, plan, tmp_path / "folder")):
        assert found.manifest() == whole.manifest()
    assert len(calls) == 3


def test_processes_that_were_given_other_plans_all_say_so(
    structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = len(structure.topology.decoder_layers)
    plans = [hand_plan(structure, [[0, 1, 2, 3 + rank]] * layers) for rank in range(2)]
    errors = in_ranks(monkeypatch, lambda here: shared(structure, plans[here.rank], tmp_path / "folder")(here))
    assert [type(error) for error in errors] == [InputError, InputError]
    assert all("rank 1 and rank 0 differ in plan" in str(error) for error in errors)
