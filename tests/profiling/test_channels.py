"""Energy of the channels beyond the naive reference: overflow, NaN, idle experts, the plain pass, the size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moecover.checkpoints.structure import read_structure
from moecover.corpora.packing import load_corpus
from moecover.errors import InputError
from moecover.profiling.collecting import checked
from moecover.profiling.hooks import recording
from moecover.profiling.reductions import weighted_squares
from moecover.profiling.run import profile
from moecover.profiling.sums import Sums
from moecover.profiling.wide import CHANNELS, num_bytes
from moecover.runtime.loading import load_model
from tests.conftest import random_corpus, write_rows
from tests.support import zoo
from tests.support.passes import spoiled
from tests.support.pretend_cuda import pretending

EXPERT = "model.layers.2.mlp.experts.5"


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_squares_beyond_float32(
    checkpoints: Callable[..., Path], tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One expert whose h^2 overflows, with powers of two: its energies are scaled exactly, the others' stay."""

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}.up_proj.weight"].mul_(2.0**70)
        tensors[f"{EXPERT}.down_proj.weight"].mul_(2.0**-50)

    folder, texts = spoiled(checkpoints("qwen2_moe"), tmp_path / "m", scale), [random_corpus(sequences=20)]
    expected = profile(read_structure(checkpoints("qwen2_moe")), texts).channels["random"]
    expected[1, 5] *= 2.0**40
    with pretending(monkeypatch, device) if device != "cpu" else contextlib.nullcontext(device) as named:
        made = profile(read_structure(folder), texts, device=named)
    assert np.isfinite(made.channels["random"]).all()
    assert made.channels["random"][1, 5].max() > 0
    np.testing.assert_allclose(made.channels["random"], expected, rtol=1e-5)


def test_a_damaged_expert_that_no_token_goes_to(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """It has no energy, as it has no other statistic."""
    rows = write_rows(tmp_path / "r.jsonl", [{"input_ids": [3, 4, 5]}])
    text = [load_corpus("r", rows)]
    made = profile(read_structure(checkpoints("qwen2_moe")), text)
    unused = int(np.flatnonzero(made.statistics["r"]["count"][1] == 0)[0])
    name = f"model.layers.2.mlp.experts.{unused}.down_proj.weight"
    folder = spoiled(checkpoints("qwen2_moe"), tmp_path / "m", lambda t: t[name].fill_(float("nan")))
    found = profile(read_structure(folder), text).channels["r"]
    np.testing.assert_allclose(found, made.channels["r"], rtol=1e-6)
    assert (found[1, unused] == 0).all()


def test_padding_may_hold_anything() -> None:
    """Activations of padding whose squares overflow do not reach the sums."""
    made = weighted_squares(
        torch.tensor([[1e30, 2.0], [3.0, 4.0], [5.0, float("nan")], [1.0, 1.0]]),
        torch.tensor([0.5, 2.0, 1.0, 3.0]),
        torch.tensor([0, 0, 2, 2]),
        4,
        torch.empty(3, 2),
        torch.tensor([False, True, False, True]),
    )
    assert made.tolist() == [[36.0, 64.0], [0.0, 0.0], [9.0, 9.0], [0.0, 0.0]]


def test_an_energy_that_is_not_finite_is_an_error(checkpoints: Callable[..., Path]) -> None:
    structure, corpus = read_structure(checkpoints("qwen2_moe")), random_corpus("web")
    sums = Sums(structure.topology, torch.device("cpu"), 1, 3)
    state = sums.state()
    state["num_tokens"][:] = corpus.num_tokens
    state[CHANNELS][1, 7, 2] = np.inf
    sums.restore(state)
    with pytest.raises(InputError, match="corpus web, decoder layer 2, expert 7: channel_energy is not finite"):
        checked(sums, corpus, structure.topology)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "muse_spark", "deepseek"])
def test_the_pass_is_the_plain_one(family: str, tmp_path: Path) -> None:
    """Biases, transposed weights, weighed inputs, a norm after the experts: equal logits, the model left as it was."""
    zoo.make_model(family).save_pretrained(tmp_path, save_original_format=True)
    structure = read_structure(tmp_path)
    model, inputs = load_model(structure), {"input_ids": torch.arange(60).reshape(3, 20)}
    state = [sorted(vars(m)) for m in model.modules()]
    with torch.inference_mode():
        plain = model(**inputs).logits
        with recording(model, structure) as taps:
            assert torch.equal(model(**inputs).logits, plain)
    assert all(tap.channels is not None and tap.channels.squares is not None for tap in taps)
    assert [sorted(vars(m)) for m in model.modules()] == state


def test_the_estimate_of_memory(checkpoints: Callable[..., Path]) -> None:
    """All sums in float64, twice more while they are written, and what the taps hold."""
    structure = read_structure(checkpoints("qwen2_moe"))
    made = profile(structure, [random_corpus("a"), random_corpus("b", seed=1)])
    one = made.channels["a"].nbytes
    experts = structure.topology.num_experts
    pairs = 8 * 2 * len(structure.topology.decoder_layers) * experts * (experts + 1) // 2
    assert (one + pairs) * 7 <= num_bytes(structure, 2) <= (one + pairs) * 8
