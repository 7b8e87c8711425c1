"""Pruned checkpoints of both shipped models in vLLM: the same greedy tokens and log-probabilities as in transformers.

`make test-servers` installs vLLM's CPU build in an environment of its own and runs this; it takes minutes.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import read_structure
from moecover.cli.main import main
from moecover.runtime.loading import load_model
from tests.servers.vllm_probe import NEW_TOKENS

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("MOECOVER_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
PROMPTS, LENGTH, TOLERANCE = 20, 48, 1e-4

pytestmark = pytest.mark.servers


THIN = ["--width", "40", "--repair", "ridge", "--repair-tokens", "2048"]  # deepseek's shared experts get padding


@pytest.fixture(scope="module", params=itertools.product(["qwen2-moe-tiny", "deepseek-moe-tiny"], [[], THIN]))
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the experts of a shipped model; or thinner and repaired ones."""
    name, thin = request.param
    out = tmp_path_factory.mktemp("cut") / name
    text = ["--corpus", "encyclopedia", "--corpus", "web", "--sequences", "16", "--length", "128"]
    model = str(shipped_model(name))
    assert main(["prune", model, *text, "--retain", "0.5", *thin, "--dtype", "float32", "-o", str(out), "-q"]) == 0
    return out


def expected(folder: Path, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and log-probabilities of the prompts' tokens but the first, from transformers."""
    model = load_model(read_structure(folder), dtype="float32", device="cpu")
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            scores = model(ids).logits[0].log_softmax(-1)
            for _ in range(NEW_TOKENS):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        logprobs = scores[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        found.append((ids[0, len(prompt) :].tolist(), logprobs.tolist()))
    return found


def test_pruned_checkpoints_in_vllm(cut: Path, tmp_path: Path) -> None:
    assert PYTHON.exists(), f"no vLLM at {PYTHON}: run `make test-servers`"
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 4096, (PROMPTS, LENGTH), generator=generator).tolist()
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    remote = ["--trust-remote-code"] if "deepseek" in cut.name else []  # its configuration class comes in the folder
    probe = [PYTHON, Path(__file__).with_name("vllm_probe.py"), cut, tmp_path / "prompts.json", tmp_path / "out.json"]
    done = subprocess.run([*map(str, probe), *remote], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads((tmp_path / "out.json").read_text())
    same = 0
    for answer, (tokens, logprobs) in zip(answers, expected(cut, prompts), strict=True):
        assert answer["logprobs"] == pytest.approx(logprobs, abs=TOLERANCE)
        same += answer["tokens"] == tokens
    assert same == PROMPTS
