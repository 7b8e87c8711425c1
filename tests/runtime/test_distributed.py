"""Several processes, one profile: equal to one process's; a dead rank; profiles that are merged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moecover.checkpoints.structure import read_structure
from moecover.cli import main as cli
from moecover.errors import InputError
from moecover.profiling.artifact import Profile
from moecover.profiling.statistics import COUNTS, MAXIMA
from moecover.runtime import cost as fitting
from moecover.runtime import distributed
from tests.support.passes import limit_between

WORKER = """
import sys
from moecover.cli import main as cli
from moecover.runtime import distributed
from moecover.runtime import cost as fitting
from moecover.runtime import pass_state as states
fitting.OVERHEAD = 0
distributed.PULSE, distributed.SILENCE = 0.5, 5
if "--slow" in sys.argv:
    import time
    sys.argv.remove("--slow")
    save = states.State.save
    def slowly(self, *args, **kwargs):
        time.sleep(0.3)
        save(self, *args, **kwargs)
        print("saved", flush=True)
    states.State.save = slowly
sys.exit(cli.main(sys.argv[1:]))
"""


pytestmark = pytest.mark.usefixtures("one_thread")  # as in the processes that torchrun starts


@pytest.fixture
def job(tmp_path: Path, checkpoints: Callable[..., Path]) -> Callable[..., list[str]]:
    """A command line of a profile, and the file of the worker."""
    (tmp_path / "worker.py").write_text(WORKER)
    rng = np.random.default_rng(0)
    for name, count, length in (("a", 9, 30), ("b", 3, 17)):
        rows = rng.integers(0, 300, size=(count, length)).tolist()
        rows[-1] = rows[-1][: length // 2]  # padding
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))

    def get(*extra: str, family: str = "qwen2_moe") -> list[str]:
        corpora = [f"--corpus={name}={tmp_path / name}.jsonl" for name in "ab"]
        return ["profile", str(checkpoints(family)), *corpora, "--batch-size", "2", *extra]

    return get


def torchrun(processes: int, folder: Path, arguments: list[str], *machine: str) -> list[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--master-port",
        str(20000 + os.getpid() % 20000),
        *machine,
    ]
    return [*launcher, str(folder / "worker.py"), *arguments]


def close(found: Profile, expected: Profile) -> None:
    """Counts and maxima equal, sums but for the order of additions."""
    for corpus, statistics in expected.statistics.items():
        for name, values in statistics.items():
            for one, two in (
                (found.statistics[corpus][name], values),
                (found.parts[corpus][name], expected.parts[corpus][name]),
            ):
                if name in (*COUNTS, *MAXIMA):
                    np.testing.assert_array_equal(one, two, err_msg=f"{corpus}, {name}")
                else:
                    np.testing.assert_allclose(one, two, rtol=1e-12, err_msg=f"{corpus}, {name}")
        np.testing.assert_allclose(found.channels[corpus], expected.channels[corpus], rtol=1e-12, err_msg=corpus)


def by_layer(checkpoints: Callable[..., Path]) -> list[str]:
    """A limit of memory that one layer at a time keeps to."""
    made = read_structure(checkpoints("qwen2_moe"))
    return ["--memory-limit", str(limit_between(made, tokens=200, batch_tokens=60, head=False))]


@pytest.mark.parametrize(
    "processes, way",
    [  # two, layer by layer, are in the next test
        pytest.param(2, "layers", marks=pytest.mark.slow),
        pytest.param(2, "memory", marks=pytest.mark.slow),
        pytest.param(4, "layers", marks=pytest.mark.slow),
        pytest.param(4, "memory", marks=pytest.mark.slow),
        pytest.param(9, "memory", marks=pytest.mark.slow),
    ],
)
def test_the_same_as_one_process(
    processes: int, way: str, job, tmp_path: Path, checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine processes for seven batches: some have none of corpus b, two have none at all."""
    monkeypatch.setattr(fitting, "OVERHEAD", 0)
    limit = by_layer(checkpoints) if way == "layers" else []
    assert cli.main([*job(), "-o", str(tmp_path / "one")]) == 0
    done = subprocess.run(
        torchrun(processes, tmp_path, [*job(*limit), "-o", str(tmp_path / "many")]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("statistics of 2 layers x 12 experts") == 1  # one of them speaks
    assert ("running layer by layer" in done.stderr) == (way == "layers")
    close(Profile.load(tmp_path / "many"), Profile.load(tmp_path / "one"))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True, check=True
    )
    return list(map(int, found.stdout.split()))


def said(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("moecover: ") and "resuming" not in line]


def started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_dead_process_ends_the_job_which_goes_on_later(
    job, tmp_path: Path, checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """One line from all of them, and the state of each is used: the same as one process, layer by layer."""
    monkeypatch.setattr(fitting, "OVERHEAD", 0)
    assert cli.main([*job(), "-o", str(tmp_path / "one")]) == 0
    asked = [*job(*by_layer(checkpoints)), "-o", str(tmp_path / "many")]
    process = started(torchrun(processes, tmp_path, [*asked, "--slow"]))
    assert process.stdout is not None
    assert process.stdout.readline().startswith("saved")
    os.kill(workers(process)[-1], signal.SIGKILL)
    _, log = process.communicate(timeout=120)
    assert process.returncode != 0
    failures = [line for line in said(log) if "another process of" in line]
    assert len(failures) == 1, log
    assert 'Traceback (most recent call last):\n  File "' + str(tmp_path) not in log
    assert not (tmp_path / "many").exists()
    assert list(tmp_path.glob(".many.profile.partial-*"))
    done = subprocess.run(torchrun(processes, tmp_path, asked), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming: " in done.stderr
    assert "running layer by layer" in done.stderr
    assert done.stdout.count("statistics of 2 layers x 12 experts") == 1  # one of them speaks
    close(Profile.load(tmp_path / "many"), Profile.load(tmp_path / "one"))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def machines(folder: Path, command: list[str]) -> list[subprocess.Popen[str]]:
    """Two torchruns that play two machines, of a process each."""
    place = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--node-rank"]
    return [started(torchrun(1, folder, command, *place, str(n))) for n in range(2)]


def lose_the_second(folder: Path, command: list[str], *, whole: bool) -> None:
    """Kill the second machine's process in the middle of its pass, or all of the machine: the first notices."""
    first, second = machines(folder, [*command, "--slow"])
    assert second.stdout is not None
    assert second.stdout.readline().startswith("saved")
    dead = workers(second)
    if whole:
        second.kill()
    os.kill(dead[-1], signal.SIGKILL)
    _, log = first.communicate(timeout=120)
    second.communicate(timeout=120)
    assert first.returncode != 0
    assert len([line for line in said(log) if "no heartbeat" in line or "another process of" in line]) == 1, log
    assert not (folder / "many").exists()


def test_a_machine_that_is_lost(job, tmp_path: Path) -> None:
    lose_the_second(tmp_path, [*job(), "-o", str(tmp_path / "many")], whole=True)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["a process", "a machine"])
def test_two_machines(job, tmp_path: Path, whole: bool) -> None:
    """Equal to one process, after one of them was lost."""
    command = [*job(), "-o", str(tmp_path / "many")]
    lose_the_second(tmp_path, command, whole=whole)
    assert cli.main([*job(), "-o", str(tmp_path / "one")]) == 0
    for process in machines(tmp_path, command):
        _, log = process.communicate(timeout=120)
        assert process.returncode == 0, log
    close(Profile.load(tmp_path / "many"), Profile.load(tmp_path / "one"))


def test_no_thread_uses_the_store_any_more_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that exits meanwhile is aborted, and torchrun on the other machines waits for minutes."""

    class Slow:
        def add(self, key: str, amount: int) -> int:
            if key.startswith("alive"):
                time.sleep(0.3)
            return 2

        def check(self, keys: list[str]) -> bool:
            return False

    monkeypatch.setattr(distributed, "store", Slow)
    monkeypatch.setattr(distributed, "PULSE", 0.01)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr("torch.distributed.PrefixStore", lambda prefix, store: store)
    before = set(threading.enumerate())
    with distributed.joined(distributed.World(1, 2, 0, 1), "cpu"):
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ls", "methods"], "ls runs in one process, torchrun started 2"),
        (["profile", "x", "--corpus", "web", "-o", "y"], "is not a number in the environment"),
    ],
)
def test_refusals(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    if "ls" in arguments:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_merge(job, tmp_path: Path, checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two halves of a corpus and another corpus: as one profile of all, but for the order of additions."""
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("first", lines[:4]), ("second", lines[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    model, base = str(checkpoints("qwen2_moe")), ["--batch-size", "2", "-o"]
    assert cli.main(["profile", model, f"--corpus=a={tmp_path}/first.jsonl", *base, str(tmp_path / "p1")]) == 0
    assert (
        cli.main(
            [
                "profile",
                model,
                f"--corpus=a={tmp_path}/second.jsonl",
                f"--corpus=b={tmp_path}/b.jsonl",
                *base,
                str(tmp_path / "p2"),
            ]
        )
        == 0
    )
    assert cli.main([*job(), "-o", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    merge = ["merge", str(tmp_path / "p1"), str(tmp_path / "p2"), "-o", str(tmp_path / "sum")]
    assert cli.main(merge) == 0
    assert "2 profiles added up" in capsys.readouterr().out
    found, expected = Profile.load(tmp_path / "sum"), Profile.load(tmp_path / "whole")
    for corpus, statistics in expected.statistics.items():
        for name, values in statistics.items():
            np.testing.assert_allclose(found.statistics[corpus][name], values, rtol=1e-6 if name not in COUNTS else 0)
        np.testing.assert_allclose(found.channels[corpus], expected.channels[corpus], rtol=1e-5)
    assert cli.main(merge) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main(["merge", str(tmp_path / "p1"), str(tmp_path / "sum"), "-o", str(tmp_path / "x")]) == 2
    assert "hold the same sample of corpus a: it would count twice" in capsys.readouterr().err
    assert cli.main(["merge", str(tmp_path / "p1"), "-o", str(tmp_path / "x")]) == 2
    other = str(checkpoints("mixtral"))
    assert cli.main(["profile", other, f"--corpus=a={tmp_path}/b.jsonl", *base, str(tmp_path / "p3")]) == 0
    with pytest.raises(InputError, match="different models"):
        _ = Profile.load(tmp_path / "p1") + Profile.load(tmp_path / "p3")
