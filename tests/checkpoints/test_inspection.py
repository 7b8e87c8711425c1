"""What `inspect`, `read_structure` and `open_checkpoint` return: facts, one line, a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moecover.checkpoints.inspection import inspect
from moecover.checkpoints.source import open_checkpoint
from moecover.checkpoints.structure import read_structure
from moecover.cli.main import main
from moecover.pruning.writer import prune
from tests.support.quantised import quantise
from tests.support.thin import random_shape


@pytest.fixture
def model(checkpoints: Callable[..., Path]) -> Path:
    return checkpoints("qwen2_moe")


def test_a_checkpoint_shows_itself(checkpoints: Callable[..., Path]) -> None:
    folder = checkpoints("qwen2_moe", shards=True)
    checkpoint = open_checkpoint(folder)
    size = f"{checkpoint.num_bytes / 1000:.2f} kB"
    assert repr(checkpoint) == f"<Checkpoint {folder}: qwen2_moe, {len(checkpoint.tensors)} tensors, {size}>"
    rows = checkpoint.rows_shown()
    assert [row["shard"] for row in rows] == sorted(p.name for p in folder.glob("*.safetensors"))
    assert sum(int(row["tensors"] or 0) for row in rows) == len(checkpoint.tensors)
    assert sum(int(row["bytes"] or 0) for row in rows) == checkpoint.num_bytes


def test_a_structure_shows_itself(model: Path) -> None:
    structure = read_structure(model)
    size = f"{structure.checkpoint.num_bytes / 1000:.2f} kB"
    assert repr(structure) == f"<Structure {model}: qwen2_moe, 2 MoE layers x 12 experts, top-4, {size}>"
    rows = structure.rows_shown()
    assert [row["decoder layer"] for row in rows] == [1, 2]
    assert sum(int(row["expert bytes"] or 0) for row in rows) == structure.expert_total_bytes
    assert "<th>decoder layer</th>" in type(structure)._repr_html_(structure)
    assert list(structure.to_frame().columns) == ["decoder layer", "experts", "top-k", "expert bytes"]


def test_an_inspection_is_a_dictionary_that_shows_itself(model: Path) -> None:
    found = inspect(model, server="vllm")
    assert (found["experts"], found["top_k"], found["moe_layers"], found["refused"]) == (12, 4, [1, 2], [])
    assert json.loads(json.dumps(found)) == found
    assert repr(found).startswith(f"<Inspection {model}: qwen2_moe, 2 MoE layers x 12 experts, top-4, ")
    assert {row["fact"]: row["value"] for row in found.rows_shown()}["moe_layers"] == "[1, 2]"
    assert "qwen2_moe" in type(found)._repr_html_(found)
    assert list(found.to_frame()["fact"]) == list(found)
    assert all("unmet" in size for size in found["sizes"])


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_sizes_of_thinner_experts_are_those_of_their_files(
    family: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """Also where the shared expert is padded (deepseek_v3)."""
    structure = read_structure(checkpoints(family))
    facts = inspect(structure, server="llama.cpp")
    assert facts["channels"] == 16
    assert [(row["width"], len(row["unmet"])) for row in facts["widths"]] == [(8, 2)]
    sizes = {(row["keep"], row["width"]): row["bytes"] for row in facts["thin_sizes"]}
    assert list(sizes) == [(row["keep"], 8) for row in facts["sizes"]] + [(12, 8)]
    for keep in (6, 12):
        plan = random_shape(structure, 8, keep=keep)
        assert open_checkpoint(prune(structure, plan, tmp_path / str(keep))).num_bytes == sizes[keep, 8]


def test_why_experts_cannot_be_thinner(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    facts = inspect(quantise(checkpoints("mixtral"), tmp_path / "gptq", "gptq"))
    assert facts["channels"] is None
    assert facts["all_channels_because"].startswith("its experts are quantised")
    assert not {"widths", "thin_sizes"} & facts.keys()


def test_blocks_in_which_channels_are_quantised(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoints("mixtral", intermediate_size=64)
    folder = quantise(source, tmp_path / "m", "fp8", weight_block_size=[16, 16])
    facts = inspect(folder)
    assert facts["channel_groups"] == 16
    assert [row["width"] for row in facts["widths"]] == [16, 32, 48]
    assert main(["inspect", str(folder)]) == 0
    assert "plan thinner experts with --channel-groups 16" in capsys.readouterr().out
    assert inspect(source)["channel_groups"] == 1


def test_an_inspection_of_a_refused_model_says_why(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "dbrx"}))
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    found = inspect(tmp_path)
    assert "dbrx is not supported" in found["refused"][0]
    assert "refused: " in repr(found)
