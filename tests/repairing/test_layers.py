"""The repair through the layers, against plain passes of the original and of the masked and repaired model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.packing import Corpus
from moecover.errors import InputError
from moecover.planning.masking import masked
from moecover.repairing.applied import LayerRepair, repaired
from moecover.repairing.layers import repair_layers as layer_after_layer
from moecover.repairing.solver import KINDS
from moecover.repairing.targets import places_on_disk
from moecover.runtime.loading import load_model
from moecover.runtime.streaming import streamed
from tests.conftest import hand_plan, random_corpus
from tests.support import zoo
from tests.support.repairs import CORPORA, half, outputs


def repair_layers(*args: object, **options: object) -> list[LayerRepair]:
    return [*layer_after_layer(*args, **options)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_stated_fit_is_what_plain_passes_give(structure: Structure, kind: str) -> None:
    model, plan = load_model(structure), half(structure)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    repairs = repair_layers(model, structure, plan, CORPORA, kind=kind, batch_size=3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name  # the model is left as it was
    assert any(repair.experts or repair.parameters for repair in repairs)
    for number, corpus in enumerate(CORPORA):
        whole = outputs(model, structure, corpus)
        with masked(model, structure, plan), repaired(model, structure, repairs):
            cut = outputs(model, structure, corpus)
        for repair, a, b in zip(repairs, whole, cut, strict=True):
            error = float((a - b).square().sum() / a.square().sum())
            assert error == pytest.approx(repair.fit.after[number], rel=1e-3)
    for repair in repairs:
        assert sum(repair.fit.after) <= sum(repair.fit.before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_shared_expert_as_wide_as_the_model(checkpoints: Callable[..., Path]) -> None:
    """All of its projections end at the hidden size."""
    structure = read_structure(checkpoints("qwen2_moe", shared_expert_intermediate_size=32))
    shared = [place.shared for place in places_on_disk(structure)]
    assert all(one is not None and one[1].endswith("mlp.shared_expert.down_proj.weight") for one in shared)
    for repair in repair_layers(load_model(structure), structure, half(structure), CORPORA, kind="ridge"):
        assert sum(repair.fit.after) < sum(repair.fit.before)


def test_the_first_layer_without_repair_is_the_masked_model(structure: Structure) -> None:
    model, plan = load_model(structure), half(structure)
    repairs = repair_layers(model, structure, plan, CORPORA, kind="ridge")
    for number, corpus in enumerate(CORPORA):
        whole = outputs(model, structure, corpus)[0]
        with masked(model, structure, plan):
            cut = outputs(model, structure, corpus)[0]
        error = float((whole - cut).square().sum() / whole.square().sum())
        assert error == pytest.approx(repairs[0].fit.before[number], rel=1e-3)


def test_layer_by_layer_is_the_same_to_the_last_bit(structure: Structure) -> None:
    plan = half(structure)
    whole = repair_layers(load_model(structure), structure, plan, CORPORA, kind="ridge")
    with streamed(structure) as stream:
        parts = repair_layers(stream, structure, plan, CORPORA, kind="ridge")
    for a, b in zip(whole, parts, strict=True):
        assert a.fit.after == b.fit.after
        assert a.experts.keys() == b.experts.keys()
        assert all(torch.equal(a.experts[e], b.experts[e]) for e in a.experts)
        assert (a.shared is None) == (b.shared is None)
        if a.shared is not None and b.shared is not None:
            assert a.shared[0] == b.shared[0]
            assert torch.equal(a.shared[1], b.shared[1])


def test_shared_experts_are_found_with_and_without_a_gate(checkpoints: Callable[..., Path]) -> None:
    for family, name in (("qwen2_moe", "shared_expert.down_proj"), ("deepseek_v3", "shared_experts.down_proj")):
        structure = read_structure(checkpoints(family))
        keep = [0, 1, 4, 5, 8, 9]  # the same number in each of deepseek_v3's three groups
        plan = hand_plan(structure, [keep] * len(structure.topology.decoder_layers))
        repairs = repair_layers(load_model(structure), structure, plan, CORPORA, kind="ridge", held_share=0.0)
        shared = [repair.shared[0] for repair in repairs if repair.shared is not None]
        assert len(shared) == len(repairs), family
        assert all(f"mlp.{name}.weight" in one for one in shared)


def test_padding_is_not_fitted(structure: Structure) -> None:
    model, plan = load_model(structure), half(structure)
    corpus = CORPORA[0]
    short = Corpus("short", corpus.tokens[:, :16], corpus.mask[:, :16], {})
    mask = corpus.mask.copy()
    mask[::2, 16:] = False
    mask[1::2, 16:] = False
    mask[0] = True  # one longer sequence, so that the others are padded
    padded = Corpus("padded", corpus.tokens, mask, {})
    alone = Corpus("alone", corpus.tokens[:1], corpus.mask[:1], {})
    rest = Corpus("rest", short.tokens[1:], short.mask[1:], {})
    found = repair_layers(
        model, structure, plan, [padded], kind="scale", batch_size=12, held_share=0.0, penalties=(0.1,)
    )[0]
    # The same tokens with no padding, as two corpora of which the error is put together again.
    one, two = (outputs(model, structure, c)[0] for c in (alone, rest))
    with masked(model, structure, plan):
        cut_one, cut_two = (outputs(model, structure, c)[0] for c in (alone, rest))
    error = float((one - cut_one).square().sum() + (two - cut_two).square().sum())
    norm = float(one.square().sum() + two.square().sum())
    assert found.fit.before[0] == pytest.approx(error / norm, rel=1e-3)


def test_what_cannot_be_repaired_is_refused_in_one_line(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("gpt_oss"))
    with pytest.raises(
        InputError, match="merge and repair do not run on gpt_oss: its experts have biases.* Use merge=none"
    ):
        repair_layers(load_model(structure), structure, half(structure), CORPORA, kind="ridge")


def test_a_block_that_is_no_sum_of_experts_is_refused(tmp_path: Path) -> None:
    zoo.make_model("cohere2_moe").save_pretrained(tmp_path / "model", save_original_format=True)
    structure = read_structure(tmp_path / "model")
    corpus = random_corpus("a", sequences=2, length=20, vocab=zoo.SMALL["vocab_size"])
    with pytest.raises(InputError, match="its block adds something else than its experts' outputs"):
        repair_layers(load_model(structure), structure, half(structure), [corpus], kind="ridge")
