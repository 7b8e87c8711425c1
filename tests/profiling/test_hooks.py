"""Taps: the pass stays the plain one, the model is left clean, and what cannot be recorded is refused."""

from __future__ import annotations

import pytest
import torch

from moecover.checkpoints.structure import Structure
from moecover.errors import InputError
from moecover.profiling.hooks import recording
from moecover.profiling.run import profile
from moecover.profiling.sums import SCORING, scoring_function
from moecover.runtime.loading import load_model, routers
from tests.conftest import random_corpus
from tests.support.passes import hooks_of


def test_the_pass_is_the_plain_forward_pass(structure: Structure) -> None:
    """Logits while recording are bit-equal to those without, in bf16 too, and nothing is left on the model."""
    inputs = {"input_ids": torch.from_numpy(random_corpus().tokens)}
    for dtype in ("float32", "bfloat16"):
        model = load_model(structure, dtype=dtype)
        state = [sorted(vars(m)) for m in model.modules()]
        with torch.inference_mode():
            plain = model(**inputs).logits
            with recording(model, structure):
                recorded = model(**inputs).logits
        assert torch.equal(plain, recorded)
        assert [sorted(vars(m)) for m in model.modules()] == state
        assert hooks_of(model) == []


def test_an_error_in_the_pass_leaves_the_model_clean(structure: Structure) -> None:
    model = load_model(structure)
    with pytest.raises(RuntimeError, match="stop"), recording(model, structure):
        raise RuntimeError("stop")
    assert hooks_of(model) == []
    assert not any({"post_expert_norm", "_apply_gate"} & vars(m).keys() for m in model.modules())


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", [False, True])
def test_scoring_function_is_recognised(name: str, normalise: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 16) * 2
    scores = torch.softmax(logits, -1) if name == "softmax" else torch.sigmoid(logits)
    weights, index = scores.topk(4)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True) * 2.5
    assert scoring_function(logits, weights, index) == name
    torch.testing.assert_close(SCORING[name](logits), scores)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_another_kernel_is_refused_not_recorded_wrongly(structure: Structure, implementation: str) -> None:
    model = load_model(structure)
    model.set_experts_implementation(implementation)
    with pytest.raises(InputError, match=f"experts implementation {implementation}"):
        profile(structure, [random_corpus()], model=model)


def test_routers_are_found_and_a_family_that_does_not_fit_is_refused(structure: Structure) -> None:
    model = load_model(structure)
    assert len(routers(model, structure)) == len(structure.topology.decoder_layers)
    model.set_experts_implementation("eager")
    with (
        pytest.raises(InputError, match="do not run through the library's grouped kernel"),
        recording(model, structure),
    ):
        pass
