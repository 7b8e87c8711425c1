"""Which experts tasks use: reads the profiles of generic corpora and of task texts, and plans; gives usage.json.

For analysis only: no plan is made from task texts. The use of an expert by a task is the sum of the routing weights
that its tokens gave that expert, normalised to sum 1 within the layer, as observed in the full model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from moecover.corpora.bos import prefix_of
from moecover.corpora.packing import Corpus, make_corpus
from moecover.corpora.tokenizer import load_tokenizer
from moecover.errors import InputError, arg
from moecover.files.atomic import write_text
from moecover.files.hashing import sealed
from moecover.planning.artifact import Plan
from moecover.planning.explaining.facts import correlations
from moecover.planning.saliency import DEFAULT_SALIENCY, router_weight, utility_of
from moecover.planning.selection import ranked, scaled
from moecover.profiling.artifact import Profile

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from moecover.checkpoints.structure import Structure

SCHEMA = 1
FILE = "usage.json"


class Agreement(TypedDict):
    """Agreement of a corpus's utility with a task's use, each ``[layer]``.

    ``jaccard`` of the best experts by utility and the most used ones; ``spearman`` over all experts, None where one of
    the two is constant.
    """

    jaccard: list[float]
    spearman: list[float | None]


class Kept(TypedDict):
    """Share of a task's routing weight that went to kept experts, ``[layer]``."""

    kept_weight: list[float]


class Usage(TypedDict):
    """An entry of usage.json; ``keep`` is the number of best experts compared, ``layers`` are decoder layer indices."""

    schema: int
    model: str
    saliency: str
    keep: int
    experts: int
    tasks: list[str]
    tokens: dict[str, int]
    layers: list[int]
    corpora: dict[str, dict[str, Agreement]]
    plans: dict[str, dict[str, Kept]]


def task_corpora(
    documents: Mapping[str, Sequence[str]],
    *,
    structure: Structure,
    tokenizer: PreTrainedTokenizerBase | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Corpus]:
    """A corpus for every task: one text a sequence, as the task gives it, without packing.

    Args:
        documents: by task, its texts: context and right answer.
        structure: the model; gives tokenizer and longest sequence. A longer text keeps its end, where the answer is.
        tokenizer: instead of the model's.
        limit: texts of a task at most, a seeded sample; None takes all.
        seed: of that sample.

    Returns:
        Corpora in the order of the tasks, sequences from shortest to longest, so that batches hold little padding.

    Raises:
        InputError: the model has no tokenizer, or a task has no text.
    """
    if limit is not None and limit < 1:
        raise InputError(f"{arg('limit', limit)} is out of range: 1 or more")
    tokenizer = tokenizer or load_tokenizer(structure.checkpoint.path)
    if tokenizer is None:
        raise InputError(f"{structure.checkpoint.name} has no tokenizer, which the texts of tasks need")
    longest = structure.checkpoint.text_config.get("max_position_embeddings")
    return [_corpus(task, texts, tokenizer, longest, limit, seed) for task, texts in documents.items()]


def _corpus(
    task: str,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    longest: int | None,
    limit: int | None,
    seed: int,
) -> Corpus:
    chosen = list(texts)
    if limit is not None and limit < len(chosen):
        chosen = [chosen[i] for i in np.sort(np.random.default_rng(seed).choice(len(chosen), limit, replace=False))]
    prefix = list(prefix_of(tokenizer))  # as the harness has them
    bare = tokenizer(chosen, add_special_tokens=False, verbose=False)["input_ids"] if chosen else []
    encoded = [prefix + ids for ids in bare if ids]
    rows = sorted((ids[-longest:] if longest else ids for ids in encoded if ids), key=len)
    if not rows:
        raise InputError(f"task {task} has no text, so the experts that it uses are not known")
    tokens = np.zeros((len(rows), len(rows[-1])), dtype=np.int64)
    mask = np.zeros(tokens.shape, dtype=bool)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    cut = sum(len(ids) > (longest or len(ids)) for ids in encoded)
    origin = {"source": f"task {task}", "seed": seed, "documents": len(texts), "cut": cut}
    return make_corpus(task, tokens, mask, origin)


def usage(
    corpora: Profile,
    tasks: Profile,
    plans: Mapping[str, Plan],
    *,
    saliency: str = DEFAULT_SALIENCY,
    keep: int | None = None,
) -> Usage:
    """How well utility on generic corpora predicts the tasks' use of the experts, and what every plan left of that use.

    Args:
        corpora: the profile that plans are made from.
        tasks: a profile of `task_corpora` on the same model.
        plans: of the same model, by name (the cell's id).
        saliency: the utility of the corpora.
        keep: number of best experts to compare; None for half of them.

    Raises:
        InputError: profiles or plans of different models, or ``keep`` out of range.
    """
    topology = corpora.topology
    _check_one_model(corpora, tasks, plans)
    keep = max(1, topology.num_experts // 2) if keep is None else keep
    if not 1 <= keep <= topology.num_experts:
        raise InputError(f"{arg('keep', keep)} is out of range: 1 to {topology.num_experts}")
    used = {task: scaled(router_weight(s)) for task, s in tasks.statistics.items()}
    utility = {corpus: np.maximum(utility_of(saliency, s), 0) for corpus, s in corpora.statistics.items()}
    return {
        "schema": SCHEMA,
        "model": corpora.model["name"],
        "saliency": saliency,
        "keep": keep,
        "experts": topology.num_experts,
        "tasks": list(used),
        "tokens": {task: int(s["num_tokens"].max()) for task, s in tasks.statistics.items()},
        "layers": list(topology.decoder_layers),
        "corpora": {c: {task: _agreement(u, use, keep) for task, use in used.items()} for c, u in utility.items()},
        "plans": {
            name: {task: {"kept_weight": kept_weight(use, plan)} for task, use in used.items()}
            for name, plan in plans.items()
        },
    }


def _check_one_model(corpora: Profile, tasks: Profile, plans: Mapping[str, Plan]) -> None:
    topology = corpora.topology
    if tasks.topology != topology or tasks.model["fingerprint"] != corpora.model["fingerprint"]:
        raise InputError(
            f"the profile of the tasks is of {tasks.model['name']}, that of the corpora of {corpora.model['name']}: "
            "they must be of one model"
        )
    for name, plan in plans.items():
        layers = tuple(layer.decoder_layer for layer in plan.layers)
        if plan.topology_fingerprint not in (None, topology.fingerprint) or layers != topology.decoder_layers:
            raise InputError(
                f"plan {name} was made for {plan.model}, the profiles are of {tasks.model['name']}. "
                "Give plans of that model"
            )


def _agreement(utility: NDArray[np.float64], use: NDArray[np.float64], keep: int) -> Agreement:
    """Overlap of the best experts and rank correlation of all, by layer; arguments are ``[layer, expert]``."""
    overlaps = list[float]()
    for one, two in zip(ranked(utility)[:, :keep].tolist(), ranked(use)[:, :keep].tolist(), strict=True):
        overlaps.append(len(set(one) & set(two)) / len(set(one) | set(two)))
    ranks = [correlations(one, two)["spearman"] for one, two in zip(utility, use, strict=True)]
    return {"jaccard": overlaps, "spearman": ranks}


def kept_weight(use: NDArray[np.float64], plan: Plan) -> list[float]:
    """Share of a task's routing weight that went to kept experts, ``[layer]``.

    Args:
        use: ``[layer, expert]``, every row sums to 1.
        plan: which experts are kept.
    """
    shares = np.where(plan.mask(use.shape[1]), use, 0.0).sum(axis=1)
    return [min(1.0, float(share)) for share in shares]


def save(usages: Sequence[Usage], path: Path) -> None:
    """Write usage.json, a list with one sealed entry a model; the file appears only when complete."""
    write_text(path, json.dumps([sealed(usage) for usage in usages], indent=1, allow_nan=False) + "\n")
