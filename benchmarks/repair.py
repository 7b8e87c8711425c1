"""Held-out perplexity with and without repair on a shipped model: the evidence for the default of `prune --repair`.

    python -m benchmarks.repair [--model NAME] [--data DIR] [--samples 3] [--sequences 96] [--retain 0.25 ...] [-o FILE]

Plans with tb-coverage of the default saliency and of reap from samples of the shipped corpora and, with --data (see
`benchmarks.methods`), of WikiText2 and C4; repairs the first on the same text. Measures on held-out text of the calibrated
corpora (near) and on domains that neither plan nor repair saw (far). Prints, per budget and calibration, the geometric
means over samples and texts, and the mean gap in log-perplexity to the full model as a share of tb-coverage(reap)'s.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.methods import FAR, NEAR, sources
from moecover.corpus import Corpus, load_corpus
from moecover.demo import LENGTH, MODEL, shipped_model
from moecover.evaluation import perplexity
from moecover.masking import masked
from moecover.model import load_model
from moecover.planning import DEFAULT_SALIENCY, plan_budgets
from moecover.profiling import profile
from moecover.repair import KINDS
from moecover.repairing import repair_layers, repaired
from moecover.topology import read_structure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=MODEL, help="shipped model (%(default)s)")
    parser.add_argument("--data", type=Path, help="folder with wikitext2/, c4/, gutenberg/ and gsm8k/")
    parser.add_argument("--samples", type=int, default=3, help="calibration samples")
    parser.add_argument("--sequences", type=int, default=96, help="blocks of 256 tokens per corpus and sample")
    parser.add_argument("--blocks", type=int, default=20, help="blocks of 256 tokens per held-out text")
    parser.add_argument("--retain", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("-o", "--output", type=Path, help="every cell as JSON")
    args = parser.parse_args()
    started = time.monotonic()
    structure = read_structure(shipped_model(args.model))
    model = load_model(structure)
    keeps = [round(r * structure.topology.num_experts) for r in args.retain]
    cells: list[dict[str, Any]] = []

    def load(name: str, path: Path | None, sequences: int, seed: int = 0) -> Corpus:
        return load_corpus(name, path, structure=structure, length=LENGTH, sequences=sequences, seed=seed)

    def measure(**cell: Any) -> None:
        cells.append({**cell, "perplexity": {text.name: perplexity(model, text) for text in texts}})
        print(f"{time.monotonic() - started:6.0f} s  {json.dumps(cells[-1])}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        calibrations, held_out = sources(args.data, Path(scratch))
        texts = [load(name, path, args.blocks) for name, path in held_out.items()]
        measure(label="full model", calibration="none", keep=structure.topology.num_experts, sample=0)
        full = cells[0]["perplexity"]
        for calibration, corpora in calibrations.items():
            for seed in range(args.samples):
                loaded = [load(n, p, args.sequences, seed) for n, p in corpora.items()]
                made = profile(structure, loaded, model=model, batch_size=4)
                for saliency in ("reap", DEFAULT_SALIENCY):
                    for chosen in plan_budgets(made, method="tb-coverage", saliency=saliency, keeps=keeps):
                        about = {"calibration": calibration, "keep": chosen.keep, "sample": seed}
                        with masked(model, structure, chosen):
                            measure(label=saliency, **about)
                        for kind in KINDS if saliency == DEFAULT_SALIENCY else ():
                            before = time.monotonic()
                            repairs = [*repair_layers(model, structure, chosen, loaded, kind=kind)]
                            wall_s = round(time.monotonic() - before, 1)
                            fits = [[r.fit.penalty, r.fit.before, r.fit.after, len(r.fit.kept)] for r in repairs]
                            with masked(model, structure, chosen), repaired(model, structure, repairs):
                                measure(label=f"{saliency} + {kind}", **about, wall_s=wall_s, fits=fits)
    names = list(full)
    for calibration in calibrations:
        near = [n for n in NEAR[calibration] if n in names]
        for keep in keeps:
            for where, group in (("near", near), ("far", [n for n in FAR if n in names])):
                gaps: dict[str, list[float]] = {}
                for cell in cells:
                    if cell["calibration"] == calibration and cell["keep"] == keep:
                        found = [math.log(cell["perplexity"][n] / full[n]) for n in group]
                        gaps.setdefault(cell["label"], []).append(sum(found) / len(found))
                base = sum(math.log(full[n]) for n in group) / len(group)
                mean = {label: sum(values) / len(values) for label, values in gaps.items()}
                row = ", ".join(
                    f"{label} {math.exp(base + g):.1f} ({g / mean['reap']:.2f})" for label, g in mean.items()
                )
                print(f"{calibration}, keep {keep}, {where} (full {math.exp(base):.1f}): {row}")
    if args.output:
        args.output.write_text(
            json.dumps({"model": args.model, "samples": args.samples, "cells": cells}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
