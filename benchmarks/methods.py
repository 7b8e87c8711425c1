"""Held-out perplexity of every method and saliency on a shipped model: the tables in docs/methods.md, the evidence for the defaults.

    python -m benchmarks.methods [--model NAME] [--data DIR] [--samples 3] [--blocks 20] [-o docs/methods-NAME.json]

Calibrates on samples of the shipped corpora and, with --data (a folder with wikitext2/, c4/, gutenberg/, gsm8k/), of
WikiText2 and C4 too; measures every plan at 25, 50 and 75 % of the experts on held-out text of the calibrated corpora
and on domains that were never calibrated on. Every sample of calibration text makes a profile of its own; random plans
have seeds instead. Writes every cell as JSON; `make docs` draws the table from it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moecover.checkpoints.shipped import DEFAULT as MODEL
from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import read_structure
from moecover.cli.demo import LENGTH
from moecover.corpora.packing import Corpus, load_corpus
from moecover.evaluation.run import perplexity
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
SEQUENCES = 96  # blocks of a calibration sample: fewer than there are, so that samples differ
SEARCH_TOKENS = 4096
PROTECTS = (0.25, 0.5, 0.75, 1.0)
NEAR = {"shipped": ("encyclopedia-heldout", "web-heldout"), "wikitext2+c4": ("wikitext2", "c4")}
FAR = ("python-heldout", "gutenberg", "gsm8k")


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Label and options of everything that plans from a profile alone."""
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
    """Calibration corpora by set, and held-out texts, each with its file."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=MODEL, help="shipped model (%(default)s)")
    parser.add_argument("--data", type=Path, help="folder with wikitext2/, c4/, gutenberg/ and gsm8k/")
    parser.add_argument("--samples", type=int, default=3, help="calibration samples")
    parser.add_argument("--blocks", type=int, default=20, help="blocks of 256 tokens per held-out text")
    parser.add_argument("--seeds", type=int, default=5, help="random plans per budget")
    parser.add_argument("-o", "--output", type=Path, help="docs/methods-NAME.json by default")
    args = parser.parse_args()
    output = args.output or Path("docs") / f"methods-{args.model}.json"
    started = time.monotonic()
    structure = read_structure(shipped_model(args.model))
    model = load_model(structure)
    keeps = [round(r * structure.topology.num_experts) for r in RETAINS]
    cells: list[dict[str, Any]] = []
    seen: dict[str, dict[str, float]] = {}

    def load(name: str, path: Path | None, sequences: int, seed: int = 0) -> Corpus:
        return load_corpus(name, path, structure=structure, length=LENGTH, sequences=sequences, seed=seed)

    def measure(calibration: str, label: str, seed: int, chosen: Plan) -> None:
        key = json.dumps([layer.kept for layer in chosen.layers])
        if key not in seen:
            with masked(model, structure, chosen):
                seen[key] = {text.name: perplexity(model, text) for text in texts}
        cells.append(
            {"calibration": calibration, "label": label, "keep": chosen.keep, "seed": seed, "perplexity": seen[key]}
        )
        print(
            f"{time.monotonic() - started:6.0f} s  {calibration}, {label}, keep {chosen.keep}, seed {seed}", flush=True
        )

    with tempfile.TemporaryDirectory() as scratch:
        calibrations, held_out = sources(args.data, Path(scratch))
        texts = [load(name, path, args.blocks) for name, path in held_out.items()]
        measure("none", "full model", 0, keep_all(structure.topology))
        for calibration, corpora in calibrations.items():
            for seed in range(args.samples):
                loaded = [load(n, p, SEQUENCES, seed) for n, p in corpora.items()]
                made: Profile = profile(structure, loaded, model=model, batch_size=4)
                for label, options in variants():
                    for chosen in plan_budgets(made, keeps=keeps, **options):
                        measure(calibration, label, seed, chosen)
                search = {"model": model, "structure": structure, "sample": sample_of(loaded, SEARCH_TOKENS)}
                for mode in ("layerwise", "progressive"):
                    for chosen in plan_budgets(made, method="expert-sparsity", keeps=keeps, mode=mode, **search):
                        measure(calibration, f"expert-sparsity, {mode}", seed, chosen)
        for seed in range(args.seeds):
            for chosen in plan_budgets(made, method="random", keeps=keeps, seed=seed):
                measure("none", "random", seed, chosen)
    result = {
        "model": args.model,
        "experts": structure.topology.num_experts,
        "keeps": keeps,
        "samples": args.samples,
        "near": {c: [n for n in NEAR[c] if n in held_out] for c in calibrations},
        "far": [n for n in FAR if n in held_out],
        "calibration_tokens": dict.fromkeys(calibrations, 2 * SEQUENCES * LENGTH),
        "search_tokens": SEARCH_TOKENS,
        "held_out_tokens": {text.name: text.num_tokens for text in texts},
        "wall_s": round(time.monotonic() - started),
        "cells": cells,
    }
    rows = ",\n".join(f"  {json.dumps(cell)}" for cell in result.pop("cells"))
    output.write_text(f'{json.dumps(result, indent=1)[:-2]},\n "cells": [\n{rows}\n ]\n}}\n')


if __name__ == "__main__":
    main()
