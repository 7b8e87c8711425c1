"""Locks on outputs: one run at a time, whatever the file system does."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moecover.errors import InputError, MoecoverError
from moecover.files.locks import claim, is_claimed, locked
from tests.support.folders import names_in


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom moecover.files.locks import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(output)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=r"out is being written by another run\. Wait until it ends"), locked(output):
        pass
    with locked(tmp_path / "deep" / "other"):
        pass
    process.kill()
    process.wait()
    assert names_in(output.parent) == [".out.lock"]  # the file stays, the lock does not
    with locked(output), locked(output):
        assert names_in(output.parent) == [".out.lock"]
    assert names_in(output.parent) == []


def test_a_run_that_waits_for_another_one(tmp_path: Path) -> None:
    output, order, waits = tmp_path / "out", list[str](), threading.Event()

    def wait() -> None:
        with locked(output, waiting=waits.set):
            order.append("second")

    with locked(output):
        thread = threading.Thread(target=wait)
        thread.start()
        assert waits.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert names_in(tmp_path) == []


def test_a_claim_is_free_when_given_back_or_its_process_has_died(tmp_path: Path) -> None:
    file = tmp_path / "part.lock"
    assert not is_claimed(file)
    give_back = claim(file)
    assert give_back is not None
    assert claim(file) is None
    assert is_claimed(file)
    give_back()
    assert not is_claimed(file)
    assert names_in(tmp_path) == ["part.lock"]
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom moecover.files.locks import claim\n"
        "held = claim(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert claim(file) is None
    process.kill()
    process.wait()
    assert claim(file) is not None


def test_a_lock_leaves_no_folder_of_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError), locked(tmp_path / "deep" / "er" / "out"):
        raise ValueError
    assert names_in(tmp_path) == []


def test_a_lock_file_that_was_removed_meanwhile_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = fcntl.flock, []

    def slow(descriptor: int, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:  # the other run ends between our open and our lock
            (tmp_path / ".out.lock").unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with locked(tmp_path / "out"):
        assert names_in(tmp_path) == [".out.lock"]
    assert len(calls) == 2


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EACCES])
def test_file_systems_without_locks_and_read_only_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if number == errno.ENOLCK:
        with locked(tmp_path / "out"):
            pass
    else:
        refused = pytest.raises(MoecoverError, match="writing .*out: Permission denied. Nothing was left behind")
        with refused, locked(tmp_path / "out"):
            pass
    monkeypatch.undo()
    refused = pytest.raises(
        MoecoverError, match=r"writing /proc/out: .*: (No such file|Permission denied|Not supported).*"
    )
    with refused, locked(Path("/proc/out")):
        pass
