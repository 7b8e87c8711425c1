"""An importance matrix made by llama-imatrix itself: counts and sums of squares against the model by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from moecover.gguf.imatrix import read_imatrix
from moecover.planning.artifact import Plan
from moecover.profiling.imatrix import imatrix_profile
from tests.support.command_line import run
from tests.support.llama_cpp import needs_program, program, ran

pytestmark = [pytest.mark.slow, needs_program("llama-imatrix")]
CHUNK = 32
EXACT = ("-t", 1, "-b", CHUNK, "-fa", "off", "--cache-type-k", "f32", "--cache-type-v", "f32", "-ngl", 0)


@torch.no_grad()
def by_hand(folder: Path, text: str) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Of every MoE layer: tokens of every expert, and sums of squares of what enters its down projection."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    seen: list[tuple[torch.nn.Module, torch.Tensor]] = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.register_forward_pre_hook(lambda module, args: seen.append((module, args[0].flatten(0, -2))))
    model(ids[: len(ids) // CHUNK * CHUNK].view(-1, CHUNK))
    found = []
    for module, x in seen:
        chosen = (x @ module.gate.weight.T).topk(model.config.num_experts_per_tok).indices
        energies = []
        for expert in range(model.config.num_experts):
            gate, up = (x[(chosen == expert).any(-1)] @ module.experts.gate_up_proj[expert].T).chunk(2, -1)
            energies.append((F.silu(gate) * up).double().square().sum(0).numpy())
        found.append((torch.bincount(chosen.flatten(), minlength=len(energies)).numpy(), np.stack(energies)))
    return found


def test_it_holds_what_the_model_computes(
    converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = converted("qwen2_moe")
    letters = np.random.default_rng(0).choice(list("abcdefghij klmnop ,.0"), size=1500)
    (tmp_path / "text.txt").write_text(text := "".join(letters))
    matrix = tmp_path / "imatrix.gguf"
    ran([program("llama-imatrix"), "-m", model, "-f", tmp_path / "text.txt", "-o", matrix, "-c", CHUNK, *EXACT])

    read = read_imatrix(matrix)
    expected = by_hand(model.with_name("checkpoint"), text)
    assert len(read.count) == len(expected)
    for block, (count, squares) in zip(read.count, expected, strict=True):
        assert read.count[block].tolist() == count.tolist()
        np.testing.assert_allclose(read.squares[block], squares, rtol=1e-4, atol=1e-5 * squares.max())
    assert read.tokens == read.chunks * read.chunk_size == expected[0][0].sum() // 4

    made = imatrix_profile({"text": matrix}, model=str(model), progress=False)
    assert np.array_equal(made.statistics["text"]["count"], np.stack([count for count, _ in expected]))
    options = [
        "--imatrix",
        f"text={matrix}",
        "--retain",
        "0.5",
        "--saliency",
        "frequency",
        "-o",
        tmp_path / "plan.json",
    ]
    assert run(capsys, "plan", *options)[0] == 0
    for row, (count, _) in zip(Plan.load(tmp_path / "plan.json").layers, expected, strict=True):
        assert sorted(count[row.kept]) == sorted(count)[-len(row.kept) :]
