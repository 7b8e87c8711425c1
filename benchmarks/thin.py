"""Thinner experts and `shrink` judged on text near, far, known, unseen and in another script, on the shipped models.

    python -m benchmarks.thin RUN_DIR --data DIR [--models NAME ...] [--samples 5] [--windows 4]

DIR holds wikitext2/, c4/, gutenberg/, gsm8k/ and benchmarks/ (see `benchmarks.methods`). Calibrates on WikiText2 and
C4 ("paper": 48 blocks of 512 tokens of each), on these with what the model writes itself, by kind ("own": 10 blocks of
each of the two, 5 of each of sixteen kinds), and on these and tokens that they hardly hold ("all": 10 blocks of such
tokens). At 25, 50 and 75 % of the routed bytes: every baseline at whole experts, experts only and width only with
ridge, the shape that `--shape auto` finds on held-out blocks, alone, with ridge and with refit. Every cell is a file in
RUN_DIR: after an interruption the same command resumes. Prints for every model, budget and group of texts the gap in
log perplexity to the full model as a share of TB-Coverage (reap)'s on the same sample, mean and standard deviation over
samples, and the texts that lose more than it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.methods import sources
from benchmarks.unseen import KINDS as UNSEEN
from benchmarks.unseen import text_of
from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.generation import write_generated
from moecover.corpora.kinds import split, write_kinds
from moecover.corpora.packing import Corpus, load_corpus
from moecover.corpora.rare_tokens import rare_tokens
from moecover.corpora.windows import load_windows
from moecover.evaluation.budgets import measured_shape, shapes_within
from moecover.evaluation.run import evaluate
from moecover.files.atomic import write_text
from moecover.planning.artifact import Plan
from moecover.planning.run import plan_budgets
from moecover.planning.shapes import Shape
from moecover.profiling.artifact import Profile
from moecover.profiling.layer_inputs import sample_of
from moecover.profiling.run import profile
from moecover.progress import resolve
from moecover.repairing.applied import LayerRepair
from moecover.repairing.layers import repair_layers
from moecover.runtime.loading import load_model
from moecover.runtime.running import Running, running

MODELS = ("qwen2-moe-tiny", "deepseek-moe-tiny")
BUDGETS = (0.25, 0.5, 0.75)
GROUPS = {
    "near": ("wikitext2", "c4"),
    "far": ("python-heldout", "gutenberg", "gsm8k"),
    "known": ("encyclopedia-heldout", "web-heldout", "boolq", "hellaswag"),
    "unseen": tuple(kind for kind in UNSEEN if kind != "greek"),
    "script": ("greek",),
}
LENGTH, BLOCKS, OF_NAMED, OF_KIND, KINDS, ROWS, HELD_OUT = 512, 48, 10, 5, 16, 320, 2
LEAST = 0.02  # nats of the base's gap below which no share of it is stated
BASE = "TB-Coverage (reap)"


@dataclass(frozen=True)
class Way:
    """One row of the table: what is planned from which text, in which shape, with which repair."""

    label: str
    calibration: str
    method: str = "tb-coverage"
    saliency: str | None = "contribution"
    shape: str = "experts"
    repair: str | None = None
    first: bool = False  # measured on all samples before the other rows are begun


WAYS = (
    Way(BASE, "paper", saliency="reap", first=True),
    Way("TB-Coverage", "paper"),
    Way("REAP", "paper", "pooled", "reap"),
    Way("ExpertSparsity", "paper", "expert-sparsity", None),
    Way("random", "paper", "random", None),
    Way("best shape, WikiText2 and C4", "paper", shape="auto"),
    Way("best shape and ridge, WikiText2 and C4", "paper", shape="auto", repair="ridge"),
    Way("whole experts and ridge, all text", "all", repair="ridge"),
    Way("all experts thinner and ridge, all text", "all", shape="thinnest", repair="ridge"),
    Way("best shape, all text", "all", shape="auto"),
    Way("best shape and ridge, all text", "all", shape="auto", repair="ridge", first=True),
    Way("shrink: best shape and refit, all text", "all", shape="auto", repair="refit", first=True),
    Way("best shape and ridge, all text but rare tokens", "own", shape="auto", repair="ridge"),
)


class Bench:
    """A model with its texts, and the profiles of one calibration sample."""

    def __init__(self, name: str, args: argparse.Namespace, scratch: Path) -> None:
        self.name, self.args = name, args
        self.structure: Structure = read_structure(shipped_model(name))
        self.model: Running = running(load_model(self.structure, dtype="float32"), self.structure)
        calibrations, held_out = sources(args.data, scratch)
        self.named = calibrations["wikitext2+c4"]
        files = {**held_out, **third_party(args.data, scratch), **own_made(scratch)}
        names = [text for group in GROUPS.values() for text in group]
        self.texts = [self._windows(one, files[one]) for one in names]
        self.kinds = self._written()

    def _windows(self, name: str, path: Path | None) -> Corpus:
        return load_windows(name, path, structure=self.structure, length=LENGTH, windows=self.args.windows)

    def _written(self) -> list[Corpus]:
        """What the model writes, by kind."""
        file = self.args.run / "text" / f"{self.name}.jsonl"
        folder = file.with_suffix("")
        if not file.exists():
            write_generated(
                self.structure, self.model, file, sequences=ROWS, length=LENGTH, seed=1, batch_size=ROWS // 2
            )
        if not folder.exists():
            corpus = load_corpus("self", file, structure=self.structure)
            ends = [int(self.structure.checkpoint.text_config["eos_token_id"])]
            rows, typical = split(corpus, ends, kinds=KINDS)
            write_kinds(folder, corpus, rows, [list(map(str, ids)) for ids in typical], length=LENGTH, ends=ends)
        found = sorted(folder.glob("*.jsonl"), key=lambda path: int(path.stem))
        return [load_corpus(f"self-{path.stem}", path, structure=self.structure) for path in found]

    def corpora(self, calibration: str, sample: int) -> tuple[list[Corpus], list[Corpus]]:
        """Calibration text of a sample, and blocks of the same corpora that are not in it."""
        blocks = BLOCKS if calibration == "paper" else OF_NAMED
        used, unused = list[Corpus](), list[Corpus]()
        for name, path in self.named.items():
            both = load_corpus(name, path, structure=self.structure, length=LENGTH, sequences=blocks + 4, seed=sample)
            used.append(both[:blocks])
            unused.append(both[blocks:])
        for corpus in self.kinds if calibration != "paper" else []:
            order = np.random.default_rng(sample).permutation(len(corpus.tokens))
            shuffled = type(corpus)(corpus.name, corpus.tokens[order], corpus.mask[order], corpus.record)
            taken = max(1, min(OF_KIND, len(order) - HELD_OUT))
            used.append(shuffled[:taken])
            if taken < len(order):
                unused.append(shuffled[taken : taken + HELD_OUT])
        if calibration == "all":
            used.append(rare_tokens(self.structure, used, blocks=OF_NAMED, length=LENGTH, seed=sample))
        return used, unused

    def known(self, folder: Path, way: Way, budget: float) -> Shape | None:
        """The shape of a measured row that is the same but for the repair."""
        for number, other in enumerate(WAYS):
            file = folder / f"{number}-{budget}.json"
            if file.exists() and replace(other, label=way.label, repair=way.repair, first=way.first) == way:
                cell = json.loads(file.read_text())
                return Shape(cell["keep"], cell["width"])
        return None

    def plan(
        self,
        way: Way,
        budget: float,
        made: Profile,
        used: list[Corpus],
        unused: list[Corpus],
        known: Shape | None = None,
    ) -> Plan:
        """The plan of a row, in a shape that is known or to be found."""
        assert not isinstance(self.structure.width, str)
        channels, topology = self.structure.width.channels, self.structure.topology
        shapes = shapes_within(topology, channels, budget=budget)
        options: dict[str, Any] = {} if way.saliency is None else {"saliency": way.saliency}
        if way.shape == "auto" and known is None:
            return measured_shape(
                made, self.structure, shapes, unused, way.method, options, self.model, 8, resolve(False)
            )
        full = [
            one for one in shapes if one.keep * (one.width or channels) > 0.9 * budget * topology.num_experts * channels
        ]
        shape: Shape = known or (shapes[0] if way.shape == "experts" else full[-1])
        more: dict[str, Any] = {}
        if way.method == "expert-sparsity":
            more = {"model": self.model, "structure": self.structure, "sample": sample_of(used, 8192)}
        return plan_budgets(made, method=way.method, keeps=[shape.keep], widths=[shape.width], **more, **options)[0]

    def cell(self, plan: Plan, way: Way, used: list[Corpus]) -> dict[str, Any]:
        """What is measured of a plan, and of the model itself."""
        repairs = {}
        if way.repair is not None:
            made: list[LayerRepair] = list(
                repair_layers(self.model, self.structure, plan, used, kind=way.repair, batch_size=16)
            )
            repairs = {"row": made.__getitem__}
        found = evaluate(
            self.structure, {"row": plan}, model=self.model, texts=self.texts, full=False, repairs=repairs, batch_size=8
        )
        return {"keep": plan.keep, "width": plan.width, "found": plan.found.get("shapes"), "loss": losses(found)}

    def run(self) -> None:
        """Measure every cell that has no file yet."""
        folder = self.args.run / self.name
        if not (folder / "full.json").exists():
            found = evaluate(self.structure, {}, model=self.model, texts=self.texts, batch_size=8)
            write_text(folder / "full.json", json.dumps(losses(found)))
        for budgets, first, sample in itertools.product(
            (BUDGETS[:2], BUDGETS[2:]), (True, False), range(self.args.samples)
        ):
            profiles: dict[str, Any] = {}
            for way, budget in ((way, budget) for way in WAYS if way.first == first for budget in budgets):
                file = folder / str(sample) / f"{WAYS.index(way)}-{budget}.json"
                if file.exists():
                    continue
                if way.calibration not in profiles:
                    used, unused = self.corpora(way.calibration, sample)
                    made = profile(self.structure, used, model=self.model, batch_size=16)
                    profiles[way.calibration] = made, used, unused
                made, used, unused = profiles[way.calibration]
                known = self.known(folder / str(sample), way, budget)
                chosen = self.plan(way, budget, made, used, unused, known)
                write_text(file, json.dumps(self.cell(chosen, way, used)))
                print(
                    f"{self.name}, sample {sample}, {budget:.0%}, {way.label}: {chosen.keep} x {chosen.width}",
                    flush=True,
                )


def losses(found: Any) -> dict[str, list[float]]:
    """By text, the mean negative log-likelihood of every window of an evaluation's one row."""
    (windows,) = found.windows.values()
    return {text: (sums[:, 0] / sums[:, 1]).tolist() for text, sums in windows.items()}


def third_party(data: Path, scratch: Path) -> dict[str, Path]:
    """Text of two benchmarks, of kinds that the models know."""
    found = {}
    for name, keys in {"boolq": ("passage",), "hellaswag": ("query", "choices")}.items():
        (file,) = sorted((data / "benchmarks" / name).glob("validation*"))[:1]
        rows = [json.loads(line) for line in file.read_text().split("\n") if line][:400]
        path = scratch / f"{name}.jsonl"
        texts = (" ".join(r[k] if isinstance(r[k], str) else r[k][int(r["gold"])] for k in keys) for r in rows)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        found[name] = path
    return found


def own_made(scratch: Path) -> dict[str, Path]:
    """Files of the kinds that were made for this benchmark."""
    found = {}
    for kind in UNSEEN:
        found[kind] = scratch / f"{kind}.txt"
        found[kind].write_text(text_of(kind, characters=120_000))
    return found


def gaps(run: Path, model: str, sample: int, way: int, budget: float) -> dict[str, float] | None:
    """The gap to the full model by text; None where the cell is not measured."""
    file = run / model / str(sample) / f"{way}-{budget}.json"
    if not file.exists():
        return None
    full = json.loads((run / model / "full.json").read_text())
    loss = json.loads(file.read_text())["loss"]
    return {text: statistics.fmean(loss[text]) - statistics.fmean(full[text]) for text in full}


def rows_of(run: Path, model: str, budget: float, samples: int) -> Iterator[list[str]]:
    """The cells of a table: for every way its shapes, shares of the base's gap by group, and the worst text."""
    base = [gaps(run, model, sample, 0, budget) for sample in range(samples)]
    for number, way in enumerate(WAYS):
        found = [(b, g) for s, b in enumerate(base) if b and (g := gaps(run, model, s, number, budget))]
        if not found:
            continue
        cells = []
        for texts in GROUPS.values():
            mean = [statistics.fmean(g[t] for t in texts) for _, g in found]
            of_base = [statistics.fmean(b[t] for t in texts) for b, _ in found]
            share = [m / b for m, b in zip(mean, of_base, strict=True)]
            spread = f" ± {statistics.stdev(share):.2f}" if len(share) > 1 else ""
            stated = f"{statistics.fmean(share):.2f}{spread} " if min(of_base) > LEAST else ""
            cells.append(f"{stated}({statistics.fmean(mean):.3f})")
        more = {t: statistics.fmean(g[t] - b[t] for b, g in found) for t in found[0][0]}
        above = [f"{t} +{d:.3f}" for t, d in sorted(more.items(), key=lambda one: -one[1]) if d > 0]
        files = [json.loads((run / model / str(s) / f"{number}-{budget}.json").read_text()) for s in range(len(found))]
        shapes = sorted({f"{one['keep']}" + (f"x{one['width']}" if one["width"] else "") for one in files})
        yield [way.label, ", ".join(shapes), *cells, ", ".join(above[:3]) + (", ..." if len(above) > 3 else "")]


def table(run: Path, model: str, samples: int) -> str:
    """The results of one model as markdown."""
    lines = [
        f"### {model}",
        "",
        f"| kept | method | shape | {' | '.join(GROUPS)} | texts that lose more than the first row, nats |",
        "|---|---|---" + "|---:" * len(GROUPS) + "|---|",
    ]
    for budget in BUDGETS:
        lines += [f"| {budget:.0%} | {' | '.join(cells)} |" for cells in rows_of(run, model, budget, samples)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of the cells, new or to be resumed")
    parser.add_argument("--data", type=Path, required=True, help="folder of third-party corpora, see above")
    parser.add_argument("--models", nargs="+", default=MODELS, help="shipped models (all)")
    parser.add_argument("--samples", type=int, default=5, help="calibration samples (%(default)s)")
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens per text (%(default)s)")
    parser.add_argument("--table", action="store_true", help="print what is there, and measure nothing")
    args = parser.parse_args()
    args.data, args.run = args.data.absolute(), args.run.absolute()
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models if not args.table else ():
            Bench(name, args, Path(scratch)).run()
    print("\n".join(table(args.run, name, args.samples) for name in args.models))


if __name__ == "__main__":
    main()
