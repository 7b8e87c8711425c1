"""Every stage with a model over two GPUs that are pretended: the numbers are those of one CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.generation import write_generated
from moecover.evaluation.run import evaluate
from moecover.planning.run import plan_budgets
from moecover.profiling.artifact import Profile
from moecover.profiling.run import profile
from moecover.repairing.store import repair
from moecover.runtime.loading import load_model
from moecover.runtime.running import Running, running
from tests.conftest import hand_plan
from tests.runtime.test_pretended_gpu import same_up_to_products, texts
from tests.support.passes import Stop, stop_after
from tests.support.pretend_cuda import pretending

FAMILIES = ("qwen2_moe", "deepseek_v3")
KEPT = [[0, 1, 4, 5, 8, 9]] * 2


@pytest.fixture(params=FAMILIES)
def structure(request: pytest.FixtureRequest, checkpoints: Callable[..., Path]) -> Structure:
    return read_structure(checkpoints(request.param))


def halves(structure: Structure) -> dict[str, str]:
    """A device map: the last decoder layer and what follows it on the second device."""
    last = max(structure.topology.decoder_layers)
    layers = {f"model.layers.{number}": f"cuda:{int(number == last)}" for number in range(last + 1)}
    return {"model.embed_tokens": "cuda:0", "model.rotary_emb": "cuda:0", **layers, "model.norm": "cuda:1"} | {
        "lm_head": "cuda:1"
    }


@contextlib.contextmanager
def spread(structure: Structure, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    with pretending(monkeypatch):
        live = load_model(structure, device_map=halves(structure))
        assert {str(one.device) for one in live.parameters()} == {"cuda:0", "cuda:1"}
        yield running(live, structure)


def test_profile(structure: Structure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Interrupted after the first saved state, and resumed."""
    given: dict[str, Any] = {"batch_size": 2}
    expected = profile(structure, texts(), model=load_model(structure), keep_inputs=(60, tmp_path / "c"), **given)
    settings = {**given, "state": tmp_path / "state", "keep_inputs": (60, tmp_path / "g")}
    with spread(structure, monkeypatch) as live:
        with monkeypatch.context() as patched, pytest.raises(Stop):
            stop_after(patched, 1)
            profile(structure, texts(), model=live, **settings)
        made = profile(structure, texts(), model=live, **settings)
    same_up_to_products(made, expected)
    assert (tmp_path / "g" / "inputs.safetensors").read_bytes() == (tmp_path / "c" / "inputs.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["expert-sparsity", "worst-corpus"])
def test_search(structure: Structure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str) -> None:
    made: Profile = profile(structure, texts(), batch_size=2, keep_inputs=(60, tmp_path / "p"))
    given: dict[str, Any] = {"method": method, "keeps": [6], "structure": structure}
    modes = ("layerwise", "progressive", "progressive-local")
    model = load_model(structure)
    expected = [plan_budgets(made, model=model, mode=mode, **given)[0].to_json() for mode in modes]
    with spread(structure, monkeypatch) as live:
        assert [plan_budgets(made, model=live, mode=mode, **given)[0].to_json() for mode in modes] == expected


@pytest.mark.parametrize("kind", ["scale", "ridge", "refit"])
def test_repair_and_evaluation(
    structure: Structure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    chosen, made = hand_plan(structure, KEPT), {}
    for name in ("one", "two"):
        with contextlib.ExitStack() as stack:
            if name == "two":
                live = stack.enter_context(spread(structure, monkeypatch))
            else:
                live = running(load_model(structure), structure)
            mended = repair(
                structure,
                chosen,
                texts(),
                model=contextlib.nullcontext(live),
                kind=kind,
                folder=tmp_path / name,
                batch_size=2,
            )
            repairs = {"six": mended.of_layer(structure, chosen)}
            rows = evaluate(structure, {"six": chosen}, model=live, texts=texts(), repairs=repairs, batch_size=2).rows
            made[name] = mended.hashes, rows
    assert made["two"] == made["one"]


def test_generated_text(structure: Structure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"sequences": 4, "length": 8, "seed": 0, "batch_size": 2}
    write_generated(structure, load_model(structure), tmp_path / "one.jsonl", **sizes)
    with spread(structure, monkeypatch) as live:
        write_generated(structure, live, tmp_path / "two.jsonl", **sizes)
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_the_pretence_keeps_two_devices_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretending(monkeypatch) as device:
        first, second = torch.ones(3, device=device), torch.ones(3, device="cuda:1")
        assert str((second + second).device) == "cuda:1"
        with pytest.raises(RuntimeError, match="found cuda:0, cuda:1 in add"):
            first + second
        assert str(first.to(second).device) == "cuda:1"
        assert str(second.copy_(first).device) == "cuda:1"
