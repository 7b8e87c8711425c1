"""Which experts tasks use: against counts by hooks and a hand-made case; the picture of what plans kept."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import style
from scipy import stats

from moecover.checkpoints.structure import Structure, read_structure
from moecover.checkpoints.topology import Topology
from moecover.corpora.tokenizer import load_tokenizer
from moecover.errors import InputError
from moecover.evaluation.task_usage import kept_weight, save, task_corpora, usage
from moecover.files.hashing import unsealed
from moecover.planning.artifact import LayerPlan, Plan
from moecover.planning.run import plan
from moecover.profiling.artifact import Profile
from moecover.profiling.run import profile
from moecover.profiling.statistics import STATISTICS
from moecover.reporting.figures.kept_weight import kept_by_layer_picture
from moecover.reporting.figures.style import STYLE
from moecover.runtime.loading import load_model
from tests.conftest import hand_plan, random_corpus

TEXTS = {
    "rivers": ["The river rises in the hills.", "It turns south past the old mill and falls into the sea.", "sea"],
    "numbers": ["0123456789", "4 + 4 = 8", "12 * 12 = 144, 13 * 13 = 169"],
}
TOPOLOGY = Topology("qwen2_moe", (1, 2), 4, 2, 8, 3)


def made_of(name: str, rows: dict[str, list[list[float]]]) -> Profile:
    """A profile whose statistics by corpus are the given sums, so that utility and use have their order."""
    statistics = {}
    for corpus, values in rows.items():
        sums = np.array(values)
        statistics[corpus] = {n: np.zeros(sums.shape) for n in STATISTICS} | {
            "weight_sum": sums,
            "weighted_norm_sum": sums,
        }
        statistics[corpus] |= {"num_tokens": np.full(sums.shape, 10), "count": (sums > 0).astype(np.int64)}
    return Profile(TOPOLOGY, statistics, {c: [{"sha256": c}] for c in rows}, {"name": name, "fingerprint": "f"})


CORPORA = made_of("m", {"wiki": [[4, 3, 2, 1], [1, 1, 1, 1]]})
TASKS = made_of("m", {"arc": [[3, 4, 2, 1], [5, 0, 5, 0]], "piqa": [[0, 0, 0, 8], [1, 2, 3, 4]]})


def by_hand(kept: list[list[int]]) -> Plan:
    layers = [LayerPlan(decoder_layer=d, kept=k) for d, k in zip((1, 2), kept, strict=True)]
    return Plan(schema=1, keep=len(kept[0]), layers=layers)


def test_facts_by_hand() -> None:
    facts = usage(CORPORA, TASKS, {"half": by_hand([[0, 1], [0, 3]]), "all": by_hand([[0, 1, 2, 3]] * 2)})
    assert (facts["keep"], facts["experts"], facts["layers"], facts["tasks"]) == (2, 4, [1, 2], ["arc", "piqa"])
    arc, piqa = facts["corpora"]["wiki"]["arc"], facts["corpora"]["wiki"]["piqa"]
    assert arc["jaccard"] == pytest.approx([1, 1 / 3])  # best by utility: 0 1 and 0 1; most used: 1 0 and 0 2
    assert arc["spearman"] == [pytest.approx(1 - 6 * 2 / (4 * 15)), None]  # the utility of layer 2 is constant
    assert piqa["jaccard"] == pytest.approx([1 / 3, 0])
    assert piqa["spearman"][0] == pytest.approx(stats.spearmanr([4, 3, 2, 1], [0, 0, 0, 8]).statistic)
    assert facts["plans"]["half"]["arc"]["kept_weight"] == pytest.approx([0.7, 0.5])
    assert facts["plans"]["half"]["piqa"]["kept_weight"] == pytest.approx([0, 0.5])  # expert 3 alone is used in layer 1
    assert facts["plans"]["all"]["piqa"]["kept_weight"] == [1, 1]


def test_a_larger_number_of_best_experts() -> None:
    facts = usage(CORPORA, TASKS, {}, keep=4)
    assert facts["corpora"]["wiki"]["piqa"]["jaccard"] == [1, 1]
    for keep in (0, 5):
        with pytest.raises(InputError, match=f"keep={keep} is out of range: 1 to 4"):
            usage(CORPORA, TASKS, {}, keep=keep)


def test_what_is_of_another_model_is_refused() -> None:
    other = Profile(TOPOLOGY, TASKS.statistics, TASKS.corpora, {"name": "n", "fingerprint": "g"})
    with pytest.raises(InputError, match="the profile of the tasks is of n, that of the corpora of m"):
        usage(CORPORA, other, {})
    wrong = Plan(schema=1, keep=2, model="n", layers=[LayerPlan(decoder_layer=5, kept=[0, 1])])
    with pytest.raises(InputError, match="plan a was made for n"):
        usage(CORPORA, TASKS, {"a": wrong})


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "olmoe"])
def test_use_is_what_hooks_see(structure: Structure) -> None:
    """The weights that enter the experts, text by text without padding, added up by hand."""
    corpora = task_corpora(TEXTS, structure=structure)
    found = profile(structure, corpora, dtype="float32", batch_size=2)
    generic = profile(structure, [random_corpus("a", seed=1), random_corpus("b", seed=2)], dtype="float32")
    plans = {"tb": plan(generic, keep=structure.topology.top_k + 1)}
    facts = usage(generic, found, plans)
    model, tokenizer = load_model(structure, dtype="float32"), load_tokenizer(structure.checkpoint.path)
    assert tokenizer is not None
    shape = (len(structure.topology.decoder_layers), structure.topology.num_experts)
    for task, texts in TEXTS.items():
        total, kept = np.zeros(shape), np.zeros(shape[0])

        def count(layer: int, args: Any, total: np.ndarray = total, kept: np.ndarray = kept) -> None:
            for experts, weights in zip(args[1].tolist(), args[2].tolist(), strict=True):
                for e, g in zip(experts, weights, strict=True):
                    total[layer, e] += g
                    if e in plans["tb"].layers[layer].kept:
                        kept[layer] += g

        handles = [
            model.get_submodule(name).register_forward_pre_hook(lambda module, args, i=i, count=count: count(i, args))
            for i, name in enumerate(structure.experts_modules)
        ]
        with torch.inference_mode():
            for text in texts:
                model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]]))
        for handle in handles:
            handle.remove()
        assert found.statistics[task]["weight_sum"] == pytest.approx(total, rel=1e-4, abs=1e-5)
        assert facts["plans"]["tb"][task]["kept_weight"] == pytest.approx(kept / total.sum(axis=1), rel=1e-4)
        for corpus in ("a", "b"):
            s = generic.statistics[corpus]
            utility = s["weighted_norm_sum"] / s["num_tokens"]
            expected = [stats.spearmanr(u, t).statistic for u, t in zip(utility, total, strict=True)]
            assert facts["corpora"][corpus][task]["spearman"] == pytest.approx(expected)
    assert facts["plans"]["tb"]["rivers"] != facts["plans"]["tb"]["numbers"]


def test_task_texts_are_sequences_of_their_own(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("mixtral"))
    tokenizer = load_tokenizer(structure.checkpoint.path)
    assert tokenizer is not None
    long = "start " + "river " * 200 + "the end"
    (corpus,) = task_corpora({"t": ["The sea.", "", long]}, structure=structure)
    rows = [row[keep].tolist() for row, keep in zip(corpus.tokens, corpus.mask, strict=True)]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("The sea.", long)]
    assert rows == [ids[0], ids[1][-64:]]  # 64 positions: the end of a long text stays
    assert (corpus.name, corpus.record["documents"], corpus.record["cut"]) == ("t", 3, 1)
    many = {"t": [f"{i} rivers" for i in range(20)]}
    few = task_corpora(many, structure=structure, limit=5)[0]
    assert len(few.tokens) == 5
    assert few.record["sha256"] == task_corpora(many, structure=structure, limit=5)[0].record["sha256"]
    assert few.record["sha256"] != task_corpora(many, structure=structure, limit=5, seed=1)[0].record["sha256"]
    for texts in ([], [""]):
        with pytest.raises(InputError, match="task t has no text"):
            task_corpora({"t": texts}, structure=structure)
    with pytest.raises(InputError, match="1 or more"):
        task_corpora(many, structure=structure, limit=0)


def test_a_model_without_tokenizer_is_refused(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints("mixtral"), tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*"))
    structure = read_structure(tmp_path / "m")
    with pytest.raises(InputError, match="has no tokenizer"):
        task_corpora(TEXTS, structure=structure)


def test_the_file_holds_every_model(tmp_path: Path) -> None:
    facts = usage(CORPORA, TASKS, {"half": by_hand([[0, 1], [0, 3]])})
    save([facts, facts], tmp_path / "usage.json")
    assert [unsealed(one) for one in json.loads((tmp_path / "usage.json").read_text())] == [facts, facts]


def test_kept_weight_of_a_plan(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("mixtral"))
    use = np.full((2, 6), 1 / 6)
    assert kept_weight(use, hand_plan(structure, [[0, 1, 2], [3, 4, 5]])) == pytest.approx([0.5, 0.5])


# ---------------------------------------------------------------------------------------------------------- the picture
def test_the_picture_shows_the_facts() -> None:
    kept = {"tb": [[0, 1], [2, 3]], "r0": [[2, 3], [0, 1]], "r1": [[0, 3], [0, 3]]}
    facts = usage(CORPORA, TASKS, {name: by_hand(rows) for name, rows in kept.items()})
    with warnings.catch_warnings(), style.context(STYLE, after_reset=True):
        warnings.simplefilter("error")
        figure = kept_by_layer_picture(facts, {"TB-Coverage": ["tb"], "random": ["r0", "r1"]}, keep=2)
        figure.canvas.draw()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["arc", "piqa"]
    ours, random, chance = figure.axes[0].get_lines()
    assert ours.get_ydata() == pytest.approx(facts["plans"]["tb"]["arc"]["kept_weight"])
    means = np.mean([facts["plans"][r]["arc"]["kept_weight"] for r in ("r0", "r1")], axis=0)
    assert random.get_ydata() == pytest.approx(means)
    assert list(chance.get_ydata()) == [0.5, 0.5]
    legend = [t.get_text() for t in figure.legends[0].get_texts()]
    assert legend == ["TB-Coverage", "random, 2 plans", "share of experts kept"]
    assert figure.axes[0].get_ylim()[0] == 0


def test_nothing_to_draw_is_said() -> None:
    facts = usage(CORPORA, TASKS, {"tb": by_hand([[0, 1], [2, 3]])})
    with pytest.raises(InputError, match="no plan other"):
        kept_by_layer_picture(facts, {"TB-Coverage": ["other"]}, keep=2)
    for methods in ({}, {"TB-Coverage": []}):
        with pytest.raises(InputError, match="a method has no plan"):
            kept_by_layer_picture(facts, methods, keep=2)
