"""Counts in config.json, names of model types, folders in other formats: read as meant, or refused by what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecover.checkpoints.inspection import inspect
from moecover.checkpoints.structure import read_structure
from moecover.errors import InputError
from moecover.planning.run import plan
from moecover.profiling.run import profile
from moecover.pruning.writer import prune
from moecover.verification.verify import verify
from tests.conftest import hand_plan, random_corpus
from tests.support import zoo
from tests.support.quantised import set_config, some_bytes


def copy(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    set_config(target, **config)
    return target


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("value", [-1, 0, 7, 10**30, True, 2.0, 2.5, NAN, INFINITY, "2", {}, [], [2, "2"], [2, -1]])
def test_experts_per_token_out_of_range(checkpoints: Callable[..., Path], tmp_path: Path, value: Any) -> None:
    folder = copy(checkpoints("mixtral"), tmp_path / "m", num_experts_per_tok=value)
    with pytest.raises(InputError, match="num_experts_per_tok"):
        read_structure(folder)
    (refusal,) = inspect(folder)["refused"]
    assert len(refusal.splitlines()) == 1


@pytest.mark.parametrize("value", [1, 6])
def test_experts_per_token_at_the_ends(checkpoints: Callable[..., Path], tmp_path: Path, value: int) -> None:
    folder = copy(checkpoints("mixtral"), tmp_path / "m", num_experts_per_tok=value)
    assert read_structure(folder).topology.top_k == value


@pytest.mark.parametrize("value", [-1, True, 12.0, NAN, "12", {}, []])
@pytest.mark.parametrize("key", ["n_routed_experts", "n_group", "topk_group", "n_shared_experts"])
def test_other_counts_that_are_none(checkpoints: Callable[..., Path], tmp_path: Path, key: str, value: Any) -> None:
    folder = copy(checkpoints("deepseek_v3"), tmp_path / "m", **{key: value})
    with pytest.raises(InputError, match=f"config.json has {key} .*, a whole number from 0 on is needed"):
        read_structure(folder)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_hidden_layers": 3}, "config.json has 3 decoder layers, the files have tensors of 2"),
        ({"num_hidden_layers": 10**9}, "config.json has 1000000000 decoder layers, the files have tensors of 2"),
        ({"num_hidden_layers": 0}, "no MoE layer|no routed experts"),
        ({"num_hidden_layers": -1}, "mixtral"),
        ({"num_local_experts": 10**9}, "config.json has 1000000000 experts per layer, at most 65536 are read"),
        ({"num_local_experts": 10**40}, "experts per layer, at most 65536 are read"),
    ],
)
def test_counts_that_no_files_fill(
    checkpoints: Callable[..., Path], tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = copy(checkpoints("mixtral"), tmp_path / "m", **config)
    with pytest.raises(InputError, match=message) as caught:
        read_structure(folder)
    assert len(str(caught.value).splitlines()) == 1


# ---------------------------------------------------------------------------------------------- lists by layer
@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hunyuan") / "m"
    zoo.make_model("hunyuan_v1_moe").save_pretrained(folder, save_original_format=True)
    return folder


def test_equal_values_of_all_layers_are_one_number(hunyuan: Path, tmp_path: Path) -> None:
    layers = zoo.LAYERS
    lists = {"moe_topk": [2] * layers, "num_shared_expert": [1] * layers, "moe_intermediate_size": [16] * layers}
    folder = copy(hunyuan, tmp_path / "m", **lists)
    structure = read_structure(folder)
    assert structure.topology == read_structure(hunyuan).topology
    assert inspect(folder)["shared_experts"] == 1
    made = profile(structure, [random_corpus("a", sequences=2, length=20, vocab=zoo.SMALL["vocab_size"])])
    out = prune(structure, plan(made, keep=4), tmp_path / "out")
    assert verify(folder, out).equal
    after = json.loads((out / "config.json").read_text())
    assert {key: after[key] for key in lists} == lists
    assert after["num_experts"] == 4


def test_of_unequal_numbers_of_experts_per_token_the_largest_counts(hunyuan: Path, tmp_path: Path) -> None:
    folder = copy(hunyuan, tmp_path / "m", moe_topk=[1, 3, 2])
    structure = read_structure(folder)
    assert structure.topology.top_k == 3
    layers = structure.topology.decoder_layers
    with pytest.raises(InputError, match="top-k of 3"):
        prune(structure, hand_plan(structure, [[0, 1]] * len(layers)), tmp_path / "out")
    out = prune(structure, hand_plan(structure, [[0, 2, 5], [1, 2, 3], [4, 6, 7]]), tmp_path / "out")
    assert verify(folder, out).equal


def test_lists_of_experts(hunyuan: Path, tmp_path: Path) -> None:
    equal = copy(hunyuan, tmp_path / "equal", num_experts=[8, 8, 8])
    structure = read_structure(equal)
    assert structure.topology.num_experts == 8
    out = prune(structure, hand_plan(structure, [[0, 1, 2]] * 3), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["num_experts"] == [3, 3, 3]
    unequal = copy(hunyuan, tmp_path / "unequal", num_experts=[8, 8, 4])
    with pytest.raises(InputError, match=r"num_experts \[8, 8, 4\]: layers with different numbers of experts"):
        read_structure(unequal)


# ------------------------------------------------------------------------------------------ names of model types
def test_another_name_of_a_proven_type(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy(checkpoints("deepseek_v3"), tmp_path / "m", model_type="kimi_k2")
    structure, own = read_structure(folder), read_structure(checkpoints("deepseek_v3"))
    assert structure.topology.family == "kimi_k2"
    assert (structure.tensors, structure.parameters) == (own.tensors, own.parameters)
    assert not structure.warnings
    kept = [[0, 1, 4, 5, 8, 9]] * len(structure.topology.decoder_layers)
    out = prune(structure, hand_plan(structure, kept), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["model_type"] == "kimi_k2"
    assert verify(folder, out).equal


UNKNOWN: list[tuple[dict[str, Any], str]] = [
    (
        {"model_type": "my_moe", "architectures": ["DeepseekV3ForCausalLM"]},
        r"Its class DeepseekV3ForCausalLM is that of 'deepseek_v3': if its files are too, make that its model_type",
    ),
    (
        {"model_type": "deepseek_vl_v2", "language_config": {"model_type": "deepseek_v2"}},
        "Its language_config is of the known type 'deepseek_v2': prune that language model by itself",
    ),
    ({"model_type": "minimax_m3", "architectures": ["X"]}, "The known type of the nearest name is 'minimax_m"),
    ({"model_type": "bailing_moe_v2", "architectures": None}, "is not known to transformers"),
    ({"model_type": "zzz", "architectures": [5]}, "code that comes with a checkpoint is not run$"),
]


@pytest.mark.parametrize("config, message", UNKNOWN)
def test_an_unknown_type_and_what_it_would_pass_as(
    checkpoints: Callable[..., Path], tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = copy(checkpoints("mixtral"), tmp_path / "m", **config)
    with pytest.raises(InputError, match=message):
        read_structure(folder)


# --------------------------------------------------------------------------------------------- other formats
def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], form: str = "pt") -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": form})


def test_a_router_packed_by_bitsandbytes(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = copy(checkpoints("qwen2_moe"), tmp_path / "m", quantization_config=settings)
    rewrite(folder, lambda t: t.update({"model.layers.1.mlp.gate.weight": some_bytes(192, 1)}))
    message = r"the router is quantised \(bitsandbytes\): model.layers.1.mlp.gate.weight is stored as \[192, 1\] of U8"
    with pytest.raises(InputError, match=f"{message}.*Prune the original"):
        read_structure(folder)


def stacked(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".experts." in name]:
        del tensors[name]
    for layer in (1, 2):
        tensors[f"model.layers.{layer}.mlp.switch_mlp.up_proj.weight"] = some_bytes(12, 16, 4, dtype=torch.int32)
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = some_bytes(12, 4, dtype=torch.int32)


@pytest.mark.parametrize("how", ["names", "metadata", "settings"])
def test_a_folder_of_mlx(checkpoints: Callable[..., Path], tmp_path: Path, how: str) -> None:
    settings = {"quantization": {"group_size": 64, "bits": 4}} if how == "settings" else {}
    folder = copy(checkpoints("qwen2_moe"), tmp_path / "m", **settings)
    if how == "names":
        rewrite(folder, stacked)
    elif how == "metadata":
        rewrite(folder, lambda t: None, "mlx")
    with pytest.raises(InputError, match="is an MLX folder: .* Prune the original"):
        read_structure(folder)


def test_experts_that_share_a_byte(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """A type of four bits with an odd number of values for every expert."""
    import struct

    folder = copy(checkpoints("qwen2_moe"), tmp_path / "m", quantization_config={"quant_method": "other"})
    content = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = "model.layers.1.mlp.experts.codes"
    header[name] = {"dtype": "F4", "shape": [12, 3], "data_offsets": [len(data), len(data) + 18]}
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data + bytes(18))
    with pytest.raises(InputError, match=r"codes in .* of shape \[12, 3\] of F4 shares bytes between experts"):
        read_structure(folder)
