"""Fewer experts per token: by one number in config.json, and by the skipping rule of arXiv 2402.14800."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moecover
from moecover.checkpoints.families import FIXED_TOP_K, PROVEN_FAMILIES
from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.packing import Corpus
from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.run import evaluate as evaluate_live
from moecover.evaluation.skipping import kept_slots
from moecover.planning.artifact import Plan, keep_all, kept_hash, with_top_k
from moecover.planning.masking import masked
from moecover.pruning.writer import prune
from moecover.runtime import fewer
from moecover.runtime.loading import load_model
from moecover.runtime.streaming import streamed
from tests.conftest import hand_plan, random_corpus
from tests.support import zoo
from tests.support.proofs import logits_of


def half(structure: Structure, top_k: int) -> Plan:
    """Every second expert, with fewer per token."""
    experts = list(range(0, structure.topology.num_experts, 2))
    return with_top_k(hand_plan(structure, [experts] * len(structure.topology.decoder_layers)), top_k)


# --------------------------------------------------------------------------------------------------------- top-k
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_the_emulation_is_what_the_checkpoint_is(checkpoints: Callable[..., Path], family: str, tmp_path: Path) -> None:
    """To the last bit; the model is itself again, and a pruned one with one expert less a token is another."""
    structure = read_structure(checkpoints(family))
    own = structure.topology.top_k
    plan = half(structure, own - 1)
    model = load_model(structure)
    before = logits_of(model)
    with masked(model, structure, plan):
        emulated = logits_of(model)
    with masked(model, structure, plan.model_copy(update={"top_k": None})):
        assert not torch.allclose(emulated, logits_of(model), rtol=1e-3)
    assert torch.equal(logits_of(model), before)
    out = prune(structure, plan, tmp_path / "out")
    cut = read_structure(out)
    assert (cut.topology.top_k, cut.topology.num_experts) == (own - 1, plan.keep)
    assert torch.equal(emulated, logits_of(load_model(cut)))
    assert moecover.verify(structure, out, corpora=[random_corpus(vocab=300)], progress=False).equal


@pytest.mark.slow
@pytest.mark.parametrize("family", PROVEN_FAMILIES)
def test_every_proven_family_follows(family: str, tmp_path: Path) -> None:
    """One expert a token, emulated and written, to the last bit; families that do not follow are refused."""
    zoo.make_model(family).save_pretrained(tmp_path / "m", save_original_format=True)
    structure = read_structure(tmp_path / "m")
    if structure.topology.top_k == 1:
        pytest.skip("a token goes to one expert")
    plan = with_top_k(keep_all(structure.topology), 1)
    if family in FIXED_TOP_K:
        with pytest.raises(InputError, match=f"top_k=1: {family} cannot be changed in that"):
            prune(structure, plan, tmp_path / "out")
        return
    model = load_model(structure)
    tokens = torch.from_numpy(random_corpus(vocab=zoo.SMALL["vocab_size"], sequences=2, length=12).tokens)
    with torch.inference_mode():
        with masked(model, structure, plan):
            emulated = model(input_ids=tokens, use_cache=False).logits
        cut = read_structure(prune(structure, plan, tmp_path / "out"))
        found = load_model(cut)(input_ids=tokens, use_cache=False).logits
    assert cut.topology.top_k == 1
    assert torch.equal(found, emulated)


def test_layer_by_layer_it_is_the_same(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("qwen3_moe"))
    text, plans = random_corpus("a", sequences=3), {"half": half(structure, 1)}
    in_memory = evaluate_live(structure, plans, model=load_model(structure), texts=[text])
    with streamed(structure) as stream:
        by_layer = evaluate_live(structure, plans, model=stream, texts=[text])
    assert by_layer.rows[1].perplexity == in_memory.rows[1].perplexity


def test_card_manifest_and_hash_tell(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    plan = half(structure, 2)
    whole = plan.model_copy(update={"top_k": None})
    made = moecover.prune(structure, whole, tmp_path / "out", top_k=2, progress=False)
    assert "2 instead of 4 a token" in made.sizes()
    assert json.loads((made / "config.json").read_text())["num_experts_per_tok"] == 2
    assert json.loads((made / "moecover.json").read_text())["plan"]["top_k"] == 2
    assert re.search(r"experts per token *\| *4 *\| *2 *\|", (made / "README.md").read_text())
    assert kept_hash(plan) != kept_hash(whole)
    assert Plan.from_json(plan.to_json()) == plan
    assert "top_k" not in whole.to_dict()
    again = moecover.prune(
        made.output, keep_all(read_structure(made.output).topology), tmp_path / "again", progress=False
    )
    assert re.search(r"experts per token *\| *4 *\| *2 *\| *2 *\|", (again / "README.md").read_text())


def test_rows_beside_the_others(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    plan = half(structure, 2).model_copy(update={"top_k": None})
    found = moecover.evaluate(structure, {"p": plan}, texts=[random_corpus("a")], top_ks=[2, 3], progress=False)
    assert [row.name for row in found.rows] == ["full", "p", "full top-2", "p top-2", "full top-3", "p top-3"]
    by_name = {row.name: row for row in found.rows}
    assert [row.plan and row.plan.get("top_k") for row in found.rows] == [None, None, 2, 2, 3, 3]
    assert by_name["p top-3"].perplexity["a"].nll != by_name["p"].perplexity["a"].nll
    assert by_name["full top-2"].perplexity["a"].kl > by_name["full top-3"].perplexity["a"].kl > 0
    assert by_name["full top-2"].num_bytes == by_name["full"].num_bytes


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "top_k=4 is out of range: .* sends a token to 4. Give fewer, 1 or more"),
        (
            {"num_experts_per_tok": None},
            "does not say that a token goes to 4 experts, under none of num_experts_per_tok",
        ),
    ],
)
def test_what_cannot_be(checkpoints: Callable[..., Path], config: dict[str, Any], message: str) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    structure.checkpoint.config.update(config)
    with pytest.raises(InputError, match=message):
        moecover.evaluate(structure, texts=[random_corpus()], top_ks=[3 if config else 4], progress=False)


def test_a_repair_is_refused(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    with pytest.raises(InputError, match="top_k=2: merges and repairs are made with the model's own number"):
        moecover.prune(
            structure, half(structure, 2), tmp_path / "out", repair="ridge", corpora=[random_corpus()], progress=False
        )


def test_a_family_that_does_not_follow_is_refused(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    structure = read_structure(checkpoints("mixtral"))
    monkeypatch.setattr(fewer, "following", lambda *given: {})
    with pytest.raises(
        InputError, match="decoder layer 0 of mixtral still gets 2 experts a token: it cannot be changed"
    ):
        moecover.evaluate(structure, texts=[random_corpus()], top_ks=[1], progress=False)


# ------------------------------------------------------------------------------------------------------ skipping
def test_the_rule_by_hand() -> None:
    """Weights 8 4 2: shares 1/2 and 1/4 of the largest; 8 8 1: 1 and 1/8; 4 1 1: 1/4 and 1/4. Medians 1/2 and 1/4.

    The third token skips its second expert, and so its third, whose share alone would do.
    """
    weights = np.array([[8.0, 4.0, 2.0], [8.0, 8.0, 1.0], [4.0, 1.0, 1.0]])
    betas = np.median(weights[:, 1:] / weights[:, :1], axis=0)
    assert betas.tolist() == [0.5, 0.25]
    assert kept_slots(weights, betas).tolist() == [[True, True, True], [True, True, False], [True, False, False]]


def texts() -> tuple[Corpus, Corpus]:
    """Calibration text with padding, and held-out text."""
    given = random_corpus("given", sequences=5, seed=3)
    given.mask[1, 15:] = False
    given.mask[3, :4] = False
    return given, random_corpus("a", sequences=3, seed=4)


def naive(structure: Structure, given: Corpus, text: Corpus, *, renormalise: bool) -> tuple[float, float]:
    """Mean negative log-likelihood on a text, and mean experts per token on calibration text, by loops over tokens."""
    model = load_model(structure)
    layers = [model.get_submodule(name) for name in structure.experts_modules]
    seen: list[list[list[float]]] = [[] for _ in layers]

    def noting(layer: int, used: list[bool]) -> Callable[..., None]:
        def note(module: object, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[2].double().tolist()
            seen[layer] += [sorted(row, reverse=True) for row, real in zip(rows, used, strict=True) if real]

        return note

    def left(row: list[float], betas: list[float]) -> list[float]:
        slots = sorted(range(len(row)), key=lambda slot: -row[slot])
        stay = [slots[0]]
        for place, slot in enumerate(slots[1:]):
            if row[slot] < betas[place] * row[slots[0]]:
                break
            stay.append(slot)
        factor = sum(row) / sum(row[slot] for slot in stay) if renormalise else 1.0
        return [weight * factor if slot in stay else 0.0 for slot, weight in enumerate(row)]

    with torch.inference_mode():
        for tokens, mask in zip(given.tokens, given.mask, strict=True):
            handles = [m.register_forward_pre_hook(noting(n, mask.tolist())) for n, m in enumerate(layers)]
            ids, attended = torch.from_numpy(tokens[None]), torch.from_numpy(mask[None]).long()
            positions = (attended.cumsum(-1) - 1).clamp(min=0)
            model(input_ids=ids, attention_mask=attended, position_ids=positions, use_cache=False)
            for handle in handles:
                handle.remove()
        betas = [[float(np.median([r[j] / r[0] for r in rows])) for j in range(1, len(rows[0]))] for rows in seen]
        active = [sum(w > 0 for w in left(row, b)) for rows, b in zip(seen, betas, strict=True) for row in rows]

        def skipping(layer: int) -> Callable[..., tuple[torch.Tensor, ...]]:
            def skip(module: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
                rows = [left(row, betas[layer]) for row in args[2].double().tolist()]
                return args[0], args[1], torch.tensor(rows).to(args[2].dtype)

            return skip

        for number, module in enumerate(layers):
            module.register_forward_pre_hook(skipping(number))
        losses = [
            model(input_ids=ids, labels=ids, use_cache=False).loss.item()
            for ids in torch.from_numpy(text.tokens).split(1)
        ]
    return float(np.mean(losses)), float(np.mean(active))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_rows_with_skipped_experts(checkpoints: Callable[..., Path], family: str) -> None:
    """mixtral and deepseek_v3 scale a token's weights to one sum, qwen2_moe does not."""
    structure, (given, text) = read_structure(checkpoints(family)), texts()
    found = moecover.evaluate(structure, texts=[text], skip=given, progress=False)
    assert [row.name for row in found.rows] == ["full", "full skip"]
    loss, active = naive(structure, given, text, renormalise=family != "qwen2_moe")
    full, row = found.rows
    assert row.plan is not None
    assert row.plan["skip"] == {
        "text": "given",
        "tokens": int(given.mask.sum()),
        "active": pytest.approx(active, abs=1e-4),
    }
    assert 1 < active < structure.topology.top_k
    assert row.perplexity["a"].nll == pytest.approx(loss, rel=1e-5)
    assert abs(row.perplexity["a"].nll - full.perplexity["a"].nll) > 10 * abs(row.perplexity["a"].nll - loss)


def test_a_plan_has_thresholds_of_its_own(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """Those that its checkpoint would have; the folder says what was done."""
    structure, (given, text) = read_structure(checkpoints("olmoe")), texts()
    plan = hand_plan(structure, [[0, 1, 4, 6], [2, 3, 5, 7]])
    found = moecover.evaluate(structure, {"p": plan}, texts=[text], skip=given, output=tmp_path / "e", progress=False)
    cut = moecover.prune(structure, plan, tmp_path / "cut", progress=False)
    alone = moecover.evaluate(cut.output, texts=[text], skip=given, progress=False)
    rows, written = found.rows, alone.rows[1]
    assert rows[3].name == "p skip"
    assert rows[3].perplexity["a"].nll == written.perplexity["a"].nll
    assert rows[3].plan is not None
    assert written.plan is not None
    assert rows[3].plan["skip"] == written.plan["skip"] != rows[2].plan["skip"]
    assert Evaluation.load(tmp_path / "e").rows == rows
    carded = moecover.prune(structure, plan, tmp_path / "carded", evaluations={"e": found}, progress=False)
    card = (carded / "README.md").read_text()
    assert f"{rows[1].perplexity['a'].perplexity:.2f}" in card
    assert f"{rows[3].perplexity['a'].perplexity:.2f}" not in card


def test_one_expert_a_token_has_none_to_skip(checkpoints: Callable[..., Path]) -> None:
    structure, (given, text) = read_structure(checkpoints("mixtral", num_experts_per_tok=1)), texts()
    with pytest.raises(InputError, match="skip=given: a token goes to one expert only"):
        moecover.evaluate(structure, texts=[text], skip=given, progress=False)
