"""Comparisons on a cluster: with a stand-in for Ray, and on a real one of two nodes where Ray is installed."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecover.comparison.members import CLAIMS, Members
from moecover.comparison.run import compare
from moecover.errors import InputError, MoecoverError
from moecover.rehearsal import rehearsed
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
    assert "of it to be tried again" in capsys.readouterr().err


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
    monkeypatch.setattr(FakeRay, "init", lambda self, **options: pytest.fail("a dry run joins no cluster"))
    assert rehearsed(lambda: compare(grid(), tmp_path / "run", progress=False, engine="ray"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        refused("no Ray cluster answers .*refused", engine="ray", address=address)
        free.listen()
        monkeypatch.setattr(FakeRay, "init", lambda self, **options: 1 / 0)
        refused("does not take this process in .division by zero.*RAY_AUTH_MODE=token", engine="ray", address=address)
        refused("no Ray cluster answers .*division by zero.*ray start --head", engine="ray", address="auto")


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeRay]:
    """A cluster whose machines do not see the run folder; ``change`` is called before an actor starts."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def get(run: Path, change: Callable[[], object] = lambda: None, **options: int) -> FakeRay:
        ray = FakeRay(**options)
        kept = ray.remote

        def remote(**asked: Any) -> Any:
            for file in (run / CLAIMS).glob("seen-*"):
                file.unlink()
            change()
            return kept(**asked)

        monkeypatch.setattr(ray, "remote", remote)
        monkeypatch.setitem(sys.modules, "ray", ray)
        return ray

    return get


def test_a_machine_that_does_not_see_the_folder(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: Callable[..., FakeRay]
) -> None:
    """It is sent what its jobs read, the profile of an earlier run among it, and sends back what they write."""
    repaired = {"method": "tb-coverage", "repair": ["none", "ridge"]}
    path, out, local = grid(methods=["random", repaired], seeds=[0]), tmp_path / "run", tmp_path / "local"
    compare(path, local, progress=False)
    compare(grid("less.yaml", methods=["random", "tb-coverage"], seeds=[0]), out, progress=False)
    shutil.rmtree(out / "plans")
    shutil.rmtree(out / "cells")
    left = tmp_path / "temporary" / f"moecover-run-{os.getuid()}-killed"
    left.mkdir()
    left.with_suffix(".lock").touch()
    monkeypatch.setattr("moecover.comparison.shipping.PIECE", 1000)
    monkeypatch.setattr("moecover.comparison.engines.profile", None)
    ray = apart(out, deaths=1)
    made = compare(path, out, engine="ray", progress=False)
    assert (made.made, made.failures, ray.started) == (4, {}, 2)
    assert (out / "results.csv").read_bytes() == (local / "results.csv").read_bytes()
    assert files(out) == files(local)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_profile_that_another_machine_has_made_is_used_again(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: Callable[..., FakeRay]
) -> None:
    out, methods = tmp_path / "run", ["tb-coverage"]
    apart(out)
    compare(grid(methods=methods), out, engine="ray", progress=False)
    monkeypatch.setattr("moecover.comparison.engines.profile", None)
    assert compare(grid(methods=methods, keep=[4], retain=None), out, progress=False).failures == {}


def test_a_machine_without_the_same_files(
    grid: Callable[..., Path], tmp_path: Path, checkpoints: Callable[..., Path], apart: Callable[..., FakeRay]
) -> None:
    model, out, plugin = tmp_path / "model", tmp_path / "run", tmp_path / "plugin.py"
    shutil.copytree(checkpoints("qwen2_moe"), model)
    plugin.touch()
    path = grid(models=str(model), methods=["random"], seeds=[0], plugins=str(plugin))

    def refused(change: Callable[[], object], match: str) -> None:
        apart(out, change)
        with pytest.raises(MoecoverError, match=match):
            compare(path, out, engine="ray", progress=False)

    refused(lambda: plugin.rename(tmp_path / "away.py"), "does not see .*plugin.py. Give all machines the same paths")
    (tmp_path / "away.py").rename(plugin)
    refused(lambda: model.rename(tmp_path / "away"), "does not see the model model: .*model")
    (tmp_path / "away").rename(model)
    weights = (model / "model.safetensors").read_bytes()
    other = weights[:-1] + bytes([weights[-1] ^ 1])
    refused(lambda: (model / "model.safetensors").write_bytes(other), "has other weights of model than the machine")


def files(run: Path) -> list[str]:
    """The files of a run folder."""
    return sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file())


@pytest.mark.cluster
@pytest.mark.parametrize("shared", [True, False], ids=["shared folder", "results shipped back"])
def test_two_nodes_of_which_one_is_killed(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed; `make test-cluster` installs it")
    from ray.cluster_utils import Cluster

    path, out, local = grid(seeds=list(range(20)), samples=[0, 1]), tmp_path / "run", tmp_path / "local"
    compare(path, local, progress=False)
    if not shared:
        join = Members.join

        def unseen(self: Members, digest: str) -> None:
            join(self, digest)
            self.marker.unlink()

        monkeypatch.setattr(Members, "join", unseen)
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
