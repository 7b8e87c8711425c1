"""What cannot be loaded here is said in one line, by everything that loads: packages of quantisers, dtypes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecover.checkpoints.structure import read_structure
from moecover.errors import InputError
from moecover.planning.artifact import Plan
from moecover.pruning.writer import prune
from moecover.runtime.loadable import PACKAGES, check_loadable, missing_packages
from moecover.runtime.loading import load_model
from moecover.runtime.streaming import streamed
from tests.conftest import hand_plan
from tests.support.command_line import run
from tests.support.quantised import LAYOUTS, quantise, set_config

ABSENT = [method for method in PACKAGES if missing_packages({"quant_method": method})]


def test_some_packages_are_absent_here() -> None:
    assert {"gptq", "awq", "bitsandbytes", "compressed-tensors", "torchao", "hqq", "quark"} <= set(ABSENT)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"input_ids": list(range(40))}) + "\n")
    return file


def settings_of(method: str) -> dict[str, Any]:
    return {
        "quant_method": method,
        "bits": 4,
        "group_size": 128,
        **({"load_in_4bit": True} if method == "bitsandbytes" else {}),
    }


@pytest.mark.parametrize("method", ABSENT)
@pytest.mark.parametrize("packed", [True, False], ids=["experts", "attention only"])
def test_every_loader_names_the_package(
    checkpoints: Callable[..., Path], tmp_path: Path, method: str, packed: bool
) -> None:
    """Also where experts and routers are plain, and only the rest of the model is quantised."""
    source, folder = checkpoints("qwen2_moe"), tmp_path / "m"
    if packed:
        quantise(source, folder, "gptq")
    else:
        shutil.copytree(source, folder)
    set_config(folder, quantization_config=settings_of(method))
    structure = read_structure(folder)
    packages = " ".join(missing_packages(settings_of(method)))
    for load in (check_loadable, load_model, lambda model: streamed(model).__enter__()):
        with pytest.raises(InputError) as caught:
            load(structure)
        assert f"pip install {packages}" in str(caught.value)
        assert "its plan applies here too" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("method", sorted(set(LAYOUTS) - {"fp8", "modelopt"}))
def test_every_command_names_the_package(
    checkpoints: Callable[..., Path], tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    folder = quantise(checkpoints("qwen2_moe"), tmp_path / "m", method)
    structure = read_structure(folder)
    plan = hand_plan(structure, [[0, 1, 2, 3]] * 2)
    out = prune(structure, plan, tmp_path / "out")
    plan.save(tmp_path / "plan.json")
    for command in (
        ["profile", folder, "--corpus", f"r={rows}", "-o", tmp_path / "p"],
        ["verify", folder, out, "--corpus", f"r={rows}"],
        ["evaluate", folder, "--perplexity", f"r={rows}", "--plan", tmp_path / "plan.json", "-o", tmp_path / "e"],
        ["prune", folder, "--corpus", f"r={rows}", "--keep", 4, "-o", tmp_path / "o"],
        ["generate", folder, "-o", tmp_path / "g.jsonl"],
    ):
        status, _, err = run(capsys, *command)
        assert (status, "pip install" in err) == (2, True), err
        assert "Traceback" not in err


def test_a_method_that_transformers_does_not_know(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(checkpoints("qwen2_moe"), folder)
    set_config(folder, quantization_config={"quant_method": "no_such"})
    with pytest.raises(InputError, match="Unknown quantization type, got no_such"):
        load_model(read_structure(folder))


# ---------------------------------------------------------------------------------------------------------- dtypes
def doubled(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    tensors = {name: tensor.double() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((target / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        raw.pop(key, None)
    (target / "config.json").write_text(json.dumps(raw | config))
    return target


@pytest.mark.parametrize(
    "config, dtype",
    [
        ({"dtype": "float64"}, "float64"),
        ({"torch_dtype": "float64"}, "float64"),
        ({}, "float64"),
    ],
)
def test_a_dtype_that_does_not_run_is_refused_with_the_way_out(
    checkpoints: Callable[..., Path], tmp_path: Path, config: dict[str, Any], dtype: str
) -> None:
    structure = read_structure(doubled(checkpoints("qwen2_moe"), tmp_path / "m", **config))
    for load in (check_loadable, load_model, lambda model: streamed(model).__enter__()):
        with pytest.raises(InputError, match=f"is stored in {dtype}, in which it does not run. Give dtype=float32"):
            load(structure)
    assert next(load_model(structure, dtype="float32").parameters()).dtype == torch.float32
    with streamed(structure, dtype="float32") as model:
        assert model.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "float63", "torch.float64", 5])
def test_a_dtype_of_no_model_is_refused_when_it_is_read(
    checkpoints: Callable[..., Path], tmp_path: Path, dtype: object
) -> None:
    folder = doubled(checkpoints("qwen2_moe"), tmp_path / "m", dtype=dtype)
    with pytest.raises(InputError, match="transformers cannot build 'qwen2_moe' from config.json") as caught:
        read_structure(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_a_float64_model_is_pruned_by_a_plan_and_profiled_in_float32(
    checkpoints: Callable[..., Path], tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = doubled(checkpoints("qwen2_moe"), tmp_path / "m", dtype="float64")
    profile = ["profile", folder, "--corpus", f"r={rows}", "-o", tmp_path / "p"]
    status, _, err = run(capsys, *profile)
    assert (status, "Give --dtype float32" in err) == (2, True), err
    assert run(capsys, *profile, "--dtype", "float32")[0] == 0
    assert run(capsys, "plan", tmp_path / "p", "--keep", 6, "-o", tmp_path / "plan.json")[0] == 0
    out = prune(read_structure(folder), Plan.load(tmp_path / "plan.json"), tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.float64}
    verify = ["verify", folder, out, "--corpus", f"r={rows}"]
    assert run(capsys, *verify)[0] == 2
    assert run(capsys, *verify, "--dtype", "float32")[0] == 0
