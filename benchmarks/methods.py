"""Held-out perplexity of every method, saliency and protection on the shipped model: the evidence for the defaults.

    python -m benchmarks.methods [--data DIR] [--blocks 20]

Calibrates on the shipped corpora and, with --data (a folder with wikitext2/, c4/, gutenberg/, gsm8k/), on WikiText2 and
C4 too; measures on text of the calibrated registers and on domains that were never calibrated on. Prints, for every
choice, the geometric mean of the perplexity over all held-out domains, over the calibrated and over the other ones.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

from moecover.corpus import Corpus, load_corpus
from moecover.demo import LENGTH, shipped_model
from moecover.evaluation import masked, perplexity
from moecover.model import load_model
from moecover.planning import plan
from moecover.plans import Plan, keep_all
from moecover.profiling import profile
from moecover.saliency import SALIENCIES
from moecover.topology import read_structure

SHIPPED = {"encyclopedia": None, "web": None}
CALIBRATED = ("encyclopedia-heldout", "web-heldout", "wikitext2", "c4")


def geometric(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with wikitext2/, c4/, gutenberg/ and gsm8k/")
    parser.add_argument("--blocks", type=int, default=20, help="blocks of 256 tokens per held-out domain")
    parser.add_argument("--seeds", type=int, default=5, help="random plans per budget")
    args = parser.parse_args()
    structure = read_structure(shipped_model())
    model = load_model(structure)
    calibrations: dict[str, dict[str, Path | None]] = {"shipped": dict(SHIPPED)}
    held_out: dict[str, Path | None] = {"encyclopedia-heldout": None, "web-heldout": None, "python-heldout": None}
    with tempfile.TemporaryDirectory() as scratch:
        if args.data:
            questions = Path(scratch) / "gsm8k.jsonl"
            rows = [json.loads(line) for line in (args.data / "gsm8k" / "train.jsonl").read_text().split("\n") if line]
            questions.write_text("".join(json.dumps({"text": f"{r['question']}\n{r['answer']}"}) + "\n" for r in rows))
            wiki, c4 = args.data / "wikitext2", args.data / "c4"
            calibrations["wikitext2+c4"] = {"wikitext2": wiki / "train_head.raw.txt", "c4": c4 / "train_a.jsonl"}
            held_out |= {
                "wikitext2": wiki / "test.raw.txt", "c4": c4 / "validation.jsonl",
                "gutenberg": args.data / "gutenberg" / "train.jsonl", "gsm8k": questions,
            }  # fmt: skip

        def load(name: str, path: Path | None, sequences: int | None = None) -> Corpus:
            return load_corpus(name, path, structure=structure, length=LENGTH, sequences=sequences)

        texts = [load(name, path, args.blocks) for name, path in held_out.items()]

        def measure(chosen: Plan) -> dict[str, float]:
            with masked(model, structure, chosen):
                return {text.name: perplexity(model, text) for text in texts}

        def line(label: str, keep: int, found: list[dict[str, float]]) -> None:
            every = [geometric(list(f.values())) for f in found]
            near = [geometric([v for k, v in f.items() if k in CALIBRATED]) for f in found]
            far = [geometric([v for k, v in f.items() if k not in CALIBRATED]) for f in found]
            spread = f" ±{statistics.stdev(every):.1f}" if len(every) > 1 else ""
            means = [statistics.fmean(v) for v in (every, near, far)]
            print(f"{label:52} {keep:3} {means[0]:8.1f}{spread:6} {means[1]:8.1f} {means[2]:8.1f}", flush=True)

        print(f"{'calibration, method, saliency, protect':52} keep   all          calibrated   never")
        line("full model", structure.topology.num_experts, [measure(keep_all(structure.topology))])
        for calibration, sources in calibrations.items():
            made = profile(structure, [load(n, p) for n, p in sources.items()], model=model, batch_size=16)
            for keep in (30, 15):
                if calibration == "shipped":
                    plans = [plan(made, method="random", keep=keep, seed=seed) for seed in range(args.seeds)]
                    line(f"random, {args.seeds} seeds", keep, [measure(p) for p in plans])
                for saliency in SALIENCIES:
                    pooled = plan(made, method="pooled", saliency=saliency, keep=keep)
                    line(f"{calibration}, pooled, {saliency}", keep, [measure(pooled)])
                    seen: dict[str, dict[str, float]] = {}
                    for protect in (0.0, 0.25, 0.5, 0.75, 1.0):
                        chosen = plan(made, method="tb-coverage", saliency=saliency, protect=protect, keep=keep)
                        key = json.dumps([layer.kept for layer in chosen.layers])
                        seen[key] = seen.get(key) or measure(chosen)
                        line(f"{calibration}, tb-coverage, {saliency}, {protect}", keep, [seen[key]])


if __name__ == "__main__":
    main()
