"""Comparisons on a cluster: with a stand-in for Ray, and on a real one of two nodes where Ray is installed."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecover.comparison.run import compare
from moecover.errors import InputError, MoecoverError
from tests.support.fake_ray import FakeRay
from tests.support.grids import cells_of, finished, written

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_lost_worker_costs_no_cell(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path, out, local = grid(methods=["random", "tb-coverage"]), tmp_path / "run", tmp_path / "local"
    compare(path, local, progress=False)
    ray = FakeRay(gpus=2, deaths=1)
    monkeypatch.setitem(sys.modules, "ray", ray)
    made = compare(path, out, engine="ray", gpus_per_job=1)
    assert (made.made, made.failures) == (4, {})
    assert (out / "results.csv").read_bytes() == (local / "results.csv").read_bytes()
    assert (ray.asked["num_gpus"], ray.asked["ended"], ray.started) == (1, True, 2)
    assert "of its cells are tried again" in capsys.readouterr().err


def test_a_worker_that_is_lost_again_and_again_fails_its_cells(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay(deaths=100))
    made = compare(grid(methods=["random"], seeds=[0, 1, 2, 3, 4, 5]), tmp_path / "run", engine="ray", progress=False)
    assert len(made.failures) == 4  # each death comes after a report: three of seven cells are done
    assert "died, or its machine did, 3 times" in next(iter(made.failures.values()))


def test_what_a_cluster_lacks_is_said_before_the_work(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(InputError, match=match):
            compare(grid(), tmp_path / "run", progress=False, **options)
        assert not (tmp_path / "run").exists()

    refused("unknown engine 'slurm'", engine="slurm")
    refused("is for a cluster. Give .*engine", address="auto")
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(r"needs Ray, which is not installed. Install it: pip install 'moecover\[ray\]'", engine="ray")
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    refused("gpus_per_job.*1.*the cluster has 0 GPUs", engine="ray", gpus_per_job=1)
    refused("is out of range: 0 or more", engine="ray", gpus_per_job=-1)
    refused("is not an address. Give auto or HOST:PORT", engine="ray", address="ray://here:1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        refused("no Ray cluster answers .*refused", engine="ray", address=f"127.0.0.1:{free.getsockname()[1]}")


def test_a_machine_that_does_not_see_the_folder(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray, out = FakeRay(), tmp_path / "run"
    monkeypatch.setitem(sys.modules, "ray", ray)
    kept = ray.remote

    def remote(**options: Any) -> Any:
        (out / "config.yaml").unlink()
        return kept(**options)

    monkeypatch.setattr(ray, "remote", remote)
    with pytest.raises(MoecoverError, match="does not see the run folder .*run. Give one that all machines share"):
        compare(grid(methods=["random"]), out, engine="ray", progress=False)


@pytest.mark.cluster
def test_two_nodes_of_which_one_is_killed(grid: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed; `make test-cluster` installs it")
    from ray.cluster_utils import Cluster

    path, out, local = grid(seeds=list(range(20)), samples=[0, 1]), tmp_path / "run", tmp_path / "local"
    compare(path, local, progress=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    killed: list[dict[str, int]] = []
    try:
        second = cluster.add_node(num_cpus=1)

        def kill() -> None:
            deadline = time.monotonic() + 300
            while cells_of(out) < 5 and time.monotonic() < deadline:
                time.sleep(0.01)
            killed.append(finished(out))
            cluster.remove_node(second, allow_graceful=False)

        thread = threading.Thread(target=kill)
        thread.start()
        made = compare(path, out, engine="ray", address=cluster.address, jobs=2, progress=True)
        thread.join()
    finally:
        cluster.shutdown()
    assert made.failures == {}
    assert (out / "results.csv").read_bytes() == (local / "results.csv").read_bytes()
    kept = written(out)
    assert {name: kept[name] for name in killed[0]} == killed[0]
    assert compare(path, out, progress=False).made == 0
