"""Prune and convert, or convert and prune: llama.cpp's own converter makes the same tensors of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moecover.checkpoints.structure import read_structure
from moecover.planning.run import plan
from moecover.profiling.job import profile
from moecover.pruning.job import prune
from tests.conftest import random_corpus
from tests.support.gguf_files import fields_of, tensors_of
from tests.support.gguf_models import OPTIONS
from tests.support.llama_cpp import convert_by_llama_cpp, needs_converter

pytestmark = [pytest.mark.slow, needs_converter]


@pytest.mark.parametrize(
    "family, width, kind", [("qwen2_moe", None, "f32"), ("qwen3_moe", 8, "bf16"), ("deepseek_v3", None, "f32")]
)
def test_either_way_round(
    checkpoints: Callable[..., Path], tmp_path: Path, family: str, width: int | None, kind: str
) -> None:
    """A shared expert; thin experts, in bfloat16; a dense layer, router groups and a correction bias."""
    checkpoint = checkpoints(family, **OPTIONS[family])
    topology = read_structure(checkpoint).topology
    found = profile(checkpoint, [random_corpus("a", seed=1), random_corpus("b", seed=2)], progress=False)
    chosen = plan(found, keep=max(topology.top_k, topology.num_experts // 2), width=width)

    half = prune(checkpoint, chosen, tmp_path / "half", progress=False).output
    there = convert_by_llama_cpp(half, tmp_path / "pruned-converted.gguf", kind)
    whole = convert_by_llama_cpp(checkpoint, tmp_path / "whole.gguf", kind)
    back = prune(whole, chosen, tmp_path / "converted-pruned.gguf", progress=False).output

    assert tensors_of(back) == tensors_of(there)
    assert tensors_of(back) != tensors_of(whole)
    arch = fields_of(whole)["general.architecture"]
    fields = [{k: v for k, v in fields_of(file).items() if k.startswith(f"{arch}.")} for file in (back, there)]
    assert fields[0] == fields[1]
