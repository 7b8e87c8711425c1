"""Run folders of `compare` with synthetic numbers, for the tests of the page alone: nothing in them was measured."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moecover.checkpoints.topology import Topology
from moecover.planning.methods import METHODS as METHOD_RECORDS
from moecover.planning.methods import default_method
from moecover.planning.run import plan
from moecover.profiling.artifact import Profile
from moecover.profiling.statistics import COUNTS, STATISTICS

TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "winogrande")
TEXTS = ("wikitext2", "c4")
OURS = "TB-Coverage (contribution)"
# Label, name of the method, saliency, what it is worth in the made-up numbers, seeds.
MadeMethod = tuple[str, str, str | None, float, tuple[int | None, ...]]
METHODS: tuple[MadeMethod, ...] = (
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


def _row(name: str, keep: int, worth: float, grid: Grid, experts: int, rng: np.random.Generator) -> dict[str, Any]:
    """Made-up measurements; ``worth`` is how little the method loses, from 0 to 1."""
    lost = (1 - keep / experts) * (1 - 0.75 * worth)
    scores = {}
    for i, task in enumerate(grid.tasks):
        value = float(np.clip(0.45 + 0.06 * i - 0.35 * lost + rng.normal(0, 0.006), 0, 1))
        error = math.sqrt(value * (1 - value) / 1500)
        scores[task] = {"acc": {"value": value, "stderr": error}}
        if task in ("arc_challenge", "hellaswag"):
            scores[task]["acc_norm"] = {"value": min(1.0, value + 0.02), "stderr": error}
    perplexity = {}
    for i, text in enumerate(grid.texts):
        value = float((7.2 + 2 * i) * math.exp(3.2 * lost**1.5 + rng.normal(0, 0.01)))
        perplexity[text] = {
            "perplexity": value,
            "nll": math.log(value),
            "tokens": 280_000,
            "windows": 137,
            "kl": None if name == "full" else lost,
            "top1": None if name == "full" else 1 - lost,
        }
    return {
        "name": name,
        "plan": None,
        "keep": keep,
        "experts": experts,
        "num_bytes": int(4e9 + 24e9 * keep / experts),
        "perplexity": perplexity,
        "tasks": scores,
    }


@dataclass(frozen=True)
class Grid:
    """What a made-up run compares."""

    methods: Sequence[MadeMethod]
    budgets: Sequence[float]
    tasks: Sequence[str]
    texts: Sequence[str]
    corpora: Sequence[str]
    samples: int
    plans: bool
    full: bool
    fails: Sequence[str]
    reason: str


def make_run(
    folder: Path,
    *,
    models: Sequence[tuple[str, int, int]] = (("Qwen1.5-MoE-A2.7B", 24, 60), ("DeepSeek-MoE-16B-Base", 27, 64)),
    methods: Sequence[MadeMethod] = METHODS,
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
    grid = Grid(methods, budgets, tasks, texts, corpora, samples, plans, full, fails, reason)
    cells: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    usages = []
    for number, (model, layers, experts) in enumerate(models):
        made = _cells(folder, number, model, layers, experts, grid, rng)
        cells += made
        mine = [c for c in made if c["method"] != "full"]
        if usage:
            usages.append(_usage(model, layers, mine, tasks, corpora, rng))
        if compared:
            comparisons += _comparisons(model, mine, tasks, texts)
    results = {
        "schema": 1,
        "created_by": {"moecover": "0.1.0", "torch": "2.9"},
        "command": command,
        **_records(models, tasks, texts),
        "cells": cells,
        "comparisons": comparisons,
        "losses": _losses(cells),
        "failed": [c["id"] for c in cells if c["status"] == "failed"],
    }
    (folder / "results.json").write_text(json.dumps(results))
    if usages:
        (folder / "usage.json").write_text(json.dumps(usages))
    return folder


def _cells(
    folder: Path, number: int, model: str, layers: int, experts: int, grid: Grid, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """The cells of a model, whose profiles and plans are written to the folder."""
    cells: list[dict[str, Any]] = []
    shared = {"model": model, "saliency": None, "calibration": [], "sample": 0, "seed": None}
    shared |= {"status": "done", "reason": None, "plan": None}
    if grid.full:
        row = _row("full", experts, 1.0, grid, experts, rng)
        whole = {"method": "full", "label": "full model", "retain": 1.0, "keep": experts, "wall_s": 90.0, "row": row}
        cells.append({"id": f"{number}-full", **shared, **whole})
    for sample in range(grid.samples):
        profile = profile_of(layers, experts, grid.corpora, number * 10 + sample)
        if grid.plans:
            name = f"{'+'.join(grid.corpora)}-{sample}".replace("/", "_")
            profile.save(folder / "profiles" / str(number) / name)
        for budget, (turn, (label, method, saliency, worth, seeds)) in itertools.product(
            grid.budgets, enumerate(grid.methods)
        ):
            keep = round(budget * experts)
            blind = method in METHOD_RECORDS and METHOD_RECORDS[method].blind  # one set of cells for all samples
            for seed in () if blind and sample else seeds:
                name = f"{number}-{turn}-{sample}-{seed}-{keep}"
                cell = {"id": name, **shared, "method": method, "label": label, "saliency": saliency}
                cell |= {"calibration": [] if blind else list(grid.corpora), "sample": sample, "seed": seed}
                cell |= {"retain": budget, "keep": keep, "wall_s": 120.0}
                if label in grid.fails and budget == min(grid.budgets):
                    cells.append({**cell, "status": "failed", "reason": grid.reason, "row": None})
                    continue
                if grid.plans and method == default_method().name:
                    cell["plan"] = f"plans/{name}.json"
                    plan(profile, keep=keep).save(folder / cell["plan"])
                luck = worth if seed is None else float(rng.normal(0, 0.08))
                cells.append({**cell, "row": _row(label, keep, luck, grid, experts, rng)})
    return cells


def _records(models: Sequence[tuple[str, int, int]], tasks: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """The records of models, texts and tasks."""
    model = {"top_k": 4, "num_bytes": int(28e9), "dtype": "bfloat16", "device": "cpu", "peak_rss_bytes": 31_000_000_000}
    text = {"source": "synthetic", "split": "test", "tokens": 280_000, "windows": 137, "length": 2048}
    task = {"version": 1.0, "num_fewshot": 0, "items": 1500, "metrics": ["acc"], "metric": "acc", "data": "hub"}
    return {
        "models": [
            {
                "name": m,
                "family": "qwen2_moe",
                "fingerprint": f"{i:x}" * 32,
                "experts": e,
                "layers": n,
                **model,
                "cpu": "synthetic",
            }
            for i, (m, n, e) in enumerate(models)
        ],
        "texts": dict.fromkeys(texts, text),
        "tasks": dict.fromkeys(tasks, task),
    }


def _losses(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The losses of every row in its texts and tasks, and in their means, with made-up intervals around true values."""
    full = {c["model"]: c["row"] for c in cells if c["method"] == "full"}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for c in cells:
        if c["method"] != "full" and c["row"] and c["model"] in full:
            groups.setdefault((c["model"], c["label"], c["retain"], tuple(c["calibration"])), []).append(c["row"])
    found = []
    for (model, label, retain, calibration), rows in groups.items():
        whole = full[model]
        lost = {t: np.mean([math.log(r["perplexity"][t]["perplexity"]) for r in rows]) for t in whole["perplexity"]}
        lost = {t: v - math.log(whole["perplexity"][t]["perplexity"]) for t, v in lost.items()}
        less = {t: np.mean([r["tasks"][t]["acc"]["value"] for r in rows]) for t in whole["tasks"]}
        less = {t: v - whole["tasks"][t]["acc"]["value"] for t, v in less.items()}
        for kind, values, reach in (("perplexity", lost, 0.03), ("tasks", less, 0.01)):
            for names in [*((name,) for name in values), *([tuple(values)] if len(values) > 1 else [])]:
                value = float(np.mean([values[name] for name in names]))
                record = {"model": model, "label": label, "retain": retain, "calibration": calibration}
                record |= {"kind": kind, "names": list(names), "value": value, "n": 137}
                found.append(record | {"low": value - reach, "high": value + reach})
    return found


def _usage(
    model: str,
    layers: int,
    cells: Sequence[dict[str, Any]],
    tasks: Sequence[str],
    corpora: Sequence[str],
    rng: np.random.Generator,
) -> dict[str, Any]:
    def shares(centre: float) -> list[float]:
        return [float(v) for v in np.clip(rng.normal(centre, 0.08, layers), 0, 1)]

    done = [c for c in cells if c["status"] == "done"]
    return {
        "schema": 1,
        "model": f"owner/{model}",
        "keep": 4,
        "experts": 8,
        "tasks": list(tasks),
        "layers": list(range(1, layers + 1)),
        "corpora": {c: {t: {"jaccard": shares(0.5), "spearman": shares(0.6)} for t in tasks} for c in corpora},
        "plans": {c["id"]: {t: {"kept_weight": shares(min(0.97, c["retain"] + 0.15))} for t in tasks} for c in done},
    }


def _comparisons(
    model: str, cells: Sequence[dict[str, Any]], tasks: Sequence[str], texts: Sequence[str]
) -> list[dict[str, Any]]:
    done = [c for c in cells if c["status"] == "done"]
    labels = list(dict.fromkeys(c["label"] for c in done))
    ours = next((c["label"] for c in done if c["method"] == default_method().name), None)
    measures = [("tasks", f"mean of {len(tasks)} tasks")] if tasks else []
    measures += [("perplexity", t) for t in texts]
    found = []
    for retain in sorted({c["retain"] for c in done}):
        for i, other in enumerate(x for x in labels if x != ours and ours is not None):
            for kind, name in measures:
                verdict = ("not resolved", "worse")[(i + int(4 * retain)) % 2]
                if other == "random":
                    verdict = "better"
                value = {"better": 0.06, "worse": -0.008}.get(verdict, 0.002) * (1 if kind == "tasks" else -3)
                words = f"At {retain:.0%} {ours} is {verdict} against {other} on {name} (difference {value:+.4f})."
                place = {
                    "model": model,
                    "retain": retain,
                    "calibration": ["wikitext2", "c4"],
                    "kind": kind,
                    "name": name,
                }
                found.append({**place, "a": ours, "b": other, "words": words, **_verdict(kind, value, verdict, tasks)})
    return found


def _verdict(kind: str, value: float, verdict: str, tasks: Sequence[str]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "family": "the comparisons of the tests",
        "value": value,
        "low": value - 0.004,
        "high": value + 0.004,
        "p": 0.01,
        "p_holm": 0.03,
        "effect": 0.4,
        "n": 9000,
        "test": "paired bootstrap",
        "verdict": verdict,
        "over_runs": {"p": 0.021, "effect": 1.5, "test": "paired t-test over calibration samples"},
    }
    if kind == "tasks":
        made["over_tasks"] = {"p": 0.031, "effect": 1.0, "test": "Wilcoxon's signed-rank test over tasks"}
        made["by_task"] = {
            t: {"value": value + 0.001 * n, "low": value - 0.01, "high": value + 0.02, "n": 1500}
            for n, t in enumerate(tasks)
        }
    return made
