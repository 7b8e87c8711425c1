"""The demo's work: profiles a shipped model, plans with every compared method, writes and verifies a checkpoint.

Reads only what the package ships and the interpreter's standard library; writes one folder. It is also a tour of the
Python API: the functions called here are the public ones.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moecover import progress
from moecover.checkpoints.shipped import DEFAULT, shipped_model
from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.packing import Corpus, load_corpus
from moecover.errors import MoecoverError
from moecover.evaluation.perplexity import perplexity
from moecover.files.atomic import check_output, new_folder, write_text
from moecover.planning.artifact import Plan, keep_all
from moecover.planning.explaining.facts import explain
from moecover.planning.job import plans
from moecover.planning.keep import resolve_keep
from moecover.planning.masking import masked
from moecover.planning.methods import METHODS, default_method
from moecover.profiling.artifact import Profile
from moecover.profiling.job import profile
from moecover.pruning.job import prune
from moecover.reporting.figures.plan_figures import draw
from moecover.runtime.loading import load_model
from moecover.shrinking.job import shrink
from moecover.shrinking.request import Shrunk
from moecover.verification.job import verify

if TYPE_CHECKING:
    import torch

CALIBRATION = ("encyclopedia", "web")
HELD_OUT = ("encyclopedia-heldout", "web-heldout", "python-heldout")
LENGTH, SEQUENCES = 256, 40
BATCH_SIZE, SEARCH_TOKENS = 16, 8192
BUDGETS = (0.5, 0.25)
SEEDS = (0, 1, 2)  # of methods that choose by chance
WRITTEN = "pruned-50"
SHRUNK, SHRINK_WORK = "shrunk", "shrink-work"  # what `shrink` writes, a folder a budget, and what it makes on the way
RESULTS = "moecover-demo.json"  # also the mark by which a second run knows the folder as a demo's
FILES = (RESULTS, "profile/*", "plans/*", "explained*", f"{WRITTEN}/*", f"{SHRUNK}-*", f"{SHRINK_WORK}/*")


@dataclass(frozen=True)
class Run:
    """One method as the demo runs it: its label, its options, and the seeds that are averaged (none: one run)."""

    label: str
    method: str
    options: Mapping[str, object]
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of the comparison: perplexity by held-out corpus, a list over seeds."""

    label: str
    retain: float
    keep: int
    size_bytes: int
    perplexity: dict[str, list[float]]

    def mean(self, corpus: str) -> float:
        """Mean perplexity over seeds."""
        return statistics.fmean(self.perplexity[corpus])

    def geometric_mean(self) -> float:
        """Geometric mean over the corpora."""
        return math.exp(statistics.fmean(math.log(self.mean(corpus)) for corpus in self.perplexity))


def runs() -> list[Run]:
    """Every method that comparisons have by default, the baseline last; a published one under its own name."""
    found = []
    for method in sorted(METHODS.values(), key=lambda one: one.baseline):
        if not method.compared:
            continue
        if method.seeded:
            found.append(Run(f"{method.label}, mean of {len(SEEDS)}", method.name, {}, SEEDS))
        elif method.published:
            found += [Run(label, method.name, {"saliency": name}) for name, label in method.published.items()]
        else:
            found.append(Run(method.label, method.name, {}))
    return found


def held_out_corpora(structure: Structure) -> list[Corpus]:
    """The held-out texts of the demo, at most SEQUENCES blocks of LENGTH tokens each."""
    loaded = [load_corpus(name, structure=structure, length=LENGTH) for name in HELD_OUT]
    return [corpus[:SEQUENCES] for corpus in loaded]


def plan_file(plan: Plan) -> str:
    """The name of a plan's file."""
    saliency, seed = plan.options.get("saliency"), plan.options.get("seed")
    parts = [plan.method, saliency, None if seed is None else f"seed{seed}", f"keep{plan.keep}.json"]
    return "-".join(str(part) for part in parts if part is not None)


def plan_all(structure: Structure, model: torch.nn.Module, made: Profile) -> list[tuple[str, float, list[Plan]]]:
    """Label, budget and plans (one a seed) of every run at every budget, the full model first."""
    topology = structure.topology
    keeps = [resolve_keep(topology, keep=None, retain=retain) for retain in BUDGETS]
    by_run: list[tuple[str, list[list[Plan]]]] = []
    for run in runs():
        options = [{**run.options, "seed": seed} for seed in run.seeds] or [dict(run.options)]
        found = [
            plans(
                made,
                keeps,
                method=run.method,
                options=one,
                model=model,
                structure=structure,
                progress=progress.resolve(),
            )
            for one in options
        ]
        by_run.append((run.label, found))
    work: list[tuple[str, float, list[Plan]]] = [("full model", 1.0, [keep_all(topology)])]
    for budget, retain in enumerate(BUDGETS):
        work += [(label, retain, [row[budget] for row in found]) for label, found in by_run]
    return work


def measure(
    structure: Structure,
    model: torch.nn.Module,
    work: Sequence[tuple[str, float, list[Plan]]],
    corpora: Sequence[Corpus],
) -> list[Row]:
    """Held-out perplexity of every plan."""
    rows = []
    total = sum(c.num_tokens for c in corpora) * sum(len(chosen) for _, _, chosen in work)
    with progress.bar("measuring perplexity", total) as advance:
        for label, retain, chosen in work:
            values: dict[str, list[float]] = {corpus.name: [] for corpus in corpora}
            for plan in chosen:
                with masked(model, structure, plan):
                    for corpus in corpora:
                        values[corpus.name].append(perplexity(model, corpus, advance=advance))
            rows.append(Row(label, retain, chosen[0].keep, structure.num_bytes(chosen[0].kept), values))
    return rows


def shrunk_rows(
    source: Path, corpora: Sequence[Corpus], held_out: Sequence[Corpus], folder: Path, dtype: str
) -> list[Row]:
    """What `shrink` makes of the model at every budget, measured as the other rows are."""
    rows = []
    for retain in BUDGETS:
        name = f"{SHRUNK}-{retain:.0%}".rstrip("%")
        command = ["moecover", "shrink", str(source), *(f"--corpus={one.name}" for one in corpora)]
        command += ["--budget", f"{retain:.0%}", "--quality", "fast", "-o", name]
        made = shrink(
            source,
            folder / name,
            budget=retain,
            corpora=corpora,
            quality="fast",
            work=folder / SHRINK_WORK,
            dtype=dtype,
            command=shlex.join(command),
        )
        assert isinstance(made, Shrunk)
        plan, model = made.pruned.plan, load_model(read_structure(folder / name), dtype=dtype)
        with progress.bar("measuring perplexity", sum(c.num_tokens for c in held_out)) as advance:
            values = {corpus.name: [perplexity(model, corpus, advance=advance)] for corpus in held_out}
        label = f"shrink, {plan.keep} experts" + ("" if plan.width is None else f" x {plan.width}")
        rows.append(Row(label, retain, plan.keep, made.pruned.num_bytes, values))
    return rows


@dataclass(frozen=True)
class Demo:
    """What the demo made.

    Attributes:
        model: name of the shipped model.
        calibration: tokens by corpus.
        rows: the comparison.
        half: the plan that was written.
        verified: whether the checkpoint equals the masked original, on how many tokens, the largest difference.
        wall_s: seconds.
    """

    model: str
    calibration: dict[str, int]
    rows: list[Row]
    half: Plan
    verified: dict[str, object]
    wall_s: float

    def to_json(self) -> dict[str, object]:
        """The results file."""
        rows = [vars(row) for row in self.rows]
        return {
            "model": self.model,
            "calibration": self.calibration,
            "rows": rows,
            "verified": self.verified,
            "wall_s": self.wall_s,
        }


def tour(output: Path, *, name: str = DEFAULT, dtype: str = "auto") -> Demo:
    """Run the demo into a folder (an earlier demo there is replaced), on a shipped model by name.

    Args:
        output: folder to write.
        name: of the shipped model.
        dtype: torch dtype by name that the model runs in.

    Raises:
        InputError: the folder exists and holds something else, or there is no such shipped model.
        MoecoverError: the written checkpoint does not equal the masked original.
    """
    started, source = time.monotonic(), shipped_model(name)
    output = Path(os.path.abspath(output))  # noqa: PTH100
    check_output(output, overwrite=True, marker=RESULTS, names=FILES)
    with progress.spinner("reading the shipped model and its corpora"):
        structure = read_structure(source)
        corpora = [load_corpus(name, structure=structure, length=LENGTH) for name in CALIBRATION]
        model = load_model(structure, dtype=dtype)
    experts, layers = structure.topology.num_experts, len(structure.topology.decoder_layers)
    progress.say(f"model: {name}, {experts} experts x {layers} layers, trained by this project")
    with new_folder(output) as folder:
        made = profile(
            structure, corpora, model=model, batch_size=BATCH_SIZE, keep_inputs=SEARCH_TOKENS, output=folder / "profile"
        )
        work = plan_all(structure, model, made)
        for _, _, chosen in work[1:]:
            for plan in chosen:
                plan.save(folder / "plans" / plan_file(plan))
        held_out = held_out_corpora(structure)
        rows = measure(structure, model, work, held_out)
        rows += shrunk_rows(source, corpora, held_out, folder, dtype)
        rows.sort(key=lambda row: -row.retain)  # stable: a budget's rows stay in their order
        default = default_method().name
        half = next(p for _, retain, (p, *_) in work if retain == BUDGETS[0] and p.method == default)
        draw(explain(half, profile=made), folder / "explained")
        command = shlex.join(["moecover", "prune", str(source), "--plan", f"plans/{plan_file(half)}", "-o", WRITTEN])
        prune(structure, half, folder / WRITTEN, command=command)
        proof = verify(source, folder / WRITTEN, dtype=dtype)
        if not proof.equal:
            raise MoecoverError(
                f"the written checkpoint differs from the masked original at {proof.first_difference}: please "
                "report this"
            )
        verified: dict[str, object] = {
            "equal": proof.equal,
            "tokens": proof.tokens,
            "max_abs_difference": proof.max_abs_difference,
        }
        tokens = {c.name: c.num_tokens for c in corpora}
        result = Demo(name, tokens, rows, half, verified, round(time.monotonic() - started, 1))
        write_text(folder / RESULTS, json.dumps(result.to_json(), indent=1) + "\n")
    return result
