"""Beside `benchmarks.thin`, on one calibration sample: task scores of its first rows, and its shapes in hindsight.

    python -m benchmarks.thin_more tasks RUN_DIR --data DIR [--models NAME ...] [--limit 200]
    python -m benchmarks.thin_more shapes RUN_DIR --data DIR [--models NAME ...] [--windows 4]

RUN_DIR is that of `benchmarks.thin`, whose text is used. `tasks` scores seven zero-shot tasks (BLiMP among them), the
first documents of each, which fit the models' positions, for the model, TB-Coverage (reap), and the best shape with
ridge and with refit, at 25 and 50 % of the routed bytes. `shapes` measures six shapes of each budget with ridge on the
judged texts: how far the shape that `auto` takes on held-out blocks is from the best one in hindsight.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.thin import BUDGETS, GROUPS, MODELS, WAYS, Bench, losses
from moecover.corpora.tokenizer import load_tokenizer
from moecover.evaluation.budgets import shapes_within
from moecover.evaluation.run import evaluate
from moecover.evaluation.task_loading import resolve as resolve_tasks
from moecover.files.atomic import write_text
from moecover.planning.artifact import Plan
from moecover.planning.curve import spread
from moecover.planning.run import plan_budgets
from moecover.profiling.run import profile
from moecover.repairing.layers import repair_layers

TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "winogrande", "blimp")
SHAPES = 6


def repairs_of(bench: Bench, plan: Plan, used: list[Any], kind: str | None) -> dict[str, Any]:
    """The repair of a plan, for `evaluate`."""
    if kind is None:
        return {}
    made = list(repair_layers(bench.model, bench.structure, plan, used, kind=kind, batch_size=16))
    return {"row": made.__getitem__}


def tasks(bench: Bench, args: argparse.Namespace) -> None:
    """Score the tasks; a file for every row."""
    folder = args.run / bench.name / "tasks"
    asked = resolve_tasks(
        list(TASKS),
        tokenizer=load_tokenizer(bench.structure.checkpoint.path),
        data_dir=args.data / "benchmarks",
        include_path=None,
        limit=args.limit,
        batch_size=16,
    )

    def score(file: Path, plans: dict[str, Plan], repairs: dict[str, Any]) -> None:
        found = evaluate(
            bench.structure, plans, model=bench.model, tasks=asked, full=not plans, repairs=repairs, batch_size=16
        )
        write_text(file, json.dumps({t: {m: vars(s) for m, s in by.items()} for t, by in found.rows[0].tasks.items()}))

    if not (folder / "full.json").exists():
        score(folder / "full.json", {}, {})
    for number, way in enumerate(WAYS):
        for budget in BUDGETS[:2] if way.first else ():
            file = folder / f"{number}-{budget}.json"
            if not file.exists():
                used, unused = bench.corpora(way.calibration, 0)
                made = profile(bench.structure, used, model=bench.model, batch_size=16)
                known = bench.known(args.run / bench.name / "0", way, budget)
                plan = bench.plan(way, budget, made, used, unused, known)
                score(file, {"row": plan}, repairs_of(bench, plan, used, way.repair))
                print(f"{bench.name}, {budget:.0%}, {way.label}", flush=True)


def shapes(bench: Bench, args: argparse.Namespace) -> None:
    """Measure shapes with ridge; a file for each."""
    assert not isinstance(bench.structure.width, str)
    used, _ = bench.corpora("all", 0)
    made, channels = profile(bench.structure, used, model=bench.model, batch_size=16), bench.structure.width.channels
    for budget in BUDGETS:
        curve = shapes_within(bench.structure.topology, channels, budget=budget)
        for one in (curve[at] for at in spread(curve, channels, SHAPES)):
            file = args.run / bench.name / "shapes" / f"{budget}-{one.keep}x{one.width or channels}.json"
            if file.exists():
                continue
            (plan,) = plan_budgets(made, method="tb-coverage", keeps=[one.keep], widths=[one.width])
            repairs = repairs_of(bench, plan, used, "ridge")
            found = evaluate(
                bench.structure,
                {"row": plan},
                model=bench.model,
                texts=bench.texts,
                full=False,
                repairs=repairs,
                batch_size=8,
            )
            write_text(file, json.dumps(losses(found)))
            print(f"{bench.name}, {budget:.0%}, {one}", flush=True)


def print_tasks(run: Path, model: str) -> None:
    """The scores as markdown, in percent."""
    print(f"### {model}\n\n| kept | method | mean | {' | '.join(TASKS)} |\n|---|---|" + "---:|" * (len(TASKS) + 1))
    files = [("", "the model itself", run / model / "tasks" / "full.json")]
    files += [
        (f"{budget:.0%}", way.label, run / model / "tasks" / f"{number}-{budget}.json")
        for budget in BUDGETS[:2]
        for number, way in enumerate(WAYS)
        if way.first
    ]
    for kept, label, file in files:
        if file.exists():
            found = json.loads(file.read_text())
            values = [100 * found[task]["acc"]["value"] for task in TASKS]
            cells = " | ".join(f"{value:.1f}" for value in (statistics.fmean(values), *values))
            print(f"| {kept} | {label} | {cells} |")


def print_shapes(run: Path, model: str) -> None:
    """The gap of every shape in nats, by group, as markdown."""
    print(f"### {model}\n\n| kept | shape | {' | '.join(GROUPS)} | mean over texts |\n|---|---|" + "---:|" * 6)
    full = json.loads((run / model / "full.json").read_text())
    for budget in BUDGETS:
        for file in sorted((run / model / "shapes").glob(f"{budget}-*.json")):
            loss = json.loads(file.read_text())
            gap = {t: statistics.fmean(loss[t]) - statistics.fmean(full[t]) for t in full}
            cells = [f"{statistics.fmean(gap[t] for t in texts):.3f}" for texts in GROUPS.values()]
            mean = statistics.fmean(gap.values())
            print(f"| {budget:.0%} | {file.stem.partition('-')[2]} | {' | '.join(cells)} | {mean:.3f} |")


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("tasks", "shapes"), help="what to measure")
    parser.add_argument("run", type=Path, help="folder of `benchmarks.thin`")
    parser.add_argument("--data", type=Path, required=True, help="folder of third-party corpora and benchmarks")
    parser.add_argument("--models", nargs="+", default=MODELS, help="shipped models (all)")
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens per text (%(default)s)")
    parser.add_argument("--limit", type=int, default=200, help="documents of a task (%(default)s)")
    args = parser.parse_args()
    args.data, args.run = args.data.absolute(), args.run.absolute()
    measure, show = (tasks, print_tasks) if args.what == "tasks" else (shapes, print_shapes)
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models:
            measure(Bench(name, args, Path(scratch)), args)
    for name in args.models:
        show(args.run, name)


if __name__ == "__main__":
    main()
