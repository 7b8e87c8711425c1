"""The long verbs in several processes: the same files as one process writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import read_structure
from moecover.cli import main as cli
from moecover.evaluation.artifact import Evaluation
from moecover.planning.artifact import Plan
from moecover.runtime.distributed import shared_out
from moecover.runtime.world import World
from tests.runtime.test_distributed import said, started, torchrun, workers
from tests.support.tasks import ARC, BLIMP, random_plan, write_rows

WORKER = """
import json, sys
from moecover.cli import main as cli
from moecover.runtime import cost, distributed
cost.OVERHEAD = 0
distributed.PULSE, distributed.SILENCE = 0.5, 5
if "--slowly" in sys.argv:
    import time
    wait = distributed.wait_for_all
    def slowly(here):
        time.sleep(1)
        wait(here)
        print("waited", flush=True)
    distributed.wait_for_all = slowly
for arguments in json.loads(open(sys.argv[1]).read()):
    if status := cli.main(arguments):
        sys.exit(status)
"""

pytestmark = pytest.mark.usefixtures("one_thread")  # as in the processes that torchrun starts


def commands(source: Path, folder: Path, tiny: Path, *, limit: str = "", tasks: bool = False) -> list[list[str]]:
    """Every verb that shares out its work, on a tiny and on the shipped model, into a folder."""
    shipped, device = str(shipped_model()), ["--device", "cpu", "-q"]
    limited = ["--memory-limit", limit] if limit else []
    measured = ["--perplexity", "web-heldout", "--windows", "5", "--length", "24", "--batch-size", "2"]
    scored = ["--tasks", "arc_easy,blimp", "--data-dir", str(source)] if tasks else []
    generate = ["generate", str(tiny), "--sequences", "5", "--length", "8", "--batch-size", "2", "-o"]
    return [
        [
            *("plan", str(source / "profile"), "--method", "expert-sparsity", "--keep", "6", "--model", str(tiny)),
            *("--search", "greedy", *device, "-o", str(folder / "plan.json")),
        ],
        [
            *("evaluate", shipped, "--plan", str(source / "half.json"), *measured, *scored),
            *(*device, *limited, "-o", str(folder / "evaluation")),
        ],
        [*generate, str(folder / "own.jsonl"), *device],
        [
            *("prune", str(tiny), "--corpus", f"a={source / 'text.jsonl'}", "--batch-size", "1", "--keep", "6"),
            *("--merge", "ream", "--repair", "refit", *device, "-o", str(folder / "pruned")),
        ],
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def tiny(checkpoints: Callable[..., Path]) -> Path:
    return checkpoints("qwen2_moe")


@pytest.fixture
def source(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Text, documents of tasks, a plan and a profile that keeps inputs."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "source"
    folder.mkdir()
    rows = np.random.default_rng(0).integers(5, 100, size=(5, 24)).tolist()
    rows[-1] = rows[-1][:15]  # padding
    (folder / "text.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    write_rows(folder / "arc_easy", validation=ARC[:2], test=ARC)
    write_rows(folder / "blimp", blimp=BLIMP)
    random_plan(read_structure(shipped_model()), 30).save(folder / "half.json")
    text = ["--corpus", f"a={folder / 'text.jsonl'}", "--keep-inputs", "64", "-o", str(folder / "profile"), "-q"]
    assert cli.main(["profile", str(tiny), *text]) == 0
    return folder


def in_processes(processes: int, folder: Path, arguments: list[list[str]]) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "worker.py").write_text(WORKER)
    (folder / "commands.json").write_text(json.dumps(arguments))
    started = torchrun(processes, folder, [str(folder / "commands.json")])
    return subprocess.run(started, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("processes", "limit", "tasks"),
    [
        (2, "", False),
        pytest.param(4, "", True, marks=pytest.mark.slow),
        pytest.param(3, "15MB", True, marks=pytest.mark.slow),
    ],
)
def test_the_same_files(source: Path, tiny: Path, tmp_path: Path, processes: int, limit: str, tasks: bool) -> None:
    """In memory and, with a limit, layer by layer."""
    one, many = tmp_path / "one", tmp_path / "many"
    for arguments in commands(source, one, tiny, tasks=tasks):
        assert cli.main(arguments) == 0
    done = in_processes(processes, many, commands(source, many, tiny, limit=limit, tasks=tasks))
    assert done.returncode == 0, done.stderr
    assert Plan.load(many / "plan.json").to_json() == Plan.load(one / "plan.json").to_json()
    found, expected = (Evaluation.load(folder / "evaluation") for folder in (many, one))
    assert found.to_dict() == expected.to_dict()
    for row, texts in expected.windows.items():
        for text, windows in texts.items():
            np.testing.assert_array_equal(found.windows[row][text], windows)
    for row, tasks in expected.items.items():
        for task, metrics in tasks.items():
            for metric, values in metrics.items():
                np.testing.assert_array_equal(found.items[row][task][metric], values)
    assert (many / "own.jsonl").read_bytes() == (one / "own.jsonl").read_bytes()
    for name, expected_weight in weights(one / "pruned").items():
        torch.testing.assert_close(weights(many / "pruned")[name], expected_weight, rtol=1e-3, atol=1e-5)
    left = {path.name for path in many.iterdir()}
    assert left == {"worker.py", "commands.json", "plan.json", "evaluation", "own.jsonl", "pruned"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "P", "--keep", "30", "-o", "x"], "plan --keep with method tb-coverage does not go together with sev"),
        (
            ["split", "M", "--corpus", "self=x.jsonl", "-o", "x"],
            "torchrun started 2. In several run shrink, gen",
        ),
    ],
)
def test_refusals(
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    known = {"P": str(source / "profile"), "M": str(shipped_model())}
    assert cli.main([known.get(one, one) for one in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_shrink(tmp_path: Path) -> None:
    """Its own text is the same, and so is what it keeps; weights but for the order of additions."""
    folders = tmp_path / "one", tmp_path / "many"
    text = ["--corpus", "encyclopedia", "--corpus", "web", "--quality", "fast", "--device", "cpu", "--dtype", "float32"]
    made = [["shrink", str(shipped_model()), "--budget", "50%", *text, "-q", "-o", str(f / "out")] for f in folders]
    folders[0].mkdir()
    assert cli.main(made[0]) == 0
    done = in_processes(2, folders[1], [made[1]])
    assert done.returncode == 0, done.stderr
    work = [folder / "out-work" for folder in folders]
    assert (work[1] / "own-text.jsonl").read_bytes() == (work[0] / "own-text.jsonl").read_bytes()
    plans = [Plan.load(next(folder.glob("*/plan.json"))) for folder in work]
    assert plans[0].kept == plans[1].kept
    for name, expected in weights(folders[0] / "out").items():
        torch.testing.assert_close(weights(folders[1] / "out")[name], expected, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4), ids=["plan", "evaluate", "generate", "prune"])
def test_a_dead_process_ends_the_job_which_runs_again_later(
    source: Path, tiny: Path, tmp_path: Path, number: int
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "worker.py").write_text(WORKER)
    (folder / "commands.json").write_text(json.dumps([commands(source, folder, tiny)[number]]))
    process = started(torchrun(2, folder, [str(folder / "commands.json"), "--slowly"]))
    assert process.stdout is not None
    for _ in range(3):
        assert "waited" in process.stdout.readline()
    os.kill(workers(process)[1], signal.SIGKILL)
    _, log = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(said(log)) <= 1, log
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {"worker.py", "commands.json"}
    done = in_processes(2, folder, [commands(source, folder, tiny)[number]])
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir() if path.name[0] == "."] == []


def test_a_process_does_its_own_share_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of items stay together; the results of both processes come back in the order of the items."""
    done: list[list[int]] = []

    def gather(everyone: list[list[str]], mine: list[str]) -> None:
        everyone[:] = [["0", "1", "4"], mine]

    def work(items: list[int]) -> list[str]:
        done.append(items)
        return list(map(str, items))

    monkeypatch.setattr("moecover.runtime.distributed.wait_for_all", lambda here: None)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    second = World(rank=1, size=2, local_rank=1, local_size=2)
    assert shared_out(second, range(5), work, together=2) == list("01234")
    assert done == [[2, 3]]
