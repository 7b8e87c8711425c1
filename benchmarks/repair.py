"""Repair and selection judged on text that nothing was fitted on: `moecover compare` on the shipped models, then one table.

    python -m benchmarks.repair RUN_DIR --data DIR [--models NAME ...] [--samples 5] [--jobs 2]

Calibrates on WikiText2 and C4 (DIR holds wikitext2/, c4/, gutenberg/ and gsm8k/, see `benchmarks.methods`), plans and repairs
with every calibration sample at 25, 50 and 75 % of the experts. Measures on held-out text of the two corpora (near) and on
three domains that neither plan nor repair saw (far). RUN_DIR is a run of `compare`: the same command goes on where it
was interrupted, and `moecover report` draws it.

Prints for every method and budget the log-perplexity gap to the full model, mean over texts and samples, as a share of that
of TB-Coverage (reap), the spread of that share over samples, and the difference of the first method from every other: its
95 % interval from a paired bootstrap over windows, of which every text has as many, and the p of a paired t-test over
calibration samples, both after Holm's correction over the table of one model.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.methods import FAR, NEAR, sources
from moecover.comparison import compare
from moecover.evaluations import Evaluation
from moecover.grid import read
from moecover.significance import holm, over_seeds, paired_bootstrap

MODELS = ("qwen2-moe-tiny", "deepseek-moe-tiny")
BASE = "TB-Coverage (reap)"
METHODS: list[dict[str, Any]] = [
    {"method": "tb-coverage", "saliency": "contribution", "repair": ["ridge", "scale", "none"]},
    {"method": "worst-corpus", "repair": ["none", "ridge"]},
    {"method": "tb-coverage", "saliency": "reap"},
    {"method": "pooled", "saliency": "reap"},
    {"method": "expert-sparsity"},
    {"method": "random"},
]


def grid(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The configuration of the comparison."""
    calibrations, held_out = sources(args.data, scratch)
    texts = [n for where in (NEAR["wikitext2+c4"], FAR) for n in where]
    return {
        "models": [f"shipped:{name}" for name in args.models],
        "calibration": [[f"{n}={path}" for n, path in calibrations["wikitext2+c4"].items()]],
        "samples": list(range(args.samples)), "sequences": args.sequences, "length": 512, "batch_size": 16,
        "search_tokens": 8192, "methods": METHODS, "retain": [0.25, 0.5, 0.75],
        "perplexity": [f"{n}={held_out[n]}" if held_out[n] else n for n in texts], "window": 512, "windows": args.windows,
    }  # fmt: skip


def table(run: Path, model: str) -> list[str]:
    """The lines of one model."""
    results = json.loads((run / "results.json").read_text())
    cells = [c for c in results["cells"] if c["model"] == model and c["status"] == "done"]
    nll: dict[str, dict[str, Any]] = {}
    for cell in cells:
        (windows,) = Evaluation.load(run / "cells" / cell["id"]).windows.values()
        nll[cell["id"]] = {text: sums[:, 0] / sums[:, 1] for text, sums in windows.items()}
    (full,) = (nll[c["id"]] for c in cells if c["method"] == "full")
    labels = [label for label in dict.fromkeys(c["label"] for c in cells) if label != "full model"]
    lines, tests = [], list[tuple[int, Any, Any]]()
    for retain in sorted({c["retain"] for c in cells if c["method"] != "full"}):
        for where, texts in (("near", NEAR["wikitext2+c4"]), ("far", FAR)):
            mean_full = statistics.fmean(float(full[t].mean()) for t in texts)
            runs: dict[str, dict[Any, float]] = {}
            items: dict[str, dict[str, Any]] = {}
            for label in labels:
                mine = [c for c in cells if c["label"] == label and c["retain"] == retain]
                gaps = {(c["sample"], c["seed"]): statistics.fmean(float(nll[c["id"]][t].mean()) for t in texts) - mean_full for c in mine}  # fmt: skip
                runs[label] = gaps
                items[label] = {t: np.mean([nll[c["id"]][t] for c in mine], axis=0) for t in texts}
            base = statistics.fmean(runs[BASE].values())
            for label in labels:
                gap = statistics.fmean(runs[label].values())
                # Of every sample its own share; random plans look at no sample and are held against the mean.
                shares = [g / runs[BASE].get((sample, None), base) if seed is None else g / base for (sample, seed), g in runs[label].items()]  # fmt: skip
                spread = f" ± {statistics.stdev(shares):.3f}" if len(shares) > 1 else ""
                lines.append(f"{model}, {retain:.0%}, {where} | {label} | {math.exp(mean_full + gap):.2f} | {gap:.3f} | {gap / base:.3f}{spread}")  # fmt: skip
                if label != labels[0]:
                    boot = paired_bootstrap(items[labels[0]], items[label])
                    paired = runs[labels[0]].keys() == runs[label].keys()
                    first, second = (np.array([found[k] for k in found]) for found in (runs[labels[0]], runs[label]))
                    tests.append((len(lines) - 1, boot, over_seeds(first, second, paired=paired, units="samples")))
    corrected = [holm([t[i].p for t in tests]) for i in (1, 2)]
    for (row, boot, _), by_window, by_sample in zip(tests, *corrected, strict=True):
        told = [f"{p:.4f}" if p is not None else "-" for p in (by_window, by_sample)]
        lines[row] += f" | {boot.value:+.3f} ({boot.low:+.3f} to {boot.high:+.3f}) | {told[0]} | {told[1]}"
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of the comparison, made or filled further")
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2/, c4/, gutenberg/ and gsm8k/")
    parser.add_argument("--models", nargs="+", default=MODELS, help="shipped models (all)")
    parser.add_argument("--samples", type=int, default=5, help="calibration samples (%(default)s)")
    parser.add_argument("--sequences", type=int, default=48, help="blocks of 512 tokens per corpus and sample (%(default)s)")  # fmt: skip
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens per text (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    args = parser.parse_args()
    args.data, args.run = args.data.absolute(), args.run.absolute()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "repair.yaml"
        path.write_text(yaml.safe_dump(grid(args, Path(scratch)), sort_keys=False))
        outcome = compare(read(path, {}), args.run, jobs=args.jobs)
    for cell, reason in outcome.failures.items():
        print(f"FAILED {cell}: {reason}")
    print("where | method | perplexity | gap | share of TB-Coverage (reap)'s | first method less this one (95 %) | p, windows | p, samples")  # fmt: skip
    for model in args.models:
        print("\n".join(table(args.run, model)))


if __name__ == "__main__":
    main()
