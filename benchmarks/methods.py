"""Held-out perplexity of every method and saliency on a shipped model.

    python -m benchmarks.methods [--model NAME] [--data DIR] [--samples 3] [--blocks 20] [-o docs/methods-NAME.json]

The source of the tables in docs/methods.md, and the evidence for the defaults. Calibrates on samples of the shipped
corpora and, with --data (a folder with wikitext2/, c4/, gutenberg/, gsm8k/), of WikiText2 and C4. Measures every plan
at 25, 50 and 75 % of the experts on held-out text of the calibrated corpora and on domains that no calibration set
covers.
Every calibration sample yields its own profile; random plans vary in their seed instead. Writes every cell as JSON;
`make docs` turns it into tables.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moecover.checkpoints.shipped import DEFAULT as MODEL
from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import read_structure
from moecover.cli.tour import LENGTH
from moecover.corpora.packing import Corpus, load_corpus
from moecover.evaluation.perplexity import perplexity
from moecover.planning.artifact import Plan, keep_all
from moecover.planning.masking import masked
from moecover.planning.options import PROTECT
from moecover.planning.run import plan_budgets
from moecover.planning.saliency import DEFAULT_SALIENCY, SALIENCIES
from moecover.profiling.artifact import Profile
from moecover.profiling.layer_inputs import sample_of
from moecover.profiling.run import profile
from moecover.runtime.loading import load_model

RETAINS = (0.25, 0.5, 0.75)
SEQUENCES = 96  # blocks per calibration sample: fewer than a corpus has, so that samples differ
SEARCH_TOKENS = 4096
PROTECTS = (0.25, 0.5, 0.75, 1.0)
NEAR = {"shipped": ("encyclopedia-heldout", "web-heldout"), "wikitext2+c4": ("wikitext2", "c4")}
FAR = ("python-heldout", "gutenberg", "gsm8k")


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Label and options of every method that needs nothing but a profile."""
    for saliency in SALIENCIES:
        yield f"pooled, {saliency}", {"method": "pooled", "saliency": saliency}
        for protect in PROTECTS:
            options = {"method": "tb-coverage", "saliency": saliency, "protect": protect}
            yield f"tb-coverage, {saliency}, protect {protect}", options
    default = {"saliency": DEFAULT_SALIENCY, "protect_super_experts": True}
    yield f"pooled, {DEFAULT_SALIENCY}, super experts", {"method": "pooled", **default}
    yield (
        f"tb-coverage, {DEFAULT_SALIENCY}, protect {PROTECT.default}, super experts",
        {"method": "tb-coverage", "protect": PROTECT.default, **default},
    )


def sources(data: Path | None, scratch: Path) -> tuple[dict[str, dict[str, Path | None]], dict[str, Path | None]]:
    """Calibration corpora by set, and held-out texts; each with its file, None for what is shipped."""
    calibrations: dict[str, dict[str, Path | None]] = {"shipped": {"encyclopedia": None, "web": None}}
    held_out: dict[str, Path | None] = {"encyclopedia-heldout": None, "web-heldout": None, "python-heldout": None}
    if data:
        questions = scratch / "gsm8k.jsonl"
        rows = [json.loads(line) for line in (data / "gsm8k" / "train.jsonl").read_text().split("\n") if line]
        questions.write_text("".join(json.dumps({"text": f"{r['question']}\n{r['answer']}"}) + "\n" for r in rows))
        wiki, c4 = data / "wikitext2", data / "c4"
        calibrations["wikitext2+c4"] = {"wikitext2": wiki / "train_head.raw.txt", "c4": c4 / "train_a.jsonl"}
        held_out |= {
            "wikitext2": wiki / "test.raw.txt",
            "c4": c4 / "validation.jsonl",
            "gutenberg": data / "gutenberg" / "train.jsonl",
            "gsm8k": questions,
        }
    return calibrations, held_out


class Bench:
    """The model, the held-out texts, and the cells measured so far."""

    def __init__(self, name: str, calibrations: dict[str, dict[str, Path | None]]) -> None:
        self.started = time.monotonic()
        self.name, self.calibrations = name, calibrations
        self.structure = read_structure(shipped_model(name))
        self.model = load_model(self.structure)
        self.keeps = [round(r * self.structure.topology.num_experts) for r in RETAINS]
        self.texts: list[Corpus] = []
        self.cells: list[dict[str, Any]] = []
        self.seen: dict[str, dict[str, float]] = {}

    def load(self, name: str, path: Path | None, sequences: int, seed: int = 0) -> Corpus:
        """A corpus, cut into ``sequences`` blocks."""
        return load_corpus(name, path, structure=self.structure, length=LENGTH, sequences=sequences, seed=seed)

    def measure(self, calibration: str, label: str, seed: int, chosen: Plan) -> None:
        """Add the cell of a plan; plans that keep the same experts are evaluated once."""
        key = json.dumps([layer.kept for layer in chosen.layers])
        if key not in self.seen:
            with masked(self.model, self.structure, chosen):
                self.seen[key] = {text.name: perplexity(self.model, text) for text in self.texts}
        cell = {"calibration": calibration, "label": label, "keep": chosen.keep, "seed": seed}
        self.cells.append({**cell, "perplexity": self.seen[key]})
        seconds = time.monotonic() - self.started
        print(f"{seconds:6.0f} s  {calibration}, {label}, keep {chosen.keep}, seed {seed}", flush=True)

    def sample(self, calibration: str, seed: int) -> Profile:
        """Measure every method on one calibration sample, and return its profile."""
        loaded = [self.load(n, p, SEQUENCES, seed) for n, p in self.calibrations[calibration].items()]
        made = profile(self.structure, loaded, model=self.model, batch_size=4)
        for label, options in variants():
            for chosen in plan_budgets(made, keeps=self.keeps, **options):
                self.measure(calibration, label, seed, chosen)
        search = {"model": self.model, "structure": self.structure, "sample": sample_of(loaded, SEARCH_TOKENS)}
        for mode in ("layerwise", "progressive", "progressive-local"):
            for chosen in plan_budgets(made, method="expert-sparsity", keeps=self.keeps, mode=mode, **search):
                self.measure(calibration, f"expert-sparsity, {mode}", seed, chosen)
        return made

    def record(self, samples: int, held_out: Iterable[str]) -> dict[str, Any]:
        """What the JSON file holds besides the cells."""
        return {
            "model": self.name,
            "experts": self.structure.topology.num_experts,
            "keeps": self.keeps,
            "samples": samples,
            "near": {c: [n for n in NEAR[c] if n in held_out] for c in self.calibrations},
            "far": [n for n in FAR if n in held_out],
            "calibration_tokens": dict.fromkeys(self.calibrations, 2 * SEQUENCES * LENGTH),
            "search_tokens": SEARCH_TOKENS,
            "held_out_tokens": {text.name: text.num_tokens for text in self.texts},
            "wall_s": round(time.monotonic() - self.started),
        }


def main() -> None:
    """Measure everything and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=MODEL, help="shipped model (%(default)s)")
    parser.add_argument("--data", type=Path, help="folder with wikitext2/, c4/, gutenberg/ and gsm8k/")
    parser.add_argument("--samples", type=int, default=3, help="calibration samples")
    parser.add_argument("--blocks", type=int, default=20, help="blocks of 256 tokens per held-out text")
    parser.add_argument("--seeds", type=int, default=5, help="random plans per budget")
    parser.add_argument("-o", "--output", type=Path, help="docs/methods-NAME.json by default")
    args = parser.parse_args()
    output = args.output or Path("docs") / f"methods-{args.model}.json"
    with tempfile.TemporaryDirectory() as scratch:
        calibrations, held_out = sources(args.data, Path(scratch))
        bench = Bench(args.model, calibrations)
        bench.texts = [bench.load(name, path, args.blocks) for name, path in held_out.items()]
        bench.measure("none", "full model", 0, keep_all(bench.structure.topology))
        for calibration in calibrations:
            for seed in range(args.samples):
                made = bench.sample(calibration, seed)
        for seed in range(args.seeds):
            for chosen in plan_budgets(made, method="random", keeps=bench.keeps, seed=seed):
                bench.measure("none", "random", seed, chosen)
    rows = ",\n".join(f"  {json.dumps(cell)}" for cell in bench.cells)
    result = json.dumps(bench.record(args.samples, held_out), indent=1)[:-2]
    output.write_text(f'{result},\n "cells": [\n{rows}\n ]\n}}\n')


if __name__ == "__main__":
    main()
