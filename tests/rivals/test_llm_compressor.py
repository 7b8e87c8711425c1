"""llm-compressor on a shipped model: its REAP is `pooled` with `reap-raw`, byte for byte, and FP8 goes before or after.

`make test-rivals` installs llm-compressor in an environment of its own and runs this; it takes minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import read_structure
from moecover.cli.main import main
from moecover.runtime.loading import load_model
from tests.support.pages import DOCS, blocks

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("MOECOVER_RIVALS_PYTHON", ROOT / ".venv-rivals" / "bin" / "python"))
ROWS, LENGTH = 24, 128

pytestmark = pytest.mark.rivals


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def test_reap_gives_the_same_checkpoint(tmp_path: Path) -> None:
    assert PYTHON.exists(), f"no llm-compressor at {PYTHON}: run `make test-rivals`"
    source, theirs, ours = tmp_path / "float32", tmp_path / "theirs", tmp_path / "ours"
    load_model(read_structure(shipped_model("qwen2-moe-tiny")), dtype="float32", device="cpu").save_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 4096, (ROWS, LENGTH), generator=generator).tolist()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    probe = [PYTHON, Path(__file__).with_name("reap_probe.py"), source, rows, theirs]
    done = subprocess.run([*map(str, probe)], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    command = ["prune", str(source), "--corpus", f"rows={rows}", "--method", "pooled", "--saliency", "reap-raw"]
    assert main([*command, "--retain", "0.5", "--batch-size", "1", "--dtype", "float32", "-o", str(ours), "-q"]) == 0
    expected, found = tensors_of(theirs), tensors_of(ours)
    assert found.keys() - expected.keys() == {"lm_head.weight"}  # tied to the embedding: written once by llm-compressor
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    kept = json.loads((ours / "config.json").read_text())["num_experts"]
    assert (kept, json.loads((theirs / "config.json").read_text())["num_experts"]) == (30, 30)


def quantised(folder: Path, name: str) -> Path:
    """The checkpoint ``name`` in 8 bits, by the lines of the guide, which quantise the checkpoint ``half``."""
    (lines,) = (block.text for block in blocks(DOCS / "guides" / "serve.md") if block.language == "python")
    command = [str(PYTHON), "-c", lines.replace("half", name)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / f"{name}-fp8"


def test_fp8_before_and_after_pruning_give_the_same_checkpoint(tmp_path: Path) -> None:
    assert PYTHON.exists(), f"no llm-compressor at {PYTHON}: run `make test-rivals`"
    whole, half, plan = tmp_path / "whole", tmp_path / "half", str(tmp_path / "plan.json")
    whole.symlink_to(shipped_model("qwen2-moe-tiny"))
    text = ["--corpus", "encyclopedia", "--sequences", "8", "--length", "128", "-q"]
    assert main(["profile", str(whole), *text, "-o", str(tmp_path / "profile")]) == 0
    assert main(["plan", str(tmp_path / "profile"), "--retain", "0.5", "-o", plan, "-q"]) == 0
    assert main(["prune", str(whole), "--plan", plan, "-o", str(half), "-q"]) == 0
    after, before = quantised(tmp_path, "half"), quantised(tmp_path, "whole")
    assert main(["prune", str(before), "--plan", plan, "-o", str(tmp_path / "cut"), "-q"]) == 0
    expected, found = tensors_of(after), tensors_of(tmp_path / "cut")
    assert expected.keys() == found.keys()
    assert sum(value.dtype == torch.float8_e4m3fn for value in found.values()) > 300
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    settings = [
        json.loads((one / "config.json").read_text())["quantization_config"] for one in (after, tmp_path / "cut")
    ]
    assert settings[0]["config_groups"] == settings[1]["config_groups"]
