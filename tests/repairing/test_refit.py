"""The refit of a block: against naive steps, its guards, and the golden property through the files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moecover.checkpoints.structure import Structure, read_structure
from moecover.errors import InputError
from moecover.planning.masking import masked
from moecover.planning.run import plan_budgets
from moecover.profiling.run import profile
from moecover.repairing.applied import repaired
from moecover.repairing.calibration import Calibration
from moecover.repairing.layers import repair_layers
from moecover.repairing.memory import needed_bytes
from moecover.repairing.parts import whole
from moecover.repairing.refit import refit
from moecover.repairing.targets import Place, check_understood, places_on_disk
from moecover.runtime.loading import load_model
from moecover.runtime.streaming import streamed
from moecover.verification.verify import verify
from tests.conftest import random_corpus
from tests.support import zoo
from tests.support.proofs import logits_of
from tests.support.repairs import half, manifest_of, written

TOKENS, HIDDEN = 60, 5
ANY = [math.inf, math.inf]
MORE = [random_corpus("a", seed=1, sequences=60), random_corpus("b", seed=2, sequences=40)]


def block(values: Mapping[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """Something that is not linear in its parameters."""
    return torch.tanh(inputs @ values["up"]) @ values["down"]


def problem(noise: float = 0.0) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, Calibration]:
    """Parameters near those that give the target, inputs, target, and two corpora of unequal length."""
    rng = torch.Generator().manual_seed(3)
    true = {name: torch.randn(HIDDEN, HIDDEN, generator=rng) for name in ("up", "down")}
    start = {name: value + 0.2 * torch.randn(value.shape, generator=rng) for name, value in true.items()}
    inputs = torch.randn(TOKENS, HIDDEN, generator=rng)
    target = block(true, inputs) + noise * torch.randn(TOKENS, HIDDEN, generator=rng)
    corpus = torch.tensor([0] * 40 + [1] * 20)
    return start, inputs, target, Calibration(target, whole(corpus), [1.0, 3.0], 0.2)


def test_steps_are_adams_on_the_weighted_error() -> None:
    """By hand: gradients by differences, moments and steps written out, tokens in the stated order."""
    start, inputs, target, calibration = problem()
    trial = {name: 1.1 * value for name, value in start.items()}
    dtypes = dict.fromkeys(start, torch.float32)
    found = refit(block, trial, start, inputs, target, calibration, dtypes, ANY, epochs=2, step=0.05, tokens=16)
    assert found is not None

    held = np.array([False] * 32 + [True] * 8 + [False] * 16 + [True] * 4)
    x, y = inputs.double().numpy(), target.double().numpy()
    share = np.where(np.arange(TOKENS) < 40, 0.25 / (y[:40] ** 2).sum(), 0.75 / (y[40:] ** 2).sum())
    share /= share.mean()
    every = np.arange(TOKENS)

    def error(given: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
        return ((np.tanh(x[rows] @ given["up"]) @ given["down"] - y[rows]) ** 2).sum(1) * share[rows]

    def stepped(begin: Mapping[str, torch.Tensor], rows: np.ndarray, epochs: int) -> dict[str, np.ndarray]:
        values = {name: value.double().numpy().copy() for name, value in begin.items()}
        rate = {name: 0.05 * relative * math.sqrt((value**2).mean()) for name, value in values.items()}
        first = {name: np.zeros_like(value) for name, value in values.items()}
        second = {name: np.zeros_like(value) for name, value in values.items()}
        at, generator, count = 0, torch.Generator().manual_seed(0), -(-len(rows) // 16)
        for _ in range(epochs):
            order = rows[torch.randperm(len(rows), generator=generator).numpy()]
            for some in (order[n : n + 16] for n in range(0, len(rows), 16)):
                slopes = {name: np.zeros_like(value) for name, value in values.items()}
                for name, value in values.items():
                    for index in np.ndindex(value.shape):
                        moved = {key: one.copy() for key, one in values.items()}
                        moved[name][index] += 1e-6
                        ahead = error(moved, some).mean()
                        moved[name][index] -= 2e-6
                        slopes[name][index] = (ahead - error(moved, some).mean()) / 2e-6
                size = min(1.0, (at + 1) / 10) * 0.5 * (1 + math.cos(math.pi * at / (epochs * count)))
                at += 1
                for name, slope in slopes.items():
                    first[name] = 0.9 * first[name] + 0.1 * slope
                    second[name] = 0.99 * second[name] + 0.01 * slope**2
                    mean, spread = first[name] / (1 - 0.9**at), second[name] / (1 - 0.99**at)
                    values[name] -= rate[name] * size * mean / (np.sqrt(spread) + 1e-8)
        return values

    begin = {name: value.double().numpy() for name, value in trial.items()}
    whole = ((y**2).sum(1) * share)[held].sum()
    relative = math.sqrt(error(begin, every[held]).sum() / whole)
    tried = stepped(trial, every[~held], 1)
    assert found.held == pytest.approx((relative**2, error(tried, every[held]).sum() / whole), rel=1e-4)
    for name, value in stepped(start, every, 2).items():
        assert np.allclose(found.values[name].numpy(), value, atol=1e-5), name
    given = {name: value.double().numpy() for name, value in found.values.items()}
    parts = every[:40], every[40:]
    expected = [error(given, part).sum() / (share[part] * (y[part] ** 2).sum(1)).sum() for part in parts]
    assert found.errors == pytest.approx(expected, rel=1e-4)


def test_what_does_not_hold_on_other_tokens_is_not_taken() -> None:
    start, inputs, target, calibration = problem()
    dtypes = dict.fromkeys(start, torch.float32)
    wanted = block(start, inputs)
    noise = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    wanted[~calibration.held] += noise[~calibration.held]
    wanted[calibration.held] *= 1.001  # the held-out tokens are fitted as well as can be
    other = Calibration(wanted, calibration.part, [1.0, 3.0], 0.2)
    assert refit(block, start, start, inputs, wanted, other, dtypes, ANY, step=5.0) is None
    # A corpus of weight 0 has no say; one that counts may not lose.
    alone = Calibration(target, calibration.part, [0.0, 1.0], 0.2)
    assert refit(block, start, start, inputs, target, alone, dtypes, [0.0, math.inf]) is not None
    assert refit(block, start, start, inputs, target, calibration, dtypes, [0.0, math.inf]) is None
    exact = block(start, inputs)  # nothing is left to gain
    assert refit(block, start, start, inputs, exact, calibration, dtypes, ANY) is None


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_the_refitted_checkpoint_equals_the_refitted_model(
    checkpoints: Callable[..., Path], family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    structure = read_structure(checkpoints(family, dtype=dtype))
    chosen, original = half(structure), load_model(structure)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    repairs = [*repair_layers(original, structure, chosen, MORE, kind="refit")]
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert any(one.parameters for one in repairs)
    for one in repairs:
        if one.held is not None:
            assert one.held[1] < one.held[0]
    cut = written(structure, chosen, tmp_path, corpora=MORE, kind="refit")
    plain, info = AutoModelForCausalLM.from_pretrained(cut, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with masked(original, structure, chosen), repaired(original, structure, repairs):
        expected = logits_of(original)
    assert torch.equal(logits_of(plain.eval()), expected)
    result = verify(structure.checkpoint.path, cut)
    assert result["equal"]
    assert result["max_abs_difference"] == 0
    names = manifest_of(cut)["tensors"]
    assert result["repaired"] == len(names)
    assert any("gate" in name for name in names)  # the router, beside the experts


@pytest.mark.parametrize("family", ["granitemoe", "nemotron_h"])  # experts stacked on disk; no gate, one each on disk
def test_other_layouts_too(family: str, tmp_path: Path) -> None:
    zoo.make_model(family).save_pretrained(tmp_path / "model", save_original_format=True)
    structure = read_structure(tmp_path / "model")
    corpus = random_corpus("a", sequences=60, length=20, vocab=zoo.SMALL["vocab_size"])
    cut = written(structure, half(structure), tmp_path, corpora=[corpus], kind="refit")
    assert any("parameters" in row for row in manifest_of(cut)["layers"])
    assert verify(tmp_path / "model", cut)["equal"]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_thinner_experts_too(checkpoints: Callable[..., Path], family: str, tmp_path: Path) -> None:
    """deepseek_v3's shared experts get channels of zeros, which stay zeros."""
    structure = read_structure(checkpoints(family, moe_intermediate_size=24))
    made = profile(structure, MORE)
    (chosen,) = plan_budgets(made, method="tb-coverage", keeps=[6], widths=[16])
    cut = written(structure, chosen, tmp_path, corpora=MORE, kind="refit")
    assert any("parameters" in row for row in manifest_of(cut)["layers"])
    result = verify(structure.checkpoint.path, cut)
    assert result["equal"]
    assert result["max_abs_difference"] == 0


def test_layer_by_layer_is_the_same_to_the_last_bit(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    chosen = half(structure)
    whole = [*repair_layers(load_model(structure), structure, chosen, MORE, kind="refit")]
    with streamed(structure) as stream:
        parts = [*repair_layers(stream, structure, chosen, MORE, kind="refit")]
    for a, b in zip(whole, parts, strict=True):
        assert (a.held, a.fit.after) == (b.held, b.fit.after)
        assert a.parameters.keys() == b.parameters.keys()
        assert all(torch.equal(a.parameters[name], b.parameters[name]) for name in a.parameters)


def test_a_changed_router_is_found(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    cut = written(structure, half(structure), tmp_path, corpora=MORE, kind="refit")
    layer = next(row["decoder_layer"] for row in manifest_of(cut)["layers"] if "parameters" in row)
    tensors, name = load_file(cut / "model.safetensors"), f"model.layers.{layer}.mlp.gate.weight"
    tensors[name][0] += 1
    save_file(tensors, cut / "model.safetensors", metadata={"format": "pt"})
    result = verify(structure.checkpoint.path, cut)
    assert not result["equal"]
    assert result["changed_tensors"] == [name]
    facts = json.loads((cut / "moecover.json").read_text())
    row = next(row for row in facts["repair"]["layers"] if "parameters" in row)
    row["parameters"].append("lm_head.weight")
    (cut / "moecover.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="moecover.json is damaged"):
        verify(structure.checkpoint.path, cut)


def test_parameters_that_are_not_understood_are_refused(structure: Structure) -> None:
    place = Place(("a",), None, (8, 0), "float32", "mlp.experts.odd is not stored as it is used")
    with pytest.raises(InputError, match=r"repair=refit does not run on .*odd is not stored.* Use repair=ridge"):
        check_understood(structure, [place], "refit")
    check_understood(structure, [place], "ridge")


def test_memory_counts_values_gradients_and_moments(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    where = places_on_disk(structure)
    most = {
        kind: needed_bytes(structure, where, kind=kind, keep=6, tokens=10, dtype="float32")
        for kind in ("ridge", "refit")
    }
    hidden, (width, shared) = structure.topology.hidden_size, where[0].widths
    experts = structure.topology.num_experts
    parameters = 3 * hidden * (6 * width + shared) + experts * hidden
    assert most["refit"] >= 24 * parameters + 8 * experts * 3 * hidden * width
    assert most["refit"] > most["ridge"]
