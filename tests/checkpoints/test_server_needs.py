"""What servers need of a folder: the shipped models have it, a folder that lacks it is told so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecover.checkpoints.deepseek import configuration
from moecover.checkpoints.deepseek.configuration import DeepseekConfig
from moecover.checkpoints.deepseek.modeling import DeepseekForCausalLM
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
    assert warnings(shipped_model(name), "llama.cpp") == []
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


@pytest.mark.parametrize("server", ["mlx-lm", "llama.cpp"])
def test_a_tied_head_is_told(checkpoints: Callable[..., Path], server: str) -> None:
    assert any(
        "lm_head.weight" in line for line in warnings(checkpoints("qwen2_moe", tie_word_embeddings=True), server)
    )
    assert not any("lm_head.weight" in line for line in warnings(checkpoints("qwen2_moe"), server))


def test_stacked_experts_are_told(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "vocab_size": 300}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2}
    model = DeepseekForCausalLM(DeepseekConfig(**sizes, **counts, n_shared_experts=1, first_k_dense_replace=1))
    for kind, separate in (("stacked", False), ("separate", True)):
        model.save_pretrained(tmp_path / kind, save_original_format=separate)
        told = [
            any("a tensor for each expert" in x for x in warnings(tmp_path / kind, s)) for s in ("mlx-lm", "llama.cpp")
        ]
        assert told == [not separate] * 2
    assert any('"Unprocessed experts"' in line for line in warnings(tmp_path / "stacked", "llama.cpp"))


def test_families_that_were_not_run_are_asked_for_nothing(checkpoints: Callable[..., Path]) -> None:
    assert not any("expert" in line for line in warnings(checkpoints("gpt_oss"), "mlx-lm"))  # stacked on the hub too
