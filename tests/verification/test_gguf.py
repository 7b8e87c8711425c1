"""Pruned GGUF files in llama.cpp itself: they load, generate, and compute what the masked original computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moecover.checkpoints.structure import read_structure
from moecover.errors import InputError
from moecover.gguf.parts import open_gguf
from moecover.llama.library import load
from moecover.llama.masking import Mask, masked_session
from moecover.llama.model import Session, opened
from moecover.planning.artifact import Plan
from moecover.pruning.gguf_writer import plan_in
from moecover.pruning.job import prune
from moecover.verification.gguf_numeric import BOUND, Numeric, compare
from moecover.verification.job import verify
from tests.conftest import random_corpus
from tests.support.command_line import run
from tests.support.gguf_files import plan_for
from tests.support.gguf_models import convert, needs_llama

pytestmark = needs_llama
KEPT = {  # by family: router groups of DeepSeek-V3 keep as many each
    "qwen3_moe": [[0, 3, 5, 6], [1, 2, 4, 7], [0, 1, 6, 7]],
    "deepseek_v3": [[0, 1, 4, 5, 9, 11], [2, 3, 6, 7, 8, 10]],
    "gpt_oss": [[0, 2, 4, 7], [1, 3, 5, 6]],
}
LAYERS = {"qwen3_moe": (0, 1, 2), "deepseek_v3": (1, 2), "gpt_oss": (0, 1)}
TEXT = random_corpus("random", sequences=2, length=30)


def plan_of(family: str, *, width: int | None = None) -> Plan:
    """The plan that keeps `KEPT`; with a width, channels of the experts' 16 that differ from one to the next."""
    plan = plan_for(KEPT[family], layers=LAYERS[family])
    if width is None:
        return plan
    value = plan.to_dict()
    for row in value["layers"]:
        row["channels"] = [sorted((expert + 3 * i) % 16 for i in range(width)) for expert in row["kept"]]
    return Plan.model_validate({**value, "width": width})


def greedy(session: Session, prompt: Sequence[int], count: int) -> list[int]:
    """A prompt and what follows it, the most likely token each time."""
    tokens = list(prompt)
    for _ in range(count):
        for _, logits in session.run(np.array(tokens)):
            last = int(logits[-1].argmax())
        tokens.append(last)
    return tokens


@pytest.mark.parametrize(
    "family, width, options",
    [
        ("deepseek_v3", None, {}),
        ("qwen3_moe", None, {"parts": 3}),
        ("qwen3_moe", 8, {}),
        ("qwen3_moe", None, {"experts": "BF16"}),
        ("gpt_oss", 8, {}),
    ],
)
def test_pruned_files_load_and_compute_what_the_masked_original_does(
    converted: Callable[..., Path], tmp_path: Path, family: str, width: int | None, options: dict[str, Any]
) -> None:
    """Groups with a correction bias, a split file, thin experts, another type, biases; what they generate is alike."""
    folder, plan = converted(family).with_name("checkpoint"), plan_of(family, width=width)
    model = convert(folder, tmp_path / "m.gguf", **options)
    out = prune(model, plan, tmp_path / "half.gguf", progress=False).output
    found = verify(model, out, corpora=[TEXT], progress=False)
    assert (found.equal, found.tokens, found.corpora) == (True, 60, ["random"])
    assert 0 <= found.max_abs_difference <= BOUND
    library, topology = load(), read_structure(model).topology
    channels = None if width is None else plan.channels
    mask = Mask(library, topology.decoder_layers, topology.num_experts, plan.kept, channels, 16)
    prompt = TEXT.tokens[0][:8].tolist()
    with opened(model, library) as full, opened(out, library) as pruned:
        with masked_session(full, mask, 16, threads=1) as one, pruned.session(16, threads=1) as two:
            alike = greedy(one, prompt, 8), greedy(two, prompt, 8)
        with full.session(16, threads=1) as unmasked:
            assert greedy(unmasked, prompt, 8) != alike[0]
    assert alike[0] == alike[1]


def test_a_swapped_expert_is_found_by_its_bytes_and_by_what_it_computes(
    converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, name = converted("deepseek_v3"), "blk.2.ffn_down_exps.weight"
    out = prune(model, plan_of("deepseek_v3"), tmp_path / "half.gguf", progress=False).output
    status, text, _ = run(capsys, "verify", model, out, "--dry-run")
    assert (status, "both models in llama.cpp" in text) == (0, True)
    status, text, _ = run(capsys, "verify", model, out)
    assert (status, "log-probabilities within" in text, "of encyclopedia-heldout, web-heldout" in text) == (
        0,
        True,
        True,
    )
    info = open_gguf(out).first.tensors[name]
    raw, size = bytearray(out.read_bytes()), (info.end - info.start) // info.shape[0]
    first, second = (slice(info.start + n * size, info.start + (n + 1) * size) for n in (0, 1))
    raw[first], raw[second] = raw[second], raw[first]
    out.write_bytes(raw)
    found = verify(model, out, corpora=[TEXT], progress=False)
    assert (found.equal, found.changed_tensors) == (False, [name])
    assert found.max_abs_difference > 100 * BOUND
    original, cut = read_structure(model), read_structure(out)
    plan = plan_in(open_gguf(out))
    numeric = compare(original, cut, plan, load(), corpora=[TEXT], on_cpu=True, required=True)
    assert isinstance(numeric, Numeric)
    assert numeric.fails


def test_what_cannot_run_is_said(converted: Callable[..., Path], tmp_path: Path) -> None:
    """An original that llama.cpp does not load; a reason that is an error where text was given."""
    source = converted("deepseek_v3")
    key = b"deepseek2.attention.head_count"
    model = tmp_path / "m.gguf"
    model.write_bytes(source.read_bytes().replace(key + b"\x04", key[:-5] + b"other\x04"))
    out = prune(model, plan_of("deepseek_v3"), tmp_path / "half.gguf", progress=False).output
    found = verify(model, out, progress=False)
    assert (found.equal, found.tokens) == (True, 0)
    assert "no model was run: llama.cpp" in found.summary()
    with pytest.raises(InputError, match="does not load .*m.gguf"):
        verify(model, out, corpora=[TEXT], progress=False)
    with pytest.raises(InputError, match="revision has no use here"):
        verify(model, out, revision="main", progress=False)
