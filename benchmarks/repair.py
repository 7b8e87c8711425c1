"""Repair and selection judged on text that nothing was fitted on: `moecover compare` on the shipped models.

    python -m benchmarks.repair RUN_DIR --data DIR [--models NAME ...] [--samples 5] [--jobs 2] [--picture FILE.png]

Calibrates on WikiText2 and C4 (DIR holds wikitext2/, c4/, gutenberg/ and gsm8k/, see `benchmarks.methods`), and on the
same number of tokens of text that the model itself generates (`moecover generate`): as one corpus, split into kinds
(`moecover split`), and in kinds together with the two corpora. Plans and repairs with every calibration sample at 25,
50 and 75 % of the experts. Measures on held-out text of the two corpora (near) and on three domains that neither plan
nor repair saw (far). RUN_DIR is a run of `compare`, and so are RUN_DIR/own/MODEL, RUN_DIR/kinds/MODEL and
RUN_DIR/all/MODEL: after an interruption, the same command resumes, and `moecover report` draws them. RUN_DIR/text holds
the generated text.

Prints one markdown table per model. For every method and budget: the gap in log perplexity to the full model, mean over
texts and samples, as a share of the gap of TB-Coverage (reap); the standard deviation of that share over samples; and
the difference of the first method from every other, with a 95 % interval from a paired bootstrap over windows (the
same number in every text) and the p of a paired t-test over calibration samples, both p values after Holm's correction
over the table of one model.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.methods import FAR, NEAR, sources
from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import read_structure
from moecover.comparison.bootstrap import Difference, paired_bootstrap
from moecover.comparison.cells import FULL
from moecover.comparison.run import compare
from moecover.comparison.tests import holm, over_seeds
from moecover.corpora.generation import write_generated
from moecover.corpora.kinds import split, write_kinds
from moecover.corpora.packing import load_corpus
from moecover.evaluation.artifact import Evaluation
from moecover.reporting.figures.style import COLOURS, DPI, FAINT, MARKERS, STYLE, page
from moecover.runtime.loading import load_model

MODELS = ("qwen2-moe-tiny", "deepseek-moe-tiny")
GROUPS = {"near": NEAR["wikitext2+c4"], "far": FAR}
GOAL = 0.4  # target share on the far texts
LENGTH = 512  # tokens of a block and of a window
BASE = "TB-Coverage (reap)"
METHODS: list[dict[str, Any]] = [
    {"method": "tb-coverage", "saliency": "contribution", "repair": ["ridge", "scale", "none"]},
    {"method": "worst-corpus", "repair": ["none", "ridge"]},
    {"method": "tb-coverage", "saliency": "reap"},
    {"method": "pooled", "saliency": "reap"},
    {"method": "expert-sparsity"},
    {"method": "random"},
]
ROWS = 1920  # blocks of generated text, of which every calibration sample takes a part
CONTRIBUTION: dict[str, Any] = {"saliency": "contribution"}


@dataclass(frozen=True)
class Own:
    """A calibration set with text that the model itself generates.

    Attributes:
        ending: what is appended to the label of a method.
        named: whether WikiText2 and C4 are part of the set.
        by_kind: whether every kind of text is a corpus.
        blocks: blocks per corpus and sample, as a multiple of ``--sequences``.
        methods: the methods compared on it.
    """

    ending: str
    named: bool
    by_kind: bool
    blocks: float
    methods: list[dict[str, Any]]


OWN = {
    "kinds": Own(
        ", own text by kind",
        False,
        True,
        1 / 4,
        [
            {"method": "tb-coverage", **CONTRIBUTION, "repair": ["ridge", "scale", "none"]},
            {"method": "pooled", **CONTRIBUTION, "repair": ["ridge", "none"]},
        ],
    ),
    "all": Own(
        ", all corpora", True, True, 5 / 24, [{"method": "tb-coverage", **CONTRIBUTION, "repair": ["ridge", "none"]}]
    ),
    "own": Own(", own text", False, False, 2, [{"method": "tb-coverage", **CONTRIBUTION, "repair": ["ridge", "none"]}]),
}


def grid(args: argparse.Namespace, scratch: Path, own: tuple[str, str] | None = None) -> dict[str, Any]:
    """The configuration of the comparison.

    Args:
        args: the command line.
        scratch: folder for converted corpora.
        own: a key of `OWN` and a model: the comparison of this model on its own text instead.
    """
    calibrations, held_out = sources(args.data, scratch)
    texts = [name for group in GROUPS.values() for name in group]
    corpora = [f"{n}={path}" for n, path in calibrations["wikitext2+c4"].items()]
    methods, sequences, models = METHODS, args.sequences, args.models
    if own:
        way, models = OWN[own[0]], [own[1]]
        file, folder = written(args, own[1])
        corpora = [*(corpora if way.named else ()), f"self={folder if way.by_kind else file}"]
        methods, sequences = way.methods, round(args.sequences * way.blocks)
    return {
        "models": [f"shipped:{name}" for name in models],
        "calibration": [corpora],
        "samples": list(range(args.samples)),
        "sequences": sequences,
        "length": LENGTH,
        "batch_size": 16,
        "search_tokens": 8192,
        "methods": methods,
        "retain": [0.25, 0.5, 0.75],
        "perplexity": [f"{n}={held_out[n]}" if held_out[n] else n for n in texts],
        "window": LENGTH,
        "windows": args.windows,
    }


def written(args: argparse.Namespace, model: str) -> tuple[Path, Path]:
    """The file of text that a model generates and the folder of its kinds, made if missing."""
    path: Path = args.run / "text" / f"{model}.jsonl"
    folder = path.with_suffix("")
    structure = read_structure(shipped_model(model))
    if not path.exists():
        write_generated(structure, load_model(structure), path, sequences=ROWS, length=LENGTH, seed=1, batch_size=48)
    if not folder.exists():
        corpus = load_corpus("self", path, structure=structure)
        ends = [int(structure.checkpoint.text_config["eos_token_id"])]
        kinds, typical = split(corpus, ends)
        write_kinds(folder, corpus, kinds, [list(map(str, ids)) for ids in typical], length=LENGTH, ends=ends)
    return path, folder


@dataclass(frozen=True)
class Found:
    """A method at a budget on one group of texts: the gap to the full model, and how it compares.

    Attributes:
        label: label of the method.
        perplexity: geometric mean over texts and runs.
        gap: mean log perplexity minus the full model's.
        shares: gap of every run as a share of the gap of TB-Coverage (reap) on the same sample (random plans: of its
            mean gap).
        boot: difference between the first method and this one over windows; None for the first itself.
        paired: the same over calibration samples.
    """

    label: str
    perplexity: float
    gap: float
    shares: list[float]
    boot: Difference | None
    paired: Difference | None


def measured(run: Path, model: str) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The finished cells of a model in all runs, and by cell and text every window's mean negative log-likelihood."""
    cells: list[dict[str, Any]] = []
    nll: dict[str, dict[str, Any]] = {}
    for folder, ending in [*((run / name / model, own.ending) for name, own in OWN.items()), (run, "")]:
        for cell in json.loads((folder / "results.json").read_text())["cells"]:
            if cell["model"] == model and cell["status"] == "done" and cell["id"] not in nll:
                (windows,) = Evaluation.load(folder / "cells" / cell["id"]).windows.values()
                nll[cell["id"]] = {text: sums[:, 0] / sums[:, 1] for text, sums in windows.items()}
                cells.append({**cell, "label": cell["label"] + ending * (cell["method"] != FULL)})
    return cells, nll


def found_on(run: Path, model: str) -> dict[tuple[float, str], list[Found]]:
    """Every method of a model, the first one first, by budget and group of texts, with corrected p values."""
    cells, nll = measured(run, model)
    (full,) = (nll[c["id"]] for c in cells if c["method"] == FULL)
    pruned = [c for c in cells if c["method"] != FULL]
    labels = list(dict.fromkeys(c["label"] for c in pruned))
    found: dict[tuple[float, str], list[Found]] = {}
    for retain in sorted({c["retain"] for c in pruned}):
        for where, texts in GROUPS.items():
            mean_full = statistics.fmean(float(full[t].mean()) for t in texts)
            runs: dict[str, dict[Any, float]] = {}
            items: dict[str, dict[str, Any]] = {}
            for label in labels:
                mine = [c for c in cells if c["label"] == label and c["retain"] == retain]
                means = {c["id"]: statistics.fmean(float(nll[c["id"]][t].mean()) for t in texts) for c in mine}
                runs[label] = {(c["sample"], c["seed"]): means[c["id"]] - mean_full for c in mine}
                items[label] = {t: np.mean([nll[c["id"]][t] for c in mine], axis=0) for t in texts}
            found[retain, where] = [row_of(label, labels[0], runs, items, mean_full) for label in labels]
    for name in ("boot", "paired"):
        tested = [(key, i) for key, rows in found.items() for i, row in enumerate(rows) if getattr(row, name)]
        corrected = holm([getattr(found[key][i], name).p for key, i in tested])
        for (key, i), p in zip(tested, corrected, strict=True):
            found[key][i] = replace(found[key][i], **{name: replace(getattr(found[key][i], name), p_holm=p)})
    return found


def row_of(
    label: str,
    first: str,
    runs: dict[str, dict[Any, float]],
    items: dict[str, dict[str, Any]],
    mean_full: float,
) -> Found:
    """Compare one method with the first.

    Args:
        label: the method.
        first: the first method.
        runs: gap by method and (sample, seed).
        items: negative log-likelihood of every window, mean over runs, by method and text.
        mean_full: the full model's mean over the texts.
    """
    base = statistics.fmean(runs[BASE].values())
    gap = statistics.fmean(runs[label].values())
    shares = [g / (runs[BASE][sample, None] if seed is None else base) for (sample, seed), g in runs[label].items()]
    boot = paired = None
    if label != first:
        boot = paired_bootstrap(items[first], items[label], resamples=100_000)
        ours, theirs = (np.array([*runs[name].values()]) for name in (first, label))
        paired = over_seeds(ours, theirs, paired=runs[first].keys() == runs[label].keys(), units="samples")
    return Found(label, math.exp(mean_full + gap), gap, shares, boot, paired)


def p_text(difference: Difference) -> str:
    """The corrected p in words."""
    if difference.p_holm is None:
        return "-"
    return "< 0.001" if difference.p_holm < 0.001 else f"{difference.p_holm:.3f}"


HEADS = (
    "kept",
    "texts",
    "method",
    "perplexity",
    "log gap",
    "share of TB-Coverage (reap)'s gap",
    "first method less this one",
    "p, windows",
    "p, samples",
)


def table(model: str, found: dict[tuple[float, str], list[Found]]) -> str:
    """The results of one model as a markdown table."""
    lines = [f"### {model}\n", f"| {' | '.join(HEADS)} |", "|---|---|---|" + "---:|" * 6]
    for (retain, where), rows in found.items():
        for row in rows:
            spread = f" ± {statistics.stdev(row.shares):.2f}" if len(row.shares) > 1 else ""
            tests = ["", "", ""]
            if row.boot is not None and row.paired is not None:
                value = f"{row.boot.value:+.3f} ({row.boot.low:+.3f} to {row.boot.high:+.3f})"
                tests = [value, p_text(row.boot), p_text(row.paired)]
            share = f"{statistics.fmean(row.shares):.2f}{spread}"
            cells = [f"{retain:.0%}", where, row.label, f"{row.perplexity:.1f}", f"{row.gap:.3f}", share]
            lines.append(f"| {' | '.join([*cells, *tests])} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, dict[tuple[float, str], list[Found]]], path: Path) -> None:
    """Draw the shares of all methods but random choice, at the two smaller budgets of every model."""
    from matplotlib import rc_context

    budgets = sorted({retain for by in found.values() for retain, _ in by})[:2]
    with rc_context(STYLE):
        rows = len({row.label for by in found.values() for some in by.values() for row in some})
        title = "Log-perplexity gap to the full model as a share of TB-Coverage (reap)'s: what repair leaves of it"
        figure = page(9.0, 2.2 + (0.6 + 0.21 * rows) * len(found), title)
        for number, (model, by) in enumerate(found.items()):
            for column, retain in enumerate(budgets):
                axes = figure.add_subplot(len(found), len(budgets), number * len(budgets) + column + 1)
                labels = [row.label for row in by[retain, "near"] if row.label != "random"]
                for turn, where in enumerate(GROUPS):
                    rows = [row for row in by[retain, where] if row.label in labels]
                    means = [statistics.fmean(row.shares) for row in rows]
                    spread = [statistics.stdev(row.shares) if len(row.shares) > 1 else 0.0 for row in rows]
                    places = [y + (turn - 0.5) * 0.25 for y in range(len(rows))]
                    axes.errorbar(
                        means,
                        places,
                        xerr=spread,
                        fmt=MARKERS[turn],
                        color=COLOURS[turn],
                        label=f"{where}: {', '.join(GROUPS[where])}",
                    )
                axes.axvline(1.0, color=FAINT, linewidth=0.8)
                axes.axvline(GOAL, color=FAINT, linewidth=0.8, linestyle=":", label=f"wanted on the far texts: {GOAL}")
                axes.set_yticks(range(len(labels)), labels if column == 0 else [""] * len(labels))
                axes.invert_yaxis()
                axes.set_xlim(left=0)
                axes.grid(axis="x")
                axes.set_title(f"{model}, {retain:.0%} of the experts")
                if number == len(found) - 1 and column == 0:
                    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=1)
        figure.savefig(path, dpi=DPI)


def main() -> None:
    """Run the comparisons and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of the comparison, new or to be resumed")
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2/, c4/, gutenberg/ and gsm8k/")
    parser.add_argument("--models", nargs="+", default=MODELS, help="shipped models (all)")
    parser.add_argument("--samples", type=int, default=5, help="calibration samples (%(default)s)")
    parser.add_argument(
        "--sequences", type=int, default=48, help="blocks of 512 tokens per corpus and sample (%(default)s)"
    )
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens per text (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the shares")
    args = parser.parse_args()
    args.data, args.run = args.data.absolute(), args.run.absolute()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "repair.yaml"
        for own in (None, *((name, model) for name in OWN for model in args.models)):
            path.write_text(yaml.safe_dump(grid(args, Path(scratch), own), sort_keys=False))
            folder = args.run.joinpath(*own) if own else args.run
            for cell, reason in compare(path, folder, jobs=args.jobs).failures.items():
                print(f"FAILED {cell}: {reason}")
    found = {model: found_on(args.run, model) for model in args.models}
    print("\n".join(table(model, by) for model, by in found.items()))
    if args.picture:
        draw(found, args.picture)


if __name__ == "__main__":
    main()
