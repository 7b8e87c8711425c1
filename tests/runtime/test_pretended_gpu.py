"""Every stage on a GPU that is pretended: no tensor of the CPU gets among its own, and the numbers stay the same."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.generation import write_generated
from moecover.errors import InputError
from moecover.evaluation.run import evaluate
from moecover.planning.run import plan, plan_budgets
from moecover.profiling.artifact import Profile
from moecover.profiling.run import profile
from moecover.pruning.writer import prune
from moecover.repairing.layers import repair_layers
from moecover.repairing.store import repair
from moecover.runtime import memory
from moecover.runtime.loading import load_model
from moecover.runtime.running import Running, running
from moecover.runtime.streaming import streamed
from moecover.verification.verify import verify
from tests.conftest import hand_plan
from tests.support.passes import Stop, corpora, same, stop_after
from tests.support.pretend_cuda import OnGpu, pretending

FAMILIES = ("qwen2_moe", "deepseek_v3")


@pytest.fixture(params=FAMILIES)
def structure(request: pytest.FixtureRequest, checkpoints: Callable[..., Path]) -> Structure:
    return read_structure(checkpoints(request.param))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with pretending(monkeypatch) as device:
        yield device


@contextlib.contextmanager
def opened(structure: Structure, device: str, *, by_layer: bool) -> Iterator[Running]:
    if by_layer:
        with streamed(structure, device=device) as stream:
            yield stream
    else:
        yield running(load_model(structure, device=device), structure)


def same_up_to_products(made: Profile, expected: Profile) -> None:
    """The same, and the energies of channels but for the order in which matrix products add: a GPU makes other ones."""
    for corpus, energy in expected.channels.items():
        np.testing.assert_allclose(made.channels[corpus], energy, rtol=1e-5)
    same(dataclasses.replace(made, channels=expected.channels), expected)


def texts() -> list[Any]:
    """With a row that is padded."""
    found = corpora()
    found[1].mask[-1, 9:] = False
    return found


def test_the_pretence_refuses_what_a_gpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretending(monkeypatch) as device:
        here = torch.ones(3, 2, device=device)
        assert isinstance(here, OnGpu)
        assert (here + torch.tensor(2.0)).device == here.device == torch.device(device)
        with pytest.raises(RuntimeError, match="same device"):
            here + torch.ones(3, 2)
        with pytest.raises(TypeError, match="numpy"):
            here.numpy()
        assert here.cpu().numpy().sum() == 6
        assert here.double().dtype == torch.float64
    with pretending(monkeypatch, "mps") as device, pytest.raises(TypeError, match="float64"):
        torch.ones(3, device=device).double()


@pytest.mark.parametrize("way", ["memory", "layers", "spilled"])
def test_profile(structure: Structure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str) -> None:
    """Interrupted after the first saved state, and resumed."""
    given: dict[str, Any] = {"batch_size": 2}
    expected = profile(structure, texts(), model=load_model(structure), keep_inputs=(60, tmp_path / "c"), **given)

    def go() -> Profile:
        settings = {**given, "state": tmp_path / "state", "keep_inputs": (60, tmp_path / "g")}
        if way == "memory":
            return profile(structure, texts(), model=load_model(structure, device="cuda"), **settings)
        with streamed(structure, device="cuda", spill=way == "spilled") as stream:
            return profile(structure, texts(), model=stream, **settings)

    with pretending(monkeypatch):
        with monkeypatch.context() as patched, pytest.raises(Stop):
            stop_after(patched, 1)
            go()
        made = go()
    same_up_to_products(made, expected)
    assert made.settings["device"] == "cuda"
    assert (tmp_path / "g" / "inputs.safetensors").read_bytes() == (tmp_path / "c" / "inputs.safetensors").read_bytes()


# Of the gate, every two of family, method and way are there together.
@pytest.mark.parametrize(
    ("structure", "method", "by_layer"),
    [
        ("qwen2_moe", "expert-sparsity", False),
        ("qwen2_moe", "worst-corpus", True),
        ("deepseek_v3", "expert-sparsity", True),
        ("deepseek_v3", "worst-corpus", False),
        pytest.param("qwen2_moe", "expert-sparsity", True, marks=pytest.mark.slow),
        pytest.param("qwen2_moe", "worst-corpus", False, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "expert-sparsity", False, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "worst-corpus", True, marks=pytest.mark.slow),
    ],
    indirect=["structure"],
)
def test_search(
    structure: Structure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, by_layer: bool
) -> None:
    made = profile(structure, texts(), batch_size=2, keep_inputs=(60, tmp_path / "p"))
    modes = ("layerwise", "progressive", "progressive-local")
    given: dict[str, Any] = {"method": method, "keeps": [6], "structure": structure}
    model = load_model(structure)
    expected = [plan_budgets(made, model=model, mode=mode, **given)[0].to_json() for mode in modes]
    with pretending(monkeypatch) as device, opened(structure, device, by_layer=by_layer) as live:
        assert [plan_budgets(made, model=live, mode=mode, **given)[0].to_json() for mode in modes] == expected


@pytest.mark.parametrize("by_layer", [False, True])
def test_repair_and_evaluation(
    structure: Structure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by_layer: bool
) -> None:
    chosen = hand_plan(structure, [[0, 1, 4, 5, 8, 9]] * 2)
    made = {}
    for name in ("cpu", "cuda"):
        with contextlib.ExitStack() as stack:
            device = stack.enter_context(pretending(monkeypatch)) if name == "cuda" else "cpu"
            live = stack.enter_context(opened(structure, device, by_layer=by_layer))
            mended = repair(
                structure,
                chosen,
                texts(),
                model=contextlib.nullcontext(live),
                kind="ridge",
                folder=tmp_path / name,
                batch_size=2,
                device=name,
            )
            repairs = {"six": mended.of_layer(structure, chosen)}
            rows = evaluate(structure, {"six": chosen}, model=live, texts=texts(), repairs=repairs, batch_size=2).rows
            made[name] = mended.hashes, rows
    assert made["cuda"] == made["cpu"]


@pytest.mark.parametrize("way", ["in memory", "by layers"])
def test_verification(
    structure: Structure, gpu: str, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "by layers":
        monkeypatch.setattr("moecover.runtime.memory.cost", _too_large)
    cut = prune(structure, hand_plan(structure, [[0, 1, 4, 5, 8, 9]] * 2), tmp_path / "cut")
    found = verify(structure.checkpoint, cut, corpora=texts(), device=gpu)
    assert (found.equal, found.max_abs_difference) == (True, 0.0)


def _too_large(structure: Structure, **given: Any) -> Any:
    """The cost of a model that does not fit as a whole."""
    from moecover.runtime.cost import Cost

    return Cost(
        limit=10**9, whole=10**10, streamed=10**8, hidden=10**6, read=10**6, flops=1.0, layer=1, by_layer=True, room=99
    )


def test_generated_text(structure: Structure, gpu: str, tmp_path: Path) -> None:
    model, sizes = load_model(structure, device=gpu), {"sequences": 4, "length": 8, "seed": 0, "batch_size": 2}
    write_generated(structure, model, tmp_path / "g.jsonl", **sizes)
    assert len((tmp_path / "g.jsonl").read_text().splitlines()) == 4


def test_plan_from_a_profile_that_was_made_there(structure: Structure, gpu: str, tmp_path: Path) -> None:
    made = profile(structure, texts(), device=gpu)
    (tmp_path / "p").mkdir()
    made.save(tmp_path / "p")
    assert np.isfinite(Profile.load(tmp_path / "p").statistics["a"]["norm_sum"]).all()
    assert plan(made, keep=6).keep == 6


def test_a_gpu_without_float64(structure: Structure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics and perplexity are those of the CPU; what cannot do without is refused."""
    made, chosen = profile(structure, texts(), batch_size=2), hand_plan(structure, [[0, 1, 4, 5, 8, 9]] * 2)
    rows = evaluate(structure, {"six": chosen}, model=load_model(structure), texts=texts()).rows
    with pretending(monkeypatch, "mps") as device:
        live = load_model(structure, device=device)
        same_up_to_products(profile(structure, texts(), model=live, batch_size=2), made)
        assert evaluate(structure, {"six": chosen}, model=live, texts=texts()).rows == rows
        with pytest.raises(InputError, match="a search computes in float64, which device=mps does not have"):
            plan_budgets(made, method="expert-sparsity", keeps=[6], model=live, structure=structure, sample=texts())
        with pytest.raises(InputError, match="a repair computes in float64, which device=mps does not have"):
            list(repair_layers(live, structure, chosen, texts(), kind="ridge"))


def test_layers_that_do_not_fit_into_pinned_memory(
    structure: Structure, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecover.runtime.memory.cost", _too_large)
    monkeypatch.setattr("moecover.runtime.memory.available_memory", lambda device: 10**9 if device == gpu else 1)
    with (
        pytest.raises(InputError, match="two layers at a time are read into memory of the machine on their way to"),
        memory.opened(structure, tokens=8, batch_tokens=8, device=gpu),
    ):
        pass
