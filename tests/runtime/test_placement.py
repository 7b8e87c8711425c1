"""Device maps: what lies where, and what is refused before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moecover.checkpoints.structure import Structure, read_structure
from moecover.errors import InputError
from moecover.profiling.job import profile
from moecover.pruning.writer import prune
from moecover.runtime.memory import opened
from moecover.runtime.passes import passes
from moecover.runtime.placement import parsed_map, placed
from moecover.verification.job import verify
from tests.conftest import hand_plan
from tests.support.passes import corpora
from tests.support.pretend_cuda import pretending

KEPT = [[0, 1, 4, 5, 8, 9]] * 2


@pytest.fixture
def structure(checkpoints: Callable[..., Path]) -> Structure:
    return read_structure(checkpoints("qwen2_moe"))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, structure: Structure) -> int:
    """Two GPUs, neither of which holds the model; gives its bytes."""
    size = structure.checkpoint.num_bytes
    monkeypatch.setattr("moecover.runtime.placement.available_memory", lambda device: int(size * 0.95 / 0.9))
    return size


@pytest.mark.parametrize("way", ["auto", "balanced", "sequential"])
def test_ways_share_a_model_out(monkeypatch: pytest.MonkeyPatch, structure: Structure, gpus: int, way: str) -> None:
    with pretending(monkeypatch):
        found = placed(structure, way, dtype="auto", limit=None, working=0)
    assert set(found.devices.values()) == {"cuda:0", "cuda:1"}
    assert sum(found.needed.values()) == gpus
    assert all(found.needed[device] <= found.limits[device] < gpus for device in found.needed)
    layers = [name for name in found.devices if name.startswith("model.layers")]
    assert {name.count(".") for name in layers} == {2}  # whole


def test_what_the_devices_do_not_hold(monkeypatch: pytest.MonkeyPatch, structure: Structure, gpus: int) -> None:
    with pretending(monkeypatch):
        for way in ("auto", "sequential"):
            with pytest.raises(InputError, match=r"do not hold the model. Leave device_map out"):
                placed(structure, way, dtype="auto", limit=gpus // 3, working=0)
        with pytest.raises(InputError, match=r"would take .* GB of cuda:1, .* GB may be used"):
            placed(structure, {"": "cuda:1"}, dtype="auto", limit=gpus // 2, working=0)
        assert placed(structure, {"": "cuda:1"}, dtype="auto", limit=gpus + 100, working=100).needed == {
            "cuda:1": gpus + 100
        }


def test_maps_of_the_user(monkeypatch: pytest.MonkeyPatch, structure: Structure, tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    with pretending(monkeypatch):
        file.write_text(json.dumps({"model": 1, "lm_head": "cuda:0"}))
        assert parsed_map(file) == {"model": "cuda:1", "lm_head": "cuda:0"}
        assert parsed_map({"model": "cuda", "lm_head": 0}) == {"model": "cuda:0", "lm_head": "cuda:0"}
        for asked, message in {
            "fast": "neither auto, balanced, balanced_low_0, sequential nor a JSON file",
            '["cuda:0"]': "must be an object with devices by name of a module",
            '{"model": 1.5}': "must be an object",
            '{"model": "cuda:0", "lm_head": "cpu"}': "puts parts on cpu, from where they would be fetched",
            '{"model": "cuda:0", "lm_head": "disk"}': "puts parts on disk",
            '{"model": "moon"}': "device=moon is not available",
            '{"": "meta"}': "puts parts on meta",
        }.items():
            if asked[0] in "[{":
                file.write_text(asked)
            with pytest.raises(InputError, match=message):
                parsed_map(file if asked[0] in "[{" else asked)
        for given, message in {
            "model": "names no device for lm_head.weight",
            "lm_head": r"names no device for model\.",
        }.items():
            with pytest.raises(InputError, match=message):
                placed(structure, {given: "cuda:0"}, dtype="auto", limit=None, working=0)
        with pytest.raises(
            InputError, match=r"unknown module in device_map 'model.layer.1'. Did you mean model.layers.1"
        ):
            placed(structure, {"": "cuda:0", "model.layer.1": "cuda:1"}, dtype="auto", limit=None, working=0)
        cut = {"": "cuda:0", "model.layers.1.mlp": "cuda:1"}
        with pytest.raises(InputError, match=r"puts model.layers.1 on cuda:0 and cuda:1: give it one device"):
            placed(structure, cut, dtype="auto", limit=None, working=0)


def test_tied_weights_lie_on_one_device(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Callable[..., Path], gpus: int
) -> None:
    tied = read_structure(checkpoints("qwen2_moe", tie_word_embeddings=True))
    with pretending(monkeypatch):
        found = placed(tied, "auto", dtype="auto", limit=None, working=0)
        assert found.devices["model.embed_tokens"] == found.devices["lm_head"]
        assert sum(found.needed.values()) == tied.checkpoint.num_bytes  # counted once
        apart = {"": "cuda:0", "lm_head": "cuda:1"}
        with pytest.raises(InputError, match="lm_head.weight, which is the same, on cuda:1: give them one device"):
            placed(tied, apart, dtype="auto", limit=None, working=0)


def test_a_map_takes_the_place_of_a_device() -> None:
    assert passes({"device_map": "auto", "device": "auto"}).device_map == "auto"
    with pytest.raises(InputError, match="device=cpu and device_map both say where the model runs"):
        passes({"device_map": "auto", "device": "cpu"})


def test_one_device_is_a_map_too(structure: Structure) -> None:
    """Where there is one device alone, auto is that device."""
    said: list[str] = []
    with opened(structure, tokens=8, batch_tokens=8, device_map="auto", say=said.append) as live:
        assert {one.device for one in live.module.parameters()} == {torch.device("cpu")}
    assert said[0].startswith("running in memory on 1 device: about ")


def test_jobs_take_it(monkeypatch: pytest.MonkeyPatch, structure: Structure, gpus: int, tmp_path: Path) -> None:
    plan = hand_plan(structure, KEPT)
    cut = prune(structure, plan, tmp_path / "cut")
    expected = profile(structure, corpora())
    places: dict[str, str | int] = {"": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    with pretending(monkeypatch):
        made = profile(structure, corpora(), device_map=places, memory_limit="20GB", progress=False)
        proof = verify(structure, cut, device_map=places, memory_limit="20GB")
    assert {name: one["count"].tolist() for name, one in made.statistics.items()} == {
        name: one["count"].tolist() for name, one in expected.statistics.items()
    }
    assert (proof.equal, proof.max_abs_difference) == (True, 0.0)
