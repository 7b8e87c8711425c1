"""Run folders of `compare` with synthetic numbers, for the tests of the page alone: nothing in them was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moecover.checkpoints.topology import Topology
from moecover.planning.run import plan
from moecover.profiling.artifact import COUNTS, STATISTICS, Profile

TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "winogrande")
TEXTS = ("wikitext2", "c4")
OURS = "TB-Coverage (contribution)"
# Label, name of the method, saliency, what it is worth in the made-up numbers, seeds.
METHODS: tuple[tuple[str, str, str | None, float, tuple[int | None, ...]], ...] = (
    ("random", "random", None, 0.0, (0, 1, 2, 3, 4)),
    ("REAP", "pooled", "reap", 0.85, (None,)),
    ("ExpertSparsity", "expert-sparsity", None, 0.9, (None,)),
    (OURS, "tb-coverage", "contribution", 0.93, (None,)),
)
HOSTILE = "<script>alert(1)</script>]]>\"'&amp; <img src=x onerror=alert(2)> größe 専門家"


def profile_of(layers: int, experts: int, corpora: Sequence[str], seed: int) -> Profile:
    """A profile with skewed utilities that the corpora partly share."""
    rng = np.random.default_rng(seed)
    topology = Topology("m", tuple(range(1, layers + 1)), experts, 2, 8, layers + 1)
    shared = rng.gamma(0.6, size=(layers, experts))
    statistics = {}
    for corpus in corpora:
        own = shared * rng.lognormal(0, 0.7, size=(layers, experts))
        made = {n: (1 + 100 * own).astype(np.int64) if n in COUNTS else own for n in STATISTICS}
        made["num_tokens"] = np.full((layers, experts), 262_144)
        statistics[corpus] = made
    records = {
        c: [{"sha256": f"{c}-{seed}", "source": f"synthetic {c}", "tokens": 262_144, "sequences": 128}] for c in corpora
    }
    return Profile(topology, statistics, records, {"name": "m", "fingerprint": f"synthetic-{seed}"})


def _row(name: str, keep: int, experts: int, worth: float, rng: np.random.Generator, tasks: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:  # fmt: skip
    lost = (1 - keep / experts) * (1 - 0.75 * worth)
    scores = {}
    for i, task in enumerate(tasks):
        value = float(np.clip(0.45 + 0.06 * i - 0.35 * lost + rng.normal(0, 0.006), 0, 1))
        error = math.sqrt(value * (1 - value) / 1500)
        scores[task] = {"acc": {"value": value, "stderr": error}}
        if task in ("arc_challenge", "hellaswag"):
            scores[task]["acc_norm"] = {"value": min(1.0, value + 0.02), "stderr": error}
    perplexity = {
        text: {
            "perplexity": (base := float((7.2 + 2 * i) * math.exp(3.2 * lost**1.5 + rng.normal(0, 0.01)))), "nll": math.log(base),
            "tokens": 280_000, "windows": 137, "kl": None if name == "full" else lost, "top1": None if name == "full" else 1 - lost,
        }
        for i, text in enumerate(texts)
    }  # fmt: skip
    return {
        "name": name, "plan": None, "keep": keep, "experts": experts, "num_bytes": int(4e9 + 24e9 * keep / experts),
        "perplexity": perplexity, "tasks": scores,
    }  # fmt: skip


def make_run(
    folder: Path,
    *,
    models: Sequence[tuple[str, int, int]] = (("Qwen1.5-MoE-A2.7B", 24, 60), ("DeepSeek-MoE-16B-Base", 27, 64)),
    methods: Sequence[tuple[str, str, str | None, float, tuple[int | None, ...]]] = METHODS,
    budgets: Sequence[float] = (0.25, 0.5, 0.75),
    tasks: Sequence[str] = TASKS,
    texts: Sequence[str] = TEXTS,
    corpora: Sequence[str] = ("wikitext2", "c4"),
    samples: int = 1,
    usage: bool = True,
    plans: bool = True,
    full: bool = True,
    compared: bool = True,
    fails: Sequence[str] = (),
    reason: str = "out of memory after 12 of 24 layers. Give a smaller --batch-size",
    command: str = "moecover compare synthetic.yaml -o run",
) -> Path:
    """Write a run folder as `compare` does; ``fails``: labels whose cells failed at the smallest budget."""
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    cells: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    usages = []
    for number, (model, layers, experts) in enumerate(models):
        first = len(cells)
        shared = {
            "model": model,
            "saliency": None,
            "calibration": [],
            "sample": 0,
            "seed": None,
            "status": "done",
            "reason": None,
        }
        if full:
            row = _row("full", experts, experts, 1.0, rng, tasks, texts)
            cells.append({"id": f"{number}-full", **shared, "method": "full", "label": "full model", "retain": 1.0, "keep": experts, "plan": None, "wall_s": 90.0, "row": row})  # fmt: skip
        for sample in range(samples):
            profile = profile_of(layers, experts, corpora, number * 10 + sample)
            if plans:
                profile.save(folder / "profiles" / str(number) / f"{'+'.join(corpora)}-{sample}".replace("/", "_"))
            for budget in budgets:
                keep = round(budget * experts)
                for turn, (label, method, saliency, worth, seeds) in enumerate(methods):
                    blind = method == "random"  # looks at no text: one set of cells for all samples
                    for seed in () if blind and sample else seeds:
                        name = f"{number}-{turn}-{sample}-{seed}-{keep}"
                        cell = {"id": name, **shared, "method": method, "label": label, "saliency": saliency, "calibration": [] if blind else list(corpora), "sample": sample, "seed": seed, "retain": budget, "keep": keep, "plan": None, "wall_s": 120.0}  # fmt: skip
                        if label in fails and budget == min(budgets):
                            cells.append({**cell, "status": "failed", "reason": reason, "row": None})
                            continue
                        if plans and method == "tb-coverage":
                            cell["plan"] = f"plans/{name}.json"
                            plan(profile, keep=keep).save(folder / cell["plan"])
                        luck = worth if seed is None else float(rng.normal(0, 0.08))
                        cells.append({**cell, "row": _row(label, keep, experts, luck, rng, tasks, texts)})
        mine = [c for c in cells[first:] if c["method"] != "full"]
        if usage:
            usages.append(_usage(model, layers, mine, tasks, corpora, rng))
        if compared:
            comparisons += _comparisons(model, mine, tasks, texts)
    about = [
        {"name": m, "family": "qwen2_moe", "fingerprint": f"{i:x}" * 32, "experts": e, "top_k": 4, "layers": n, "num_bytes": int(28e9), "dtype": "bfloat16", "device": "cpu", "peak_rss_bytes": 31_000_000_000, "cpu": "synthetic"}
        for i, (m, n, e) in enumerate(models)
    ]  # fmt: skip
    results = {
        "schema": 1, "created_by": {"moecover": "0.1.0", "torch": "2.9"}, "command": command, "models": about,
        "texts": {t: {"source": "synthetic", "split": "test", "tokens": 280_000, "windows": 137, "length": 2048} for t in texts},
        "tasks": {t: {"version": 1.0, "num_fewshot": 0, "items": 1500, "metrics": ["acc"], "metric": "acc", "data": "hub"} for t in tasks},
        "cells": cells, "comparisons": comparisons, "failed": [c["id"] for c in cells if c["status"] == "failed"],
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    if usages:
        (folder / "usage.json").write_text(json.dumps(usages))
    return folder


def _usage(model: str, layers: int, cells: Sequence[dict[str, Any]], tasks: Sequence[str], corpora: Sequence[str], rng: np.random.Generator) -> dict[str, Any]:  # fmt: skip
    def shares(centre: float) -> list[float]:
        return [float(v) for v in np.clip(rng.normal(centre, 0.08, layers), 0, 1)]

    return {
        "schema": 1, "model": f"owner/{model}", "keep": 4, "experts": 8, "tasks": list(tasks), "layers": list(range(1, layers + 1)),
        "corpora": {c: {t: {"jaccard": shares(0.5), "spearman": shares(0.6)} for t in tasks} for c in corpora},
        "plans": {
            c["id"]: {t: {"kept_weight": shares(min(0.97, c["retain"] + 0.15))} for t in tasks}
            for c in cells if c["status"] == "done"
        },
    }  # fmt: skip


def _comparisons(model: str, cells: Sequence[dict[str, Any]], tasks: Sequence[str], texts: Sequence[str]) -> list[dict[str, Any]]:  # fmt: skip
    done = [c for c in cells if c["status"] == "done"]
    labels = list(dict.fromkeys(c["label"] for c in done))
    ours = next((c["label"] for c in done if c["method"] == "tb-coverage"), None)
    found = []
    for retain in sorted({c["retain"] for c in done}):
        for i, other in enumerate(x for x in labels if x != ours and ours is not None):
            for kind, name in [
                *([("tasks", f"mean of {len(tasks)} tasks")] if tasks else []),
                *(("perplexity", t) for t in texts),
            ]:
                better = (
                    "better" if other == "random" else ("no significant difference", "worse")[(i + int(4 * retain)) % 2]
                )
                value = {"better": 0.06, "worse": -0.008}.get(better, 0.002) * (1 if kind == "tasks" else -3)
                words = f"At {retain:.0%} {ours} is {better} against {other} on {name} (difference {value:+.4f})."
                found.append({
                    "model": model, "retain": retain, "calibration": ["wikitext2", "c4"], "family": "the comparisons of the tests", "kind": kind, "name": name, "a": ours, "b": other, "value": value,
                    "low": value - 0.004, "high": value + 0.004, "p": 0.01, "p_holm": 0.03, "effect": 0.4, "n": 9000,
                    "test": "paired bootstrap", "verdict": better, "words": words,
                    "over_runs": {"p": 0.021, "effect": 1.5, "test": "paired t-test over calibration samples"},
                })  # fmt: skip
                if kind == "tasks":
                    found[-1]["over_tasks"] = {"p": 0.031, "effect": 1.0, "test": "Wilcoxon's signed-rank test over tasks"}  # fmt: skip
                    found[-1]["by_task"] = {t: {"value": value + 0.001 * n, "low": value - 0.01, "high": value + 0.02, "n": 1500} for n, t in enumerate(tasks)}  # fmt: skip
    return found
