"""One shot: what an interrupted run has finished, and weights that changed since they were profiled."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moecover.checkpoints.structure import read_structure
from moecover.files.hashing import file_hash
from moecover.profiling.artifact import Profile
from tests.support.command_line import run
from tests.support.grids import write_text_file

LENGTH, TEXT = ("--length", 16), ("--sequences", 4, "--length", 16)


@pytest.fixture
def model(checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    """A model and two corpora in a folder of their own."""
    shutil.copytree(checkpoints("qwen3_moe"), tmp_path / "model")
    for number, name in enumerate("ab"):
        write_text_file(tmp_path / f"{name}.jsonl", number, words=240)
    return tmp_path / "model"


def one_shot(model: Path, *more: object, sequences: int = 4) -> list[object]:
    """A one-shot command that saves its profile."""
    at = model.parent
    text = ("--corpus", f"a={at / 'a.jsonl'}", "--sequences", sequences, *LENGTH)
    return ["prune", model, *text, "--keep", 4, "-o", at / "out", "--save-profile", at / "p", *more]


def test_a_run_that_was_killed_after_its_profile_resumes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = model.parent
    assert run(capsys, *one_shot(model))[0] == 0
    written = {name: file_hash(at / "out" / name) for name in ("model.safetensors", "config.json")}
    before = (at / "p" / "profile.safetensors").stat().st_mtime_ns
    shutil.rmtree(at / "out")  # as if it had been killed before the checkpoint was written
    status, _, err = run(capsys, *one_shot(model))
    assert status == 0, err
    assert f"resuming: the profile in {at / 'p'} is done" in err
    assert (at / "p" / "profile.safetensors").stat().st_mtime_ns == before
    assert {name: file_hash(at / "out" / name) for name in written} == written


@pytest.mark.parametrize(
    "change, more, says",
    [
        ({"sequences": 3}, [], "another calibration text"),
        ({}, ["--batch-size", 1], "another batch size"),
        ({}, ["--dtype", "bfloat16"], "another dtype"),
    ],
)
def test_a_profile_of_something_else_is_not_taken(
    model: Path, change: dict[str, int], more: list[object], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, *one_shot(model))[0] == 0
    shutil.rmtree(model.parent / "out")
    status, _, err = run(capsys, *one_shot(model, *more, **change))
    assert status == 2
    assert says in err
    assert not (model.parent / "out").exists()
    assert run(capsys, *one_shot(model, *more, "--overwrite", **change))[0] == 0


def test_a_profile_of_other_corpora_is_refused_before_any_work(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = model.parent
    assert run(capsys, "profile", model, "--corpus", f"b={at / 'b.jsonl'}", *TEXT, "-o", at / "p")[0] == 0
    status, _, err = run(capsys, *one_shot(model))
    assert (status, err.count("\n")) == (2, 1)
    assert "profile.safetensors exists. Choose another folder" in err


def test_weights_that_changed_since_the_profile_are_noted(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = model.parent
    assert run(capsys, "profile", model, "--corpus", f"a={at / 'a.jsonl'}", *TEXT, "-o", at / "p")[0] == 0
    assert run(capsys, "plan", at / "p", "--keep", 4, "-o", at / "plan.json")[0] == 0
    assert "model.safetensors" in Profile.load(at / "p").model["files"]
    prune = ["prune", model, "--plan", at / "plan.json", "-o"]
    assert "since the profile" not in run(capsys, *prune, at / "same")[2]
    stat = (model / "model.safetensors").stat()
    os.utime(model / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    status, _, err = run(capsys, *prune, at / "changed")
    assert status == 0
    assert "model.safetensors of" in err
    assert re.search(r"48 expert tensors of decoder layers \d to \d may not be those that were profiled", err)


@pytest.mark.parametrize("repair", [(), ("--repair", "ridge")])
@pytest.mark.parametrize(
    "layers, says",
    [
        ([[0, 1]], "the plan has decoder layers"),
        ([[0, 1], [0, 99]], "keeps expert 99. Allowed: 0 to 7"),
        ([[0, 1], [0]], "keeps 1 experts, `keep` is 2"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    model: Path, repair: tuple[str, ...], layers: list[list[int]], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    at = model.parent
    decoder_layers = read_structure(model).topology.decoder_layers
    rows = [{"decoder_layer": d, "kept": ids} for d, ids in zip(decoder_layers, layers, strict=False)]
    (at / "plan.json").write_text(json.dumps({"schema": 1, "keep": 2, "layers": rows}))
    text = ("--corpus", f"a={at / 'a.jsonl'}", *TEXT) if repair else ()
    status, _, err = run(capsys, "prune", model, "--plan", at / "plan.json", "-o", at / "out", *repair, *text, "-q")
    assert (status, err.count("\n")) == (2, 1)
    assert says in err
    assert not (at / "out").exists()


@pytest.mark.parametrize("name", ["pooled", "a\x1b[31m", " ", "x" * 200])
def test_names_that_no_corpus_can_have(name: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = model.parent
    status, _, err = run(capsys, "profile", model, "--corpus", f"{name}={at / 'a.jsonl'}", "-o", at / "p")
    assert (status, err.count("\n")) == (2, 1)
    assert "Choose another name" in err
    assert err.strip().isprintable()
    assert not (at / "p").exists()
