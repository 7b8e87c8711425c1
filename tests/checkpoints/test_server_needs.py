"""What servers need of a folder: the shipped models have it, a folder that lacks it is told so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecover.checkpoints.deepseek import configuration
from moecover.checkpoints.inspection import inspect
from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import read_structure
from tests.support.tiny import make_checkpoint


def warnings(folder: Path, server: str) -> list[str]:
    found: list[str] = inspect(folder, server=server)["warnings"]
    return [line for line in found if line.startswith(f"{server} needs")]


@pytest.mark.parametrize("name", ["qwen2-moe-tiny", "deepseek-moe-tiny"])
def test_the_shipped_models_are_as_the_hubs(name: str) -> None:
    structure = read_structure(shipped_model(name))
    assert all(row.expert is not None for row in structure.tensors.values() if row.routed)
    assert "lm_head.weight" in structure.checkpoint.tensors
    assert structure.checkpoint.config["tie_word_embeddings"] is False
    assert warnings(shipped_model(name), "mlx-lm") == []
    auto_map = structure.checkpoint.config.get("auto_map")
    if name.startswith("deepseek"):
        module, _, cls = auto_map["AutoConfig"].partition(".")
        assert cls == configuration.DeepseekConfig.__name__
        assert (shipped_model(name) / f"{module}.py").read_bytes() == Path(configuration.__file__).read_bytes()
        (line,) = warnings(shipped_model(name), "vllm")
        assert "--trust-remote-code" in line
    else:
        assert auto_map is None
        assert warnings(shipped_model(name), "vllm") == []


@pytest.mark.parametrize(
    "change, says",
    [
        ({"tie_word_embeddings": True}, "lm_head.weight"),
        ({"rope_theta": None}, "rope_theta"),
    ],
)
def test_settings_that_a_server_reads_elsewhere_are_told(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    folder = make_checkpoint(tmp_path / "m", "qwen2_moe", tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    config = {"rope_theta": 1e4, **config, **change}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (line,) = warnings(folder, "mlx-lm")
    assert says in line


def test_stacked_experts_are_told(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(checkpoints("gpt_oss"), folder)  # stacked as on the hub
    assert any("a tensor for each expert" in line for line in warnings(folder, "mlx-lm"))
