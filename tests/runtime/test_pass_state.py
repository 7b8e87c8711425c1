"""Interrupted passes resume with the same numbers; a state of other inputs, or a damaged one, is not used."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from moecover.checkpoints.structure import Structure, read_structure
from moecover.cli import main as cli
from moecover.errors import MoecoverError
from moecover.profiling.artifact import Profile
from moecover.profiling.run import profile
from moecover.runtime import cost as fitting_module
from moecover.runtime.loading import load_model
from moecover.runtime.pass_state import FILE, State
from moecover.runtime.streaming import streamed
from tests.conftest import random_corpus
from tests.support.passes import Stop, corpora, limit_between, same, stop_after
from tests.support.tiny import make_checkpoint


@pytest.mark.parametrize("way", ["memory", "layers", "spilled"])
@pytest.mark.parametrize("saves", [1, 2, 3])
def test_an_interrupted_pass_goes_on(
    structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, saves: int
) -> None:
    """With a sample of the inputs, whose file is made in pieces too."""
    texts, state = corpora(), tmp_path / "state"
    once = profile(structure, texts, model=load_model(structure), batch_size=2, keep_inputs=(100, tmp_path / "once"))

    def go(folder: str) -> Profile:
        given = {"batch_size": 2, "state": state, "keep_inputs": (100, tmp_path / folder)}
        if way == "memory":
            return profile(structure, texts, model=load_model(structure), **given)
        with streamed(structure, spill=way == "spilled") as stream:
            return profile(structure, texts, model=stream, **given)

    with monkeypatch.context() as patched, pytest.raises(Stop):
        stop_after(patched, saves)
        go("again")
    assert not (tmp_path / "again").exists()
    made = go("again")
    same(made, once)
    assert (tmp_path / "again" / "inputs.safetensors").read_bytes() == (
        tmp_path / "once" / "inputs.safetensors"
    ).read_bytes()
    # All of it is done: nothing runs any more.
    monkeypatch.setattr("moecover.profiling.passes.run", None)
    monkeypatch.setattr("moecover.profiling.passes.backbone_of", lambda model: None)
    (tmp_path / "third").mkdir()
    shutil.copy(tmp_path / "again" / "inputs.safetensors", state / "inputs.safetensors")
    same(go("third"), once)


def test_a_large_state_is_saved_less_often(
    structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which saving takes as long as everything between two batches; the end is always saved."""
    model, state, save, saved = load_model(structure), tmp_path / "state", State.save, list[int]()
    given = {"model": model, "batch_size": 2, "state": state}
    clock, left = itertools.count(), [60]

    def noting(self: State, done: int, *args: object, **kwargs: object) -> None:
        saved.append(done)
        save(self, done, *args, **kwargs)

    def stop(tokens: int) -> None:
        left[0] -= tokens
        if left[0] < 0:
            raise Stop

    monkeypatch.setattr(State, "save", noting)
    monkeypatch.setattr("moecover.runtime.pass_state.SMALL", 0)
    monkeypatch.setattr("moecover.runtime.pass_state.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(Stop):
        profile(structure, corpora(), advance=stop, **given)
    said: list[str] = []
    made = profile(structure, corpora(), say=said.append, **given)
    assert (saved, said) == ([1, 2, 5], ["resuming: 1 of 5 batches are done"])
    same(made, profile(structure, corpora(), model=model, batch_size=2))


def test_a_state_of_other_inputs_is_not_used(structure: Structure, tmp_path: Path, monkeypatch) -> None:
    model, state = load_model(structure), tmp_path / "state"
    with monkeypatch.context() as patched, pytest.raises(Stop):
        stop_after(patched, 2)
        profile(structure, corpora(), model=model, batch_size=2, state=state)
    for change, name in (({"batch_size": 1}, "batch size"), ({"corpora": corpora(100)}, "corpora")):
        given = {"corpora": corpora(), "batch_size": 2, **change}
        shutil.copytree(state, tmp_path / name)
        said: list[str] = []
        made = profile(
            structure,
            given["corpora"],
            model=model,
            batch_size=given["batch_size"],
            state=tmp_path / name,
            say=said.append,
        )
        assert said == [f"starting over: {tmp_path / name} was made from other inputs, {name} differs"]
        same(made, profile(structure, given["corpora"], model=model, batch_size=given["batch_size"]))
    (structure.checkpoint.path / "model.safetensors").touch()  # written anew, for all that is known
    said = []
    profile(structure, corpora(), model=model, batch_size=2, state=state, say=said.append)
    assert said == [f"starting over: {state} was made from other inputs, weights differs"]


@pytest.mark.parametrize("way", ["memory", "layers"])
def test_a_state_of_the_same_corpora_in_another_order_is_not_used(
    structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Batches are counted in the order of the corpora; where both have one shape, nothing else would tell."""
    one, two, state = *(random_corpus(name, seed=seed, vocab=128) for seed, name in enumerate("ab")), tmp_path / "state"
    with contextlib.nullcontext(load_model(structure)) if way == "memory" else streamed(structure) as model:
        expected = profile(structure, [two, one], model=model, batch_size=2)
        with monkeypatch.context() as patched, pytest.raises(Stop):
            stop_after(patched, 2)
            profile(structure, [one, two], model=model, batch_size=2, state=state)
        said: list[str] = []
        same(profile(structure, [two, one], model=model, batch_size=2, state=state, say=said.append), expected)
    assert said == [f"starting over: {state} was made from other inputs, corpora differs"]


@pytest.mark.parametrize("damage", ["state", "hidden"])
def test_a_damaged_state_is_not_used(structure: Structure, tmp_path: Path, monkeypatch, damage: str) -> None:
    expected, state = profile(structure, corpora(), batch_size=2), tmp_path / "state"
    with streamed(structure) as stream:
        with monkeypatch.context() as patched, pytest.raises(Stop):
            stop_after(patched, 2)
            profile(structure, corpora(), model=stream, batch_size=2, state=state)
        file = state / FILE if damage == "state" else state / "hidden-1.1"
        content = bytearray(file.read_bytes())
        content[len(content) // 2 if damage == "hidden" else 20] ^= 255
        file.write_bytes(content)
        same(profile(structure, corpora(), model=stream, batch_size=2, state=state), expected)


def test_a_file_that_vanishes(structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names it; with the file back, the pass goes on."""
    folder, away, save = tmp_path / "m", tmp_path / "away", State.save
    shutil.copytree(structure.checkpoint.path, folder)
    made, shard = read_structure(folder), folder / "model.safetensors"

    def vanishing(self: State, *args: object, **kwargs: object) -> None:
        save(self, *args, **kwargs)
        shard.rename(away)
        stream.weights.close()  # what it had not opened yet, it does not find any more

    with streamed(made) as stream:
        with monkeypatch.context() as patched:
            patched.setattr(State, "save", vanishing)
            with pytest.raises(MoecoverError, match=r"model\.safetensors cannot be read at byte .*: No such file"):
                profile(made, corpora(), model=stream, batch_size=2, state=tmp_path / "state")
        away.rename(shard)
        said: list[str] = []
        again = profile(made, corpora(), model=stream, batch_size=2, state=tmp_path / "state", say=said.append)
    assert said == [f"resuming: 1 of {len(stream.layers)} layers are done"]
    same(again, profile(made, corpora(), batch_size=2))


def test_a_read_error_in_the_middle(structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line; what was done stays and is used."""
    from moecover.runtime import weights

    real, calls = weights.os.preadv, [0]

    def failing(*args: object) -> int:
        calls[0] += 1
        if calls[0] == 60:
            raise OSError(5, "Input/output error")
        return real(*args)

    monkeypatch.setattr(weights.os, "preadv", failing)
    with streamed(structure) as stream:
        with pytest.raises(MoecoverError, match="cannot be read at byte .*: Input/output error"):
            profile(structure, corpora(), model=stream, batch_size=2, state=tmp_path / "state")
        said: list[str] = []
        made = profile(structure, corpora(), model=stream, batch_size=2, state=tmp_path / "state", say=said.append)
    assert "layers are done" in said[0]
    same(made, profile(structure, corpora(), batch_size=2))


KILLED = """
import sys, time
from moecover.cli import main as cli
from moecover.runtime import cost as fitting
from moecover.runtime import pass_state as states
fitting.OVERHEAD = 0
save = states.State.save
def slowly(self, *args, **kwargs):
    time.sleep(0.05)
    save(self, *args, **kwargs)
    print("saved", flush=True)
states.State.save = slowly
sys.exit(cli.main(sys.argv[1:]))
"""


def kill_and_go_on(kills: Sequence[tuple[int, float]], way: str, tmp_path: Path, folder: Path) -> None:
    """Kill a profile again and again, then let it end: the same as uninterrupted.

    Each kill comes so many seconds after so many saved states.
    """
    rows = tmp_path / "rows.jsonl"
    count = 20 if way == "layers" else 10 + 3 * len(kills)
    rows.write_text("".join(json.dumps({"input_ids": list(range(i, i + 30))}) + "\n" for i in range(count)))
    command = ["profile", str(folder), "--corpus", f"r={rows}", "--batch-size", "2"]
    if way == "layers":
        limit = limit_between(read_structure(folder), tokens=600, batch_tokens=60, head=False)
        command += ["--memory-limit", str(limit)]
    assert cli.main([*command, "-o", str(tmp_path / "once")]) == 0
    command += ["-o", str(tmp_path / "out")]
    state = tmp_path / ".out.profile.partial"
    for saves, delay_s in kills:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(saves)]
        time.sleep(delay_s)
        process.kill()
        process.wait()
        if lines[0].startswith(b"saved") and not (tmp_path / "out" / "profile.safetensors").exists():
            assert state.exists()
    if not (tmp_path / "out" / "profile.safetensors").exists():
        assert cli.main([*command]) == 0
    same(Profile.load(tmp_path / "out"), Profile.load(tmp_path / "once"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"profile.safetensors"}


@pytest.mark.parametrize("way", [pytest.param("memory", marks=pytest.mark.slow), "layers"])
def test_killed_in_the_middle(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kill_and_go_on` holds that the resumed profile has the same bytes."""
    monkeypatch.setattr(fitting_module, "OVERHEAD", 0)
    make_checkpoint(tmp_path / "m", "qwen2_moe", num_hidden_layers=8)
    kill_and_go_on([(2, 0.0)], way, tmp_path, tmp_path / "m")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["memory", "layers"])
def test_killed_at_fifty_random_moments(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kill_and_go_on` holds that the resumed profile has the same bytes."""
    monkeypatch.setattr(fitting_module, "OVERHEAD", 0)
    make_checkpoint(tmp_path / "m", "qwen2_moe", num_hidden_layers=100)
    rng, longest_s = random.Random(way), 0.3 if way == "memory" else 0.1
    kill_and_go_on([(1, rng.random() * longest_s) for _ in range(50)], way, tmp_path, tmp_path / "m")
