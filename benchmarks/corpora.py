"""What more corpora add to WikiText2 and C4 where the use of a model is unknown, on the shipped models.

    python -m benchmarks.corpora RUN_DIR --data DIR [--models NAME ...] [--samples 3] [--windows 4]

RUN_DIR is that of `benchmarks.thin`: text that the model has written is taken from it, and the shapes that were found
there. DIR is as there. Code is the standard library's, mathematics the later rows of GSM8K; there is no local stand-in
for many languages or dialogues. All calibrations have 96 blocks of 512 tokens, divided equally among the corpora; what
the model writes, by kind, counts as one. At 25 and 50 % of the routed bytes, without repair. Prints by group of texts
the gap in log perplexity to the full model as a share of that with WikiText2 and C4 alone, mean and standard deviation
over samples. Every cell is a file in RUN_DIR.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.thin import GROUPS, LENGTH, MODELS, Bench, losses
from moecover.corpora.packing import Corpus, load_corpus, make_corpus
from moecover.evaluation.run import evaluate
from moecover.files.atomic import write_text
from moecover.planning.run import plan_budgets
from moecover.profiling.run import profile

BLOCKS, BUDGETS, LATER = 96, (0.25, 0.5), 2000
SETS = {
    "WikiText2 and C4": ("wikitext2", "c4"),
    "and code": ("wikitext2", "c4", "code"),
    "and mathematics": ("wikitext2", "c4", "mathematics"),
    "and both": ("wikitext2", "c4", "code", "mathematics"),
    "and what the model writes": ("wikitext2", "c4", "own"),
    "and all three": ("wikitext2", "c4", "code", "mathematics", "own"),
}
BASE = "WikiText2 and C4"


class More(Bench):
    """The model and the texts of `benchmarks.thin`, with code and mathematics to calibrate on."""

    def calibration(self, names: tuple[str, ...], sample: int, scratch: Path) -> list[Corpus]:
        """The corpora of a set, equal numbers of blocks of each."""
        blocks = BLOCKS // len(names)
        files = {**self.named, "code": None, "mathematics": scratch / "later.jsonl"}
        loaded = []
        for name in names:
            if name == "own":
                loaded += self.own(blocks, sample)
                continue
            place = "python" if name == "code" else str(files[name])
            loaded.append(
                load_corpus(name, place, structure=self.structure, length=LENGTH, sequences=blocks, seed=sample)
            )
        return loaded

    def own(self, blocks: int, sample: int) -> list[Corpus]:
        """Blocks of every kind that the model writes, in turn."""
        order = np.random.default_rng(sample)
        shuffled = [(kind, order.permutation(len(kind.tokens))) for kind in self.kinds]
        counts = [blocks // len(shuffled) + (place < blocks % len(shuffled)) for place in range(len(shuffled))]
        return [
            make_corpus(kind.name, kind.tokens[rows[:count]], kind.mask[rows[:count]], kind.record)
            for (kind, rows), count in zip(shuffled, counts, strict=True)
            if count
        ]

    def measure(self, samples: int, scratch: Path) -> None:
        """Measure every cell that has no file yet."""
        for sample in range(samples):
            for label, names in SETS.items():
                files = {budget: cell_file(self.args.run, self.name, sample, label, budget) for budget in BUDGETS}
                if all(file.exists() for file in files.values()):
                    continue
                used = self.calibration(names, sample, scratch)
                made = profile(self.structure, used, model=self.model, batch_size=16)
                for budget, file in files.items():
                    shape = json.loads((self.args.run / self.name / "0" / f"10-{budget}.json").read_text())
                    (plan,) = plan_budgets(made, keeps=[shape["keep"]], widths=[shape["width"]])
                    found = evaluate(
                        self.structure, {"row": plan}, model=self.model, texts=self.texts, full=False, batch_size=8
                    )
                    write_text(file, json.dumps(losses(found)))
                    print(f"{self.name}, sample {sample}, {budget:.0%}, {label}", flush=True)


def cell_file(run: Path, model: str, sample: int, label: str, budget: float) -> Path:
    """Where a cell is kept."""
    return run / model / "corpora" / f"{sample}-{list(SETS).index(label)}-{budget}.json"


def gaps(run: Path, model: str, sample: int, label: str, budget: float) -> dict[str, float]:
    """Gap to the full model, mean by group of texts, in nats."""
    full = json.loads((run / model / "full.json").read_text())
    loss = json.loads(cell_file(run, model, sample, label, budget).read_text())
    return {
        group: statistics.fmean(statistics.fmean(loss[t]) - statistics.fmean(full[t]) for t in texts)
        for group, texts in GROUPS.items()
    }


def table(run: Path, model: str, samples: int) -> str:
    """The results of one model as markdown."""
    lines = [
        f"### {model}",
        "",
        f"| kept | calibrated on | {' | '.join(GROUPS)} |",
        "|---|---|" + "---:|" * len(GROUPS),
    ]
    for budget in BUDGETS:
        for label in SETS:
            cells = []
            for group in GROUPS:
                found = [gaps(run, model, s, label, budget)[group] for s in range(samples)]
                base = [gaps(run, model, s, BASE, budget)[group] for s in range(samples)]
                share = [one / of for one, of in zip(found, base, strict=True)]
                spread = f" ± {statistics.stdev(share):.2f}" if samples > 1 else ""
                cells.append(f"{statistics.fmean(share):.2f}{spread} ({statistics.fmean(found):.3f})")
            lines.append(f"| {budget:.0%} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--windows", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [json.loads(one) for one in (args.data / "gsm8k" / "train.jsonl").read_text().split("\n") if one]
        later = "".join(json.dumps({"text": f"{r['question']}\n{r['answer']}"}) + "\n" for r in rows[LATER:])
        (Path(folder) / "later.jsonl").write_text(later)
        for name in args.models:
            More(name, args, Path(folder)).measure(args.samples, Path(folder))
    for name in args.models:
        print(table(args.run, name, args.samples))


if __name__ == "__main__":
    main()
