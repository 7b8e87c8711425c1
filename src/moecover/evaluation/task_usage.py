"""Which experts tasks really use: reads the profiles of generic corpora and of task texts, and plans; gives usage.json.

For analysis only: task texts are never planned on. The use of an expert by a task is the sum of the routing weights with which
its tokens chose that expert, scaled to sum 1 in the layer, as observed in the full model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.corpora.packing import Corpus, load_tokenizer, make_corpus
from moecover.errors import InputError
from moecover.files.atomic import write_text
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


def task_corpora(
    documents: Mapping[str, Sequence[str]],
    *,
    structure: Structure,
    tokenizer: PreTrainedTokenizerBase | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Corpus]:
    """A corpus for every task: one text a sequence, as the task gives it, nothing packed.

    Args:
        documents: by task, its texts: context and right answer.
        structure: the model; gives tokenizer and longest sequence. Of a longer text its end stays, where the answer is.
        tokenizer: instead of the model's.
        limit: texts of a task at the most, a seeded sample; None takes all.
        seed: of that sample.

    Returns:
        Corpora in the order of the tasks, the sequences from the shortest to the longest, so that batches hold little padding.

    Raises:
        InputError: the model has no tokenizer, or a task has no text.
    """
    if limit is not None and limit < 1:
        raise InputError(f"{limit} texts of a task are wanted: 1 or more")
    tokenizer = tokenizer or load_tokenizer(structure.checkpoint.path)
    if tokenizer is None:
        raise InputError(f"{structure.checkpoint.name} has no tokenizer: the texts of tasks cannot be read by it")
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
    encoded = tokenizer(chosen, add_special_tokens=False, verbose=False)["input_ids"] if chosen else []
    rows = sorted((ids[-longest:] if longest else ids for ids in encoded if ids), key=len)
    if not rows:
        raise InputError(f"task {task} has no text: nothing tells which experts it uses")
    tokens = np.zeros((len(rows), len(rows[-1])), dtype=np.int64)
    mask = np.zeros(tokens.shape, dtype=bool)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    origin = {"source": f"task {task}", "seed": seed, "documents": len(texts), "cut": sum(len(ids) > (longest or len(ids)) for ids in encoded)}  # fmt: skip
    return make_corpus(task, tokens, mask, origin)


def usage(
    corpora: Profile,
    tasks: Profile,
    plans: Mapping[str, Plan],
    *,
    saliency: str = DEFAULT_SALIENCY,
    keep: int | None = None,
) -> dict[str, Any]:
    """What generic utility says about the tasks' use of the experts, and what every plan left of it.

    Args:
        corpora: the profile that plans are made from.
        tasks: a profile of `task_corpora` on the same model.
        plans: by name (the cell's id), of the same model.
        saliency: the utility of the corpora.
        keep: how many best experts are compared; None: half of them.

    Returns:
        ``schema``, ``model``, ``saliency``, ``keep``, ``experts``, ``tokens`` by task, ``tasks``, ``layers`` (decoder indices);
        ``corpora[corpus][task]``: ``jaccard`` of the ``keep`` best by utility and most used experts, and ``spearman`` over all
        experts (None where one of the two is constant), each ``[layer]``; ``plans[name][task]``: ``kept_weight`` ``[layer]``,
        the share of the task's routing weight that went to kept experts.

    Raises:
        InputError: profiles or plans of different models, or ``keep`` out of range.
    """
    topology = corpora.topology
    if tasks.topology != topology or tasks.model["fingerprint"] != corpora.model["fingerprint"]:
        raise InputError(f"the profile of the tasks is of {tasks.model['name']}, that of the corpora of {corpora.model['name']}: they must be of one model")  # fmt: skip
    for name, plan in plans.items():
        if plan.topology_fingerprint not in (None, topology.fingerprint) or tuple(r.decoder_layer for r in plan.layers) != topology.decoder_layers:  # fmt: skip
            raise InputError(f"plan {name} was made for {plan.model}, the profiles are of {tasks.model['name']}. Give plans of that model")  # fmt: skip
    keep = max(1, topology.num_experts // 2) if keep is None else keep
    if not 1 <= keep <= topology.num_experts:
        raise InputError(f"the best {keep} experts cannot be compared: 1 to {topology.num_experts}")
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


def _agreement(utility: NDArray[np.float64], use: NDArray[np.float64], keep: int) -> dict[str, list[float | None]]:
    """Overlap of the best and rank correlation of all experts in every layer; both ``[layer, expert]``."""
    overlaps: list[float | None] = []
    for one, two in zip(ranked(utility)[:, :keep].tolist(), ranked(use)[:, :keep].tolist(), strict=True):
        overlaps.append(len(set(one) & set(two)) / len(set(one) | set(two)))
    ranks = [correlations(one, two)["spearman"] for one, two in zip(utility, use, strict=True)]
    return {"jaccard": overlaps, "spearman": ranks}


def kept_weight(use: NDArray[np.float64], plan: Plan) -> list[float]:
    """Share of a task's routing weight that went to the kept experts, ``[layer]``; ``use`` is ``[layer, expert]``, sums 1."""
    shares = np.where(plan.mask(use.shape[1]), use, 0.0).sum(axis=1)
    return [min(1.0, float(share)) for share in shares]


def save(usages: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write usage.json, a list with an entry of `usage` for every model; the file appears only when complete."""
    write_text(path, json.dumps(list(usages), indent=1, allow_nan=False) + "\n")
