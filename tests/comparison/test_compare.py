"""`moecover compare`: what is asked for, cell by cell, interrupted, extended, and told."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moecover.checkpoints.structure import read_structure
from moecover.checkpoints.topology import Topology
from moecover.cli.main import main
from moecover.comparison.config import Cell, cells, label_of, read, slug, variants
from moecover.comparison.pool import END, Died, work
from moecover.comparison.run import GROUP, compare, weights_fingerprint
from moecover.comparison.worker import Evaluating, Failure, Finished
from moecover.corpora.windows import load_windows
from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.run import perplexity
from moecover.planning.artifact import Plan
from moecover.planning.masking import masked
from moecover.profiling.artifact import Profile
from moecover.repairing.layers import needed_bytes
from moecover.repairing.targets import places_on_disk
from moecover.runtime.loading import load_model
from tests.support.tiny import TEXT, make_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = TEXT.split()


def write_text_file(path: Path, seed: int, words: int = 3000) -> Path:
    rng = random.Random(seed)
    rows = [" ".join(rng.choice(WORDS) for _ in range(60)) for _ in range(words // 60)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def grid(tmp_path: Path, checkpoints: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a configuration of a tiny grid and gives its path; keywords replace or add fields, None removes them."""
    for number, name in enumerate(("a", "b", "test")):
        write_text_file(tmp_path / f"{name}.jsonl", number)
    base: dict[str, Any] = {
        "models": [{"model": str(checkpoints("qwen2_moe")), "name": "qwen"}], "calibration": [["a=a.jsonl", "b=b.jsonl"]],
        "sequences": 6, "length": 32, "search_tokens": 128, "seeds": [0, 1], "retain": [0.5], "perplexity": ["test=test.jsonl"],
        "window": 32, "windows": 6,
    }  # fmt: skip

    def write(name: str = "grid.yaml", **fields: Any) -> Path:
        value = {k: v for k, v in {**base, **fields}.items() if v is not None}
        (tmp_path / name).write_text(yaml.safe_dump(value, sort_keys=False))
        return tmp_path / name

    return write


def run(path: Path, folder: Path, *more: str) -> int:
    return main(["compare", str(path), "-o", str(folder), "-q", *more])


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "results.csv").read_text().splitlines()))


def written(folder: Path) -> dict[str, int]:
    """Time of change of every cell."""
    return {p.name: (p / "cell.json").stat().st_mtime_ns for p in sorted((folder / "cells").iterdir())}


# ------------------------------------------------------------------------------------------------------------ end to end
def test_tiny_grid(grid: Callable[..., Path], tmp_path: Path) -> None:
    """Every cell is there with its figures, and they are those of the plan run by itself."""
    path, out = grid(samples=[0, 1], retain=[0.5, 0.75]), tmp_path / "run"
    assert run(path, out) == 0
    results = json.loads((out / "results.json").read_text())
    labels = [c["label"] for c in results["cells"]]
    assert labels.count("full model") == 1
    assert labels.count("random") == 4  # budgets x seeds: no calibration has a say
    for label in ("REAP", "ExpertSparsity", "TB-Coverage (contribution)"):
        assert labels.count(label) == 4  # budgets x samples
    assert len(labels) == 17
    assert results["failed"] == []
    asked = read(path, {})
    structure = read_structure(asked.config.models[0].model)
    text = load_windows("test", tmp_path / "test.jsonl", structure=structure, length=32, windows=6)
    model = load_model(structure)
    for cell in results["cells"]:
        (row,) = Evaluation.load(out / "cells" / cell["id"]).rows
        assert cell["row"]["num_bytes"] == structure.num_bytes(cell["keep"])
        if cell["method"] == "full":
            expected = perplexity(model, text, batch_size=4)
            assert cell["plan"] is None
        else:
            plan = Plan.load(out / cell["plan"])
            assert (plan.method, plan.keep) == (cell["method"], cell["keep"])
            with masked(model, structure, plan):
                expected = perplexity(model, text, batch_size=4)
        assert row.perplexity["test"].perplexity == pytest.approx(expected, rel=1e-6)
    table = rows(out)
    assert {r["kind"] for r in table} == {"size", "perplexity", "kl", "top1"}
    of_cell = {r["label"]: r for r in table if r["kind"] == "perplexity" and r["keep"] == "6" and r["sample"] == "1"}
    assert of_cell["REAP"]["calibration"] == "a+b"
    shown = (out / "results.md").read_text()
    assert "| TB-Coverage (contribution) | 6 |" in shown
    assert "±" in shown
    (about,) = json.loads((out / "models.json").read_text())
    assert about["num_bytes_by_keep"] == {str(k): structure.num_bytes(k) for k in (6, 9, 12)}
    assert about["peak_rss_bytes"] > 50_000_000
    assert {p.name for p in (out / "profiles" / "qwen").iterdir()} == {"a+b-0", "a+b-1"}


def test_the_mean_over_cells_in_the_table(grid: Callable[..., Path], tmp_path: Path) -> None:
    assert run(grid(methods=["random"], seeds=[0, 1, 2]), tmp_path / "run") == 0
    values = [
        float(r["value"]) for r in rows(tmp_path / "run") if r["kind"] == "perplexity" and r["method"] == "random"
    ]
    line = next(x for x in (tmp_path / "run" / "results.md").read_text().splitlines() if x.startswith("| random"))
    assert len(values) == 3
    assert line.endswith(f"| 3 | {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} |")


def test_flags_give_the_same_configuration(grid: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    path = grid()
    monkeypatch.chdir(tmp_path)
    model = yaml.safe_load(path.read_text())["models"][0]["model"]
    flags = [
        "--corpus",
        "a=a.jsonl",
        "--corpus",
        "b=b.jsonl",
        "--sequences",
        "6",
        "--length",
        "32",
        "--search-tokens",
        "128",
    ]
    flags += [
        "--seeds",
        "0,1",
        "--retain",
        "0.5",
        "--perplexity",
        "test=test.jsonl",
        "--window",
        "32",
        "--windows",
        "6",
    ]
    assert main(["compare", model, "-o", "by-flags", "-q", *flags]) == 0
    assert run(path, tmp_path / "by-file") == 0
    one, two = (yaml.safe_load((tmp_path / n / "config.yaml").read_text()) for n in ("by-flags", "by-file"))
    assert one["models"][0].pop("name") == Path(model).name
    assert two["models"][0].pop("name") == "qwen"
    assert one == two
    assert [float(r["value"]) for r in rows(tmp_path / "by-flags")] == [
        float(r["value"]) for r in rows(tmp_path / "by-file")
    ]


def test_a_flag_takes_the_place_of_a_field(grid: Callable[..., Path]) -> None:
    asked = read(grid(keep=None), {"keep": [7], "seeds": [5]})
    assert (asked.config.retain, asked.config.keep, asked.config.seeds) == (None, [7], [5])


def test_the_resolved_configuration_is_one(grid: Callable[..., Path], tmp_path: Path) -> None:
    methods = [{"method": "tb-coverage", "protect": 0.25, "saliency": ["reap", "ean"]}, "random"]
    path = grid(methods=methods)
    assert run(path, tmp_path / "run") == 0
    assert read(tmp_path / "run" / "config.yaml", {}).config == read(path, {}).config
    before = written(tmp_path / "run")
    assert run(tmp_path / "run" / "config.yaml", tmp_path / "run") == 0
    assert written(tmp_path / "run") == before


# ------------------------------------------------------------------------------------------------- resumed and extended
def test_a_second_run_does_nothing(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    path, out = grid(), tmp_path / "run"
    assert run(path, out) == 0
    before, results = written(out), (out / "results.csv").read_bytes()
    capsys.readouterr()
    assert main(["compare", str(path), "-o", str(out)]) == 0
    assert "all 6 cells are there" in capsys.readouterr().err
    assert written(out) == before
    assert (out / "results.csv").read_bytes() == results


def test_an_extension_makes_the_new_cells_alone(grid: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(grid(methods=["random", "tb-coverage"]), out) == 0
    before = written(out)
    assert (
        run(grid(methods=["random", "tb-coverage", "expert-sparsity"], retain=[0.5, 0.75], seeds=[0, 1, 2]), out) == 0
    )
    after = written(out)
    assert {name: after[name] for name in before} == before
    assert len(after) == 1 + 2 * 3 + 2 * 2
    assert {r["label"] for r in rows(out)} == {"full model", "random", "TB-Coverage (contribution)", "ExpertSparsity"}
    fresh = tmp_path / "fresh"
    assert (
        run(grid(methods=["random", "tb-coverage", "expert-sparsity"], retain=[0.5, 0.75], seeds=[0, 1, 2]), fresh) == 0
    )
    assert (fresh / "results.csv").read_bytes() == (out / "results.csv").read_bytes()


def test_a_smaller_grid_leaves_the_other_cells(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    assert run(grid(methods=["random", "tb-coverage"]), out) == 0
    before = written(out)
    assert main(["compare", str(grid(methods=["random"])), "-o", str(out)]) == 0
    assert "1 cells in" in capsys.readouterr().err
    assert written(out) == before
    assert {r["label"] for r in rows(out)} == {"full model", "random"}


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        ({"windows": 5}, set()),
        ({"batch_size": 3}, set()),
        ({"sequences": 5}, {"qwen-full", "qwen-random-keep6-seed0", "qwen-random-keep6-seed1"}),
        ({"search_tokens": 64}, {"qwen-full", "qwen-random-keep6-seed0", "qwen-random-keep6-seed1", "qwen-reap-a+b-0-keep6", "qwen-tb-coverage-contribution-a+b-0-keep6"}),
    ],
)  # fmt: skip
def test_other_inputs_make_a_cell_anew(
    grid: Callable[..., Path], tmp_path: Path, capsys: Any, change: dict[str, Any], stays: set[str]
) -> None:
    out = tmp_path / "run"
    assert run(grid(), out) == 0
    before = written(out)
    assert main(["compare", str(grid(**change)), "-o", str(out)]) == 0
    after = written(out)
    assert "made anew" in capsys.readouterr().err
    assert {name for name in before if after[name] == before[name]} == stays
    fresh = tmp_path / "fresh"
    assert run(grid(**change), fresh) == 0
    assert (fresh / "results.csv").read_bytes() == (out / "results.csv").read_bytes()


def test_other_text_and_other_weights_make_cells_anew(grid: Callable[..., Path], tmp_path: Path) -> None:
    out, model = tmp_path / "run", make_checkpoint(tmp_path / "model", "qwen3_moe")
    path = grid(models=[str(model)], methods=["tb-coverage"])
    assert run(path, out) == 0
    first = written(out)
    write_text_file(tmp_path / "a.jsonl", 77)
    assert run(path, out) == 0
    second = written(out)
    assert second["model-full"] == first["model-full"]
    assert second["model-tb-coverage-contribution-a+b-0-keep4"] != first["model-tb-coverage-contribution-a+b-0-keep4"]
    before = weights_fingerprint(read_structure(model))
    structure = read_structure(model)
    name = next(n for n in structure.checkpoint.tensors if "experts" not in n and "norm" in n)
    entry = structure.checkpoint.tensors[name]
    with (model / entry.shard).open("r+b") as file:  # not the routers, so the model's fingerprint stays
        file.seek(entry.start)
        file.write(b"\x00" * 8)
    assert read_structure(model).model_fingerprint == structure.model_fingerprint
    assert weights_fingerprint(read_structure(model)) != before
    assert run(path, out) == 0
    assert written(out)["model-full"] != second["model-full"]


def test_a_damaged_cell_is_made_anew(grid: Callable[..., Path], tmp_path: Path) -> None:
    path, out = grid(methods=["random"]), tmp_path / "run"
    assert run(path, out) == 0
    results = (out / "results.csv").read_bytes()
    (out / "cells" / "qwen-full" / "cell.json").write_text("{")
    shutil.rmtree(out / "cells" / "qwen-random-keep6-seed0")
    (out / "cells" / ".qwen-full.abc.partial").mkdir()
    before = written_but_hidden(out)
    assert run(path, out) == 0
    assert (out / "results.csv").read_bytes() == results
    assert not (out / "cells" / ".qwen-full.abc.partial").exists()
    assert written(out)["qwen-random-keep6-seed1"] == before["qwen-random-keep6-seed1"]


def written_but_hidden(folder: Path) -> dict[str, int]:
    found = [p for p in (folder / "cells").iterdir() if not p.name.startswith(".")]
    return {p.name: (p / "cell.json").stat().st_mtime_ns for p in found}


def start(path: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "moecover", "compare", str(path), "-o", str(out), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def cells_of(out: Path) -> int:
    return len(list((out / "cells").glob("[!.]*"))) if (out / "cells").is_dir() else 0


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_at_random_moments(grid: Callable[..., Path], tmp_path: Path, jobs: int) -> None:
    path, out, whole = grid(samples=[0, 1], retain=[0.5, 0.75]), tmp_path / "run", tmp_path / "whole"
    assert start(path, whole, "--jobs", str(jobs)).wait() == 0
    rng = random.Random(jobs)
    for wanted in (0, 3, 9):  # killed a moment after so many cells are there
        process = start(path, out, "--jobs", str(jobs))
        deadline = time.monotonic() + 60
        while process.poll() is None and cells_of(out) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3) if wanted else 3)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    left = written_but_hidden(out)
    assert len(left) >= 9
    process = start(path, out, "--jobs", str(jobs))
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert (out / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    assert not list((out / "cells").glob(".*"))
    kept = written(out)
    assert {name: kept[name] for name in left} == left


@pytest.mark.parametrize(("number", "status", "jobs"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2)])
def test_an_interrupt_keeps_what_is_done(
    grid: Callable[..., Path], tmp_path: Path, number: int, status: int, jobs: int
) -> None:
    path, out = grid(seeds=list(range(40)), methods=["random"]), tmp_path / "run"
    process = start(path, out, "--jobs", str(jobs))
    while process.poll() is None and cells_of(out) < 2:
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors.decode()
    if number == signal.SIGINT:
        assert b"cells are done and stay; the same command goes on from there" in errors
    assert b"Traceback" not in errors, errors.decode()
    assert 2 <= cells_of(out) < 41
    assert not list((out / "cells").glob(".*"))
    assert start(path, out).wait() == 0
    assert cells_of(out) == 41


# -------------------------------------------------------------------------------------------------------------- failures
PLUGIN = """
from moecover.planning.run import METHODS
@METHODS("NAME", paper="none")
def broken(profile, budget, *, seed: int = 0):
    '''Fails.'''
    raise ValueError("no such luck")
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cell_that_fails(grid: Callable[..., Path], tmp_path: Path, capsys: Any, jobs: int) -> None:
    name = f"broken{jobs}"  # the table of methods is the process's
    (tmp_path / "plugin.py").write_text(PLUGIN.replace("NAME", name))
    path, out = grid(methods=[name, "tb-coverage"], plugins=["plugin.py"]), tmp_path / "run"
    assert main(["compare", str(path), "-o", str(out), "-q", "--jobs", str(jobs)]) == 1
    shown = capsys.readouterr().out
    assert shown.count(f"FAILED qwen-{name}-a+b-0-keep6-seed") == 2
    assert "no such luck" in shown
    results = json.loads((out / "results.json").read_text())
    assert len(results["failed"]) == 2
    done = {c["id"]: c["status"] for c in results["cells"]}
    assert done["qwen-tb-coverage-contribution-a+b-0-keep6"] == "done"
    failed = json.loads((out / "cells" / f"qwen-{name}-a+b-0-keep6-seed0" / "cell.json").read_text())
    assert failed["status"] == "failed"
    assert "plugin.py, line 6" in failed["reason"]
    assert "## Failed" in (out / "results.md").read_text()
    before = written(out)
    assert main(["compare", str(path), "-o", str(out), "-q"]) == 1  # tried again
    after = written(out)
    assert {n for n in before if before[n] != after[n]} == {f"qwen-{name}-a+b-0-keep6-seed{s}" for s in (0, 1)}


def test_one_bad_plan_does_not_take_its_group_along(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moecover.comparison import worker as comparing

    real = comparing.evaluate

    def evaluate(structure: Any, plans: Any, **kwargs: Any) -> Any:
        if any("seed1" in name for name in plans):
            raise RuntimeError("out of memory")
        return real(structure, plans, **kwargs)

    monkeypatch.setattr(comparing, "evaluate", evaluate)
    assert run(grid(methods=["random"]), tmp_path / "run") == 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["failed"] == ["qwen-random-keep6-seed1"]
    (reason,) = [c["reason"] for c in results["cells"] if c["status"] == "failed"]
    assert reason.startswith("not enough memory. Give")


def test_a_model_that_cannot_be_loaded_fails_by_itself(grid: Callable[..., Path], tmp_path: Path, monkeypatch: Any, checkpoints: Any) -> None:  # fmt: skip
    from moecover.comparison import worker as comparing

    real, asked = comparing.opened, list[str]()

    def opened(structure: Any, **kwargs: Any) -> Any:
        asked.append(structure.topology.family)
        if structure.topology.family == "mixtral":
            raise InputError("it has a hole")
        return real(structure, **kwargs)

    monkeypatch.setattr(comparing, "opened", opened)
    models = [{"model": str(checkpoints(f)), "name": f} for f in ("mixtral", "qwen2_moe")]
    assert run(grid(models=models, methods=["random", "tb-coverage"]), tmp_path / "run") == 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {c["model"]: c["status"] for c in results["cells"]} == {"mixtral": "failed", "qwen2_moe": "done"}
    assert asked.count("mixtral") == 1


def test_samples_of_nearly_all_the_text_are_said(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    """Their spread is not that of new text."""
    most = 120
    for sequences, said in ((6, False), (most, True)):
        path = grid(samples=[0, 1], sequences=sequences, methods=["tb-coverage"])
        assert main(["compare", str(path), "-o", str(tmp_path / f"run{sequences}")]) == 0
        assert ("so the samples overlap" in capsys.readouterr().err) == said


# ----------------------------------------------------------------------------------------------------------------- tasks
def write_arc(folder: Path, seed: int = 0, questions: int = 8) -> Path:
    """Documents in the layout of ``--data-dir``."""
    rng = random.Random(seed)
    (folder / "arc_easy").mkdir(parents=True, exist_ok=True)
    for split in ("validation", "test"):
        rows = [
            {"id": str(i), "question": " ".join(rng.sample(WORDS, 4)), "answerKey": "AB"[rng.randrange(2)],
             "choices": {"text": rng.sample(WORDS, 2), "label": ["A", "B"]}}
            for i in range(questions)
        ]  # fmt: skip
        (folder / "arc_easy" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_tasks(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("lm_eval")
    write_arc(tmp_path / "data")
    path = grid(tasks=["arc_easy"], data_dir="data", limit=6, methods=["random", "tb-coverage"])
    out = tmp_path / "run"
    assert run(path, out) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["tasks"]["arc_easy"]["items"] == 6
    for cell in results["cells"]:
        found = Evaluation.load(out / "cells" / cell["id"])
        (row,) = found.rows
        items = found.items[row.name]["arc_easy"]["acc"]
        assert len(items) == 6
        assert row.tasks["arc_easy"]["acc"].value == pytest.approx(items.mean())
        assert row.perplexity["test"].perplexity > 1
        assert (row.perplexity["test"].kl is None) == (cell["method"] == "full")
    table = rows(out)
    means = [float(r["value"]) for r in table if r["kind"] == "mean"]
    assert means == [float(r["value"]) for r in table if r["kind"] == "task" and r["metric"] == "acc"]
    assert "### Tasks, qwen" in (out / "results.md").read_text()
    kinds = {(c["b"], c["kind"]) for c in results["comparisons"]}
    assert kinds == {("random", "tasks"), ("random", "perplexity")}
    assert all(c["words"] in (out / "results.md").read_text() for c in results["comparisons"])
    (facts,) = json.loads((out / "usage.json").read_text())
    assert facts["tasks"] == ["arc_easy"]
    assert facts["plans"].keys() == {c["id"] for c in results["cells"] if c["method"] != "full"}
    routed = Profile.load(out / "profiles" / "qwen" / "tasks").statistics["arc_easy"]
    plan = Plan.load(out / "plans" / f"{results['cells'][-1]['id']}.json")
    weight = routed["weight_sum"]
    kept = [weight[i][list(layer.kept)].sum() / weight[i].sum() for i, layer in enumerate(plan.layers)]
    assert facts["plans"][results["cells"][-1]["id"]]["arc_easy"]["kept_weight"] == pytest.approx(kept)
    assert "### Which experts the tasks use, qwen" in (out / "results.md").read_text()
    assert "### Routing weight of the tasks on kept experts, qwen" in (out / "results.md").read_text()
    made = (out / "profiles" / "qwen" / "tasks" / "profile.safetensors").stat().st_ino
    (out / "usage.json").unlink()
    assert run(path, out) == 0
    assert json.loads((out / "usage.json").read_text()) == [facts]
    assert (out / "profiles" / "qwen" / "tasks" / "profile.safetensors").stat().st_ino == made
    before = written(out)
    write_arc(tmp_path / "data", seed=1)  # other questions
    assert run(path, out) == 0
    assert json.loads((out / "usage.json").read_text()) != [facts]
    assert all(written(out)[name] != before[name] for name in before)
    capsys.readouterr()
    assert run(path, out, "--tasks", "arc_esy") == 2
    assert "moecover: --tasks: arc_esy: there is no such task. Did you mean arc_easy?" in capsys.readouterr().err
    (tmp_path / "data" / "arc_easy" / "test.jsonl").unlink()
    assert run(path, out) == 2
    error = capsys.readouterr().err
    assert f"{path}, line " in error
    assert "test.jsonl is missing" in error


def test_calibration_text_in_a_test_text_is_said(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    path = grid(perplexity=["again=a.jsonl", "test=test.jsonl"], methods=["random"], seeds=[0], sequences=120)
    assert main(["compare", str(path), "-o", str(tmp_path / "run"), "--method", "tb-coverage"]) == 0
    err = capsys.readouterr().err
    assert "of the text again is in the calibration text too" in err
    assert "of the text test is in" not in err


# ------------------------------------------------------------------------------------------------- processes and memory
def test_two_jobs_give_what_one_gives(grid: Callable[..., Path], tmp_path: Path, checkpoints: Any) -> None:
    models = [{"model": str(checkpoints(f)), "name": f} for f in ("qwen2_moe", "olmoe")]
    path = grid(models=models, samples=[0, 1])
    assert start(path, tmp_path / "one").wait() == 0
    assert start(path, tmp_path / "two", "--jobs", "2").wait() == 0
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) > 60
    for a, b in zip(one, two, strict=True):
        assert float(a.pop("value")) == pytest.approx(float(b.pop("value")), rel=1e-5)
        assert a == b


def test_layer_by_layer(grid: Callable[..., Path], tmp_path: Path, checkpoints: Any) -> None:
    """A model that does not fit: the same figures, and all its plans in one evaluation."""
    from moecover.runtime.memory import cost

    model = checkpoints("qwen2_moe", num_hidden_layers=6, moe_intermediate_size=256)
    write_arc(tmp_path / "data")
    path = grid(models=[{"model": str(model), "name": "qwen"}], methods=["random", "expert-sparsity", {"method": "tb-coverage", "repair": ["none", "scale"]}], tasks=["arc_easy"], data_dir="data")  # fmt: skip
    assert run(path, tmp_path / "whole") == 0
    structure = read_structure(model)
    extra = needed_bytes(structure, places_on_disk(structure), keep=6, tokens=384, dtype="auto")
    found = cost(structure, tokens=400, batch_tokens=128, limit=0, head=True, extra=extra)
    assert run(path, tmp_path / "layers", "--memory-limit", str((found.whole + found.streamed) // 2)) == 0
    (about,) = json.loads((tmp_path / "layers" / "models.json").read_text())
    assert about["layer_by_layer"]
    assert len(json.loads((tmp_path / "layers" / "usage.json").read_text())) == 1
    assert {row["kind"] for row in rows(tmp_path / "layers")} == {"size", "perplexity", "kl", "top1", "task", "mean"}
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "layers"), strict=True):
        assert a["name"] == b["name"]
        assert float(a["value"]) == pytest.approx(float(b["value"]), rel=1e-4, abs=1e-6)


REPAIRED: list[Any] = [{"method": "random", "seeds": 0}, {"method": "tb-coverage", "repair": ["none", "ridge"]}]


def test_repaired_cells(grid: Callable[..., Path], tmp_path: Path) -> None:
    """A repaired cell has the perplexity of the checkpoint that `prune --repair` writes, and the plan of the unrepaired one."""
    from moecover.corpora.sources import parse_corpora

    out, path = tmp_path / "run", grid(methods=REPAIRED, repairs=["none", "scale"])
    assert run(path, out) == 0
    found = {p.name: json.loads((p / "cell.json").read_text()) for p in (out / "cells").iterdir()}
    assert {c["label"]: c["repair"] for c in found.values()} == {
        "full model": "none", "random": "none", "random + scale": "scale", "TB-Coverage (contribution)": "none",
        "TB-Coverage (contribution) + ridge": "ridge",
    }  # fmt: skip
    assert {c["calibration"][0] if c["calibration"] else "" for c in found.values() if c["label"].startswith("random")} == {"", "a"}  # fmt: skip
    assert {row["repair"] for row in rows(out)} == {"none", "scale", "ridge"}
    assert not any((out / "repairs").iterdir())
    plain, name = "qwen-tb-coverage-contribution-a+b-0-keep6", "qwen-tb-coverage-contribution-+-ridge-a+b-0-keep6"
    assert Plan.load(out / "plans" / f"{plain}.json") == Plan.load(out / "plans" / f"{name}.json")
    plan = out / "plans" / f"{name}.json"
    (row,) = Evaluation.load(out / "cells" / name).rows
    assert row.plan["repair"] == "ridge"
    assert found[name]["repaired"]["tokens"] == 2 * 6 * 32
    assert found[name]["repaired"]["error_after"] < found[name]["repaired"]["error_before"]
    (model,) = yaml.safe_load(path.read_text())["models"]
    corpora = [f"{n}={tmp_path / f'{n}.jsonl'}" for n in ("a", "b")]
    assert list(parse_corpora(corpora)) == ["a", "b"]
    command = ["prune", model["model"], "--plan", str(plan), "--repair", "ridge", "--sequences", "6", "--length", "32"]
    assert main([*command, *(f"--corpus={c}" for c in corpora), "-o", str(tmp_path / "cut"), "-q"]) == 0
    structure = read_structure(tmp_path / "cut")
    text = load_windows("test", str(tmp_path / "test.jsonl"), structure=structure, length=32, windows=6)
    assert perplexity(load_model(structure), text, batch_size=4) == row.perplexity["test"].perplexity
    (other,) = Evaluation.load(out / "cells" / plain).rows
    assert other.perplexity["test"].perplexity != row.perplexity["test"].perplexity
    # A card of the checkpoint without a repair does not take these numbers.
    command = ["prune", model["model"], "--plan", str(plan), "-o", str(tmp_path / "plain"), "-q"]
    assert main([*command, "--evaluation", str(out / "cells" / name)]) == 2
    assert main([*command, "--evaluation", str(out / "cells" / plain)]) == 0


def test_other_text_for_the_repair_makes_repaired_cells_anew(grid: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(grid(methods=REPAIRED), out) == 0
    before = written(out)
    assert run(grid(methods=REPAIRED, repair_tokens=200), out) == 0
    after = written(out)
    assert {name for name in before if after[name] != before[name]} == {
        "qwen-tb-coverage-contribution-+-ridge-a+b-0-keep6"
    }


def test_a_repair_goes_on_where_it_was(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """What was repaired before the measuring was interrupted is not repaired again; one that fails fails its cell alone."""
    from moecover.comparison import worker as comparing

    out, path = tmp_path / "run", grid(methods=[REPAIRED[1]], repairs=["scale"])
    evaluate, repair, fits = comparing.evaluate, comparing.repair, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if kwargs["repairs"]:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(comparing, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(read(path, {}), out)
    kept = sorted(p.name for p in (out / "repairs" / "qwen-tb-coverage-contribution-+-ridge-a+b-0-keep6").iterdir())
    assert len(kept) == len(Plan.load(next((out / "plans").iterdir())).layers)

    def failing(*args: Any, kind: str, **kwargs: Any) -> Any:
        if kind == "scale":
            raise InputError("no scale here")
        return repair(*args, kind=kind, **kwargs)

    monkeypatch.setattr(comparing, "evaluate", evaluate)
    monkeypatch.setattr(comparing, "repair", failing)
    monkeypatch.setattr("moecover.repairing.store.repair_layers", lambda *args, **kwargs: fits.append(args))
    both = grid(methods=[{"method": "tb-coverage", "repair": ["none", "ridge", "scale"]}])
    assert run(both, out) == 1
    assert not fits
    assert "repairing: no scale here" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert {c["label"]: c["status"] for c in results["cells"]} == {
        "full model": "done", "TB-Coverage (contribution)": "done", "TB-Coverage (contribution) + ridge": "done",
        "TB-Coverage (contribution) + scale": "failed",
    }  # fmt: skip


def test_a_family_that_cannot_be_repaired(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    from tests.support import zoo

    zoo.make_model("gpt_oss").save_pretrained(tmp_path / "gpt", save_original_format=True)
    path = grid(models=[{"model": str(tmp_path / "gpt"), "name": "gpt"}], methods=[{"method": "tb-coverage", "repair": "ridge"}])  # fmt: skip
    assert run(path, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ": gpt: repair does not run on gpt_oss: its experts have biases" in error
    assert f"{path}, line " in error


def test_tasks_that_need_the_model_in_memory(grid: Callable[..., Path], tmp_path: Path, checkpoints: Any, capsys: Any) -> None:  # fmt: skip
    """They are refused before the first cell where it does not fit."""
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        lines = [json.dumps({"question": f"What is {i} and 2?", "answer": f"#### {i + 2}"}) + "\n" for i in range(6)]
        (tmp_path / "data" / "gsm8k" / f"{split}.jsonl").write_text("".join(lines))
    path = grid(tasks=["gsm8k"], data_dir="data", methods=["random"], limit=2)
    assert run(path, tmp_path / "run", "--memory-limit", "901MB") == 2
    assert f"{path}, line " in (error := capsys.readouterr().err)
    assert "qwen: gsm8k needs the model in memory" in error
    assert not (tmp_path / "run" / "cells").exists()


def _echo() -> Any:
    from contextlib import contextmanager

    @contextmanager
    def bench() -> Any:
        def handle(job: Evaluating) -> Any:
            yield f"{job.model} begins"
            if job.model == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            yield f"{job.model} ends"

        yield handle

    return bench()


def test_a_worker_that_dies_costs_its_job_alone() -> None:
    from collections import deque

    jobs = deque(Evaluating(name, (), {}) for name in ("a", "dies", "b", "c"))
    found = [(job.model, report) for job, report in work(jobs, _echo, jobs=2)]
    assert sorted(r for _, r in found if isinstance(r, str) and r != END) == ["a begins", "a ends", "b begins", "b ends", "c begins", "c ends", "dies begins"]  # fmt: skip
    (died,) = [r for m, r in found if m == "dies" and isinstance(r, Died)]
    assert died.code == -signal.SIGKILL
    assert "memory" in died.reason
    assert [m for m, r in found if r == END] == [m for m, r in found if isinstance(r, str) and r.endswith("ends")]


class Dying:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(50):
            time.sleep(0.001)


def _told_while_dying() -> Any:
    """A handler that is told to end while a destructor runs, where Python drops the exception."""
    from contextlib import contextmanager

    @contextmanager
    def bench() -> Any:
        def handle(job: Any) -> Any:
            Dying()
            time.sleep(20)
            yield "went on"

        yield handle

    return bench()


def test_a_worker_that_is_told_to_end_in_a_destructor_ends() -> None:
    from collections import deque

    jobs = deque([Evaluating("a", (), {})])
    ((_, report),) = work(jobs, _told_while_dying, jobs=2)
    assert isinstance(report, Died)
    assert report.code == 143


def test_a_dead_worker_fails_its_cells(grid: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    """What `_run` makes of reports: cells that were finished before the worker died stay."""
    from moecover.comparison import run as comparison

    def reports(queue: Any, bench: Any, *, jobs: int) -> Any:
        while queue:
            job = queue.popleft()
            if isinstance(job, Evaluating):
                from moecover.comparison.worker import write_cell

                with bench() as handle:
                    first = next(r for r in handle(job) if isinstance(r, (Finished, Failure)))
                for cell in job.cells[1:]:
                    shutil.rmtree(tmp_path / "run" / "cells" / cell.id, ignore_errors=True)
                assert write_cell
                yield job, first
                yield job, Died(-9)

    monkeypatch.setattr(comparison, "work", reports)
    assert run(grid(methods=["random"]), tmp_path / "run") == 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["failed"] == ["qwen-random-keep6-seed0", "qwen-random-keep6-seed1"]


# ------------------------------------------------------------------------------------------------------------- expansion
TOPOLOGY = Topology("m", (1, 2), 60, 4, 8, 3)


def expanded(path: Path) -> list[Cell]:
    asked = read(path, {})
    return [c for entry in asked.config.models for c in cells(asked, entry, TOPOLOGY)]


def test_paper_grid() -> None:
    found = expanded(EXAMPLES / "paper.yaml")
    assert len(found) == 2 * (1 + 3 * (5 + 3))
    assert {c.keep for c in found} == {15, 30, 45, 60}
    config = read(EXAMPLES / "paper.yaml", {}).config
    assert (config.sequences, config.length, config.window) == (128, 2048, 2048)
    assert config.tasks == ["arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "winogrande"]
    assert config.perplexity == ["wikitext2", "c4"]
    assert {c.label for c in found} == {"full model", "random", "REAP", "ExpertSparsity", "TB-Coverage (contribution)"}


def test_tiny_example() -> None:
    found = expanded(EXAMPLES / "tiny.yaml")
    assert len(found) == 2 * (1 + 3 * (5 + 3 * 3))
    assert {c.model for c in found} == {"qwen2-moe-tiny", "deepseek-moe-tiny"}


def test_ids_do_not_depend_on_the_rest_of_the_grid(grid: Callable[..., Path]) -> None:
    small = {c.id for c in expanded(grid())}
    large = [
        c.id
        for c in expanded(
            grid(retain=[0.25, 0.5], samples=[0, 3], seeds=[0, 1, 2], saliencies=["reap", "contribution"])
        )
    ]
    assert small < set(large)
    assert len(set(large)) == len(large)


@pytest.mark.parametrize(
    ("method", "saliency", "options", "label"),
    [
        ("tb-coverage", "contribution", {}, "TB-Coverage (contribution)"),
        ("tb-coverage", "reap", {"protect": 0.25}, "TB-Coverage (reap, protect 0.25)"),
        ("pooled", "reap", {}, "REAP"),
        ("pooled", "ean", {}, "pooled (ean)"),
        ("pooled", "reap", {"protect_super_experts": True}, "REAP (protect super experts)"),
        ("expert-sparsity", None, {"mode": "progressive"}, "ExpertSparsity (mode progressive)"),
        ("random", None, {}, "random"),
    ],
)
def test_labels(method: str, saliency: str | None, options: dict[str, Any], label: str) -> None:
    assert label_of(method, saliency, options) == label
    assert "/" not in slug(label)


def test_methods_with_options(grid: Callable[..., Path]) -> None:
    methods = [
        {"method": "tb-coverage", "saliency": ["reap", "ean"], "protect": 1.0},
        {"method": "random", "seeds": 7},
        {"method": "pooled", "label": "ours"},
    ]
    found = variants(read(grid(methods=methods, saliencies=["frequency"]), {}))
    assert [(v.label, v.saliency, v.seeds) for v in found] == [
        ("TB-Coverage (reap, protect 1.0)", "reap", ()), ("TB-Coverage (ean, protect 1.0)", "ean", ()), ("random", None, (7,)),
        ("ours", "frequency", ()),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- bad input
GOOD = """models: [{model}]
calibration:
  - [a=a.jsonl, b=b.jsonl]
methods:
  - random
  - method: tb-coverage
    protect: 0.5
retain: [0.5]
perplexity: [test=test.jsonl]
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("retain: [0.5]", "retian: [0.5]", 8, "unknown key 'retian'. Did you mean retain? Known: models, calibration"),
        ("retain: [0.5]", "retain: [half]", 8, "`retain.0`: input should be a valid number, not 'half'"),
        ("retain: [0.5]", "retain: [0.5, 0.1]", 8, "qwen: retain 0.1 keeps 1 of 12 experts, which leaves fewer experts than the router's top-k of 4"),
        ("retain: [0.5]", "retain: [0.5, 0.51]", 8, "qwen: the budgets keep 6, 6 experts: give every one once"),
        ("retain: [0.5]", "retain: 0.5\nkeep: 6", None, "give one of `retain` (fractions) and `keep`"),
        ("retain: [0.5]", "retain: [0.5]\nseeds: []", 9, "`seeds`: at least one value is needed"),
        ("retain: [0.5]", "retain: [0.5]\nseeds: [1, 1]", None, "`seeds` has 1 twice"),
        ("retain: [0.5]", "retain: [0.5]\nbatch_size: 0", 9, "`batch_size`: input should be greater than or equal to 1, not 0"),
        ("retain: [0.5]", "retain: [0.5]\nretain: [0.75]", 9, "retain is given twice, first in line 8"),
        ("retain: [0.5]", "retain: [0.5]\nmemory_limit: much", 9, "'much' is no size"),
        ("retain: [0.5]", "retain: [0.5]\ndtype: int3", 9, "int3"),
        ("retain: [0.5]", "retain: [0.5]\nrepairs: [rigde]", 9, "unknown repair 'rigde'. Did you mean ridge?"),
        ("    protect: 0.5", "    repair: some", 7, "unknown repair 'some'. Known: none, ridge, scale"),
        ("retain: [0.5]", "retain: [0.5]\nrepairs: [ridge]\nrepair_tokens: 3", 10, "repair_tokens 3: 1 tokens a corpus are less than the first sequence of a"),
        ("retain: [0.5]", "retain: [0.5", 9, "not YAML"),
        ("  - random", "  - rndom", 5, "unknown method 'rndom'. Did you mean random?"),
        ("    protect: 0.5", "    protcet: 0.5", 6, "--protcet is no option of method tb-coverage"),
        ("    protect: 0.5", "    protect: 7", 6, "--protect 7 is out of range"),
        ("    protect: 0.5", "    saliency: reep", 6, "unknown saliency 'reep'. Did you mean reap"),
        ("    protect: 0.5", "    seeds: [1]", 6, "method tb-coverage chooses nothing by chance"),
        ("  - random", "  - tb-coverage\n  - tb-coverage", 6, "two methods are called TB-Coverage (contribution)"),
        ("b=b.jsonl", "b=c.jsonl", 3, "c.jsonl does not exist"),
        ("b=b.jsonl", "wikitxt2", 3, "unknown corpus 'wikitxt2'. Did you mean wikitext2?"),
        ("perplexity: [test=test.jsonl]", "perplexity: []", None, "nothing to measure: give `perplexity`, `tasks` or both"),
        ("perplexity: [test=test.jsonl]", "perplexity: [test=empty.jsonl]", 9, "empty"),
        ("perplexity: [test=test.jsonl]", "perplexity: [tset]", 9, "unknown corpus 'tset'"),
        ("models: [{model}]", "models: [{{model: shipped:nobody}}]", 1, "unknown shipped model 'nobody'"),
        ("models: [{model}]", "models: [{{nmae: x}}]", 1, "`models.0.model` is missing"),
        ("models: [{model}]", "models: [./no-such-folder]", 1, "no-such-folder"),
        ("models: [{model}]", "models: [{{model: x, nmae: y}}]", 1, "unknown key 'nmae'. Did you mean name? Known: model, revision, name"),
        ("models: [{model}]\n", "", None, "`models` is missing"),
    ],
)  # fmt: skip
def test_mistakes_in_the_file(
    tmp_path: Path, checkpoints: Any, capsys: Any, old: str, new: str, line: int | None, message: str
) -> None:
    for number, name in enumerate(("a", "b", "test")):
        write_text_file(tmp_path / f"{name}.jsonl", number, 4000)
    (tmp_path / "empty.jsonl").write_text("")
    assert GOOD.count(old) == 1
    text = GOOD.replace(old, new).format(model=f"{{model: {checkpoints('qwen2_moe')}, name: qwen}}")
    (tmp_path / "grid.yaml").write_text(text)
    assert main(["compare", str(tmp_path / "grid.yaml"), "-o", str(tmp_path / "run"), "-q"]) == 2
    captured = capsys.readouterr()
    where = f"{tmp_path / 'grid.yaml'}, line {line}: " if line else f"{tmp_path / 'grid.yaml'}: "
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"moecover: {where}")
    assert message in captured.err
    assert not (tmp_path / "run" / "cells").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--retain", "0.5", "--keep", "6"], "give one of `retain`"),
        (["--retain", "0.01"], "--retain: qwen: retain 0.01 keeps 0 of 12 experts"),
        (["--memory-limit", "600MB"], "--memory-limit: qwen: one layer at a time still needs 0."),
        (["--jobs", "0"], "--jobs 0 is out of range"),
        (["--method", "rndom"], "unknown method 'rndom'. Did you mean random?"),
        (["--seeds", "1,1"], "`seeds` has 1 twice"),
    ],
)
def test_mistakes_in_flags(
    grid: Callable[..., Path], tmp_path: Path, capsys: Any, flags: list[str], message: str
) -> None:
    assert run(grid(), tmp_path / "run", *flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_other_mistakes(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    path = grid()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for arguments, message in (
        ([str(path), "-o", str(tmp_path / "mine")], "was not written by `moecover compare`"),
        ([str(path), "x", "-o", str(tmp_path / "run")], "give one configuration, or models"),
        (["model", "-o", str(tmp_path / "run")], "give calibration corpora with --corpus"),
        (["no.yaml", "-o", str(tmp_path / "run")], "no configuration no.yaml"),
    ):
        assert main(["compare", *arguments, "-q"]) == 2
        assert message in capsys.readouterr().err


def test_two_runs_do_not_share_a_folder(grid: Callable[..., Path], tmp_path: Path) -> None:
    from moecover.files.atomic import locked

    with locked(tmp_path / "run"):
        process = start(grid(methods=["random"]), tmp_path / "run")
        _, errors = process.communicate()
    assert process.returncode == 2
    assert b"is being written by another run" in errors


def test_groups_do_not_change_figures(grid: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    """What a cell gives does not depend on the cells beside it."""
    from moecover.comparison import run as comparison

    path = grid(seeds=list(range(3)))
    assert GROUP > 3
    compare(read(path, {}), tmp_path / "one")
    monkeypatch.setattr(comparison, "GROUP", 1)
    compare(read(path, {}), tmp_path / "two")
    assert (tmp_path / "one" / "results.csv").read_bytes() == (tmp_path / "two" / "results.csv").read_bytes()
