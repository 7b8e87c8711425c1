"""Interrupted pruning that resumes: other inputs, a changing source, read errors and kills at any moment."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moecover.checkpoints.structure import Structure, read_structure
from moecover.cli.main import main
from moecover.errors import InputError, MoecoverError
from moecover.files.resumable import partial_folder
from moecover.pruning import shards as checkpoint_module
from moecover.pruning.writer import prune
from tests.conftest import hand_plan
from tests.support.folders import contents, names_in
from tests.support.tiny import make_checkpoint


def half(structure: Structure):
    topology = structure.topology
    return hand_plan(structure, [list(range(topology.num_experts // 2))] * len(topology.decoder_layers))


@pytest.fixture
def source(checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints("mixtral", shards=True), tmp_path / "m"))


def interrupted(structure: Structure, output: Path, *, mtp: str = "drop") -> list[str]:
    """Prune until two shards are finished; their names."""
    real, calls = checkpoint_module.write_shard, []

    def failing(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) > 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(*arguments)

    checkpoint_module.write_shard = failing  # type: ignore[assignment]
    try:
        with pytest.raises(MoecoverError, match=r"Input/output error\. Progress is saved in "):
            prune(structure, half(structure), output, mtp=mtp)
    finally:
        checkpoint_module.write_shard = real
    return names_in(partial_folder(output) / "files")


def test_prune_goes_on_where_it_stopped(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = read_structure(source)
    expected = contents(prune(structure, half(structure), tmp_path / "once"))
    done = interrupted(structure, tmp_path / "out")
    assert len(done) == 2
    before = {name: (tmp_path / ".out.partial" / "files" / name).stat().st_ino for name in done}
    (source / "tokenizer_config.json").write_text('{"changed": 1}')  # other files are always copied as they are now
    room, needed = shutil.disk_usage, structure.num_bytes(3) - sum((tmp_path / "once" / n).stat().st_size for n in done)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room(path)._replace(free=needed // 2))
    with pytest.raises(MoecoverError, match=r"needs 0.00 GB.*\. Progress is saved in"):
        prune(structure, half(structure), tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room(path)._replace(free=structure.num_bytes(3) - 2000))
    said: list[str] = []
    advanced: list[int] = []
    prune(structure, half(structure), tmp_path / "out", say=said.append, advance=advanced.append)
    assert said == [f"resuming: 2 of {len(structure.checkpoint.shard_metadata)} shards are there"]
    assert sum(advanced) == structure.num_bytes(3)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in done} == before
    found = contents(tmp_path / "out")
    assert found.pop("tokenizer_config.json") == b'{"changed": 1}'
    different = {name for name, content in found.items() if content != expected[name]}
    assert different == {"moecover.json"}


def another_header(source: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[0]
    save_file(load_file(shard), shard, metadata={"format": "pt", "more": "x"})


@pytest.mark.parametrize(
    "change, differs",
    [
        (
            lambda source: os.utime(sorted(source.glob("*.safetensors"))[1], ns=(1, 1)),
            r"model-00002-of-\d+.safetensors",
        ),
        (another_header, r"model-00001-of-\d+.safetensors"),
        (lambda source: (source / "config.json").write_text((source / "config.json").read_text() + " "), "config.json"),
        (lambda source: None, "--mtp"),
        (None, "the plan"),
    ],
)
def test_prune_of_other_inputs_starts_anew(
    source: Path, tmp_path: Path, change: Callable[[Path], object] | None, differs: str
) -> None:
    interrupted(read_structure(source), tmp_path / "out", mtp="prune" if differs == "--mtp" else "drop")
    if change:
        change(source)
    structure, said = read_structure(source), list[str]()
    plan = half(structure)
    if change is None:
        plan = hand_plan(structure, [[0, 1, 3]] * len(plan.layers))
    prune(structure, plan, tmp_path / "out", say=said.append)
    assert len(said) == 1
    assert re.fullmatch(rf"starting over: .*/.out.partial was made from other inputs, {differs} differs", said[0])
    assert contents(tmp_path / "out") == contents(prune(structure, plan, tmp_path / "once"))


def test_what_was_made_from_a_source_that_changes_is_not_kept(source: Path, tmp_path: Path) -> None:
    structure, shards = read_structure(source), sorted(source.glob("*.safetensors"))
    real, calls = checkpoint_module.write_shard, []

    def changing(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            os.utime(shards[2], ns=(1, 1))
        real(*arguments)

    checkpoint_module.write_shard = changing  # type: ignore[assignment]
    try:
        with pytest.raises(
            MoecoverError, match=r"changed while it was read. Run again when .*Nothing was left behind$"
        ):
            prune(structure, half(structure), tmp_path / "out")
    finally:
        checkpoint_module.write_shard = real
    assert names_in(tmp_path) == ["m"]


def test_a_read_error_in_the_middle_of_a_shard(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structure, real = read_structure(source), os.copy_file_range
    expected = contents(prune(structure, half(structure), tmp_path / "once"))
    calls: list[int] = []

    def failing(reader: int, writer: int, count: int, **options: int) -> int:
        calls.append(count)
        if len(calls) == 9:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(reader, writer, count, **options)

    monkeypatch.setattr(os, "copy_file_range", failing)
    message = r"^writing .*/out: .*/m/model-.* -> .*: Input/output error\. Progress is saved"
    with pytest.raises(MoecoverError, match=message):
        prune(structure, half(structure), tmp_path / "out")
    prune(structure, half(structure), tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_a_kill_between_the_two_renames_of_a_replacement(source: Path, tmp_path: Path) -> None:
    structure = read_structure(source)
    expected = contents(prune(structure, half(structure), tmp_path / "once"))
    shutil.copytree(tmp_path / "once", tmp_path / "out")
    (tmp_path / "out" / "old").write_text("x")
    interrupted_after_rename = tmp_path / ".out.partial"
    (interrupted_after_rename / "files").mkdir(parents=True)
    (tmp_path / "out").rename(interrupted_after_rename / "replaced")
    with pytest.raises(InputError, match="out exists"):
        prune(structure, half(structure), tmp_path / "out")
    assert (tmp_path / "out" / "old").read_text() == "x"
    (tmp_path / "out" / "old").unlink()
    prune(structure, half(structure), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == expected
    assert names_in(tmp_path) == ["m", "once", "out"]


# ------------------------------------------------------------------------------------------------------------ kills
def many_shards(folder: Path) -> Path:
    """A checkpoint of a tensor a shard: 127 of them, 32 MB."""
    make_checkpoint(
        folder, "qwen2_moe", hidden_size=256, moe_intermediate_size=256, shared_expert_intermediate_size=512
    )
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i:05}-of-{len(tensors):05}.safetensors" for i, name in enumerate(tensors, 1)}
    for name, shard in weight_map.items():
        save_file({name: tensors[name]}, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def kill_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str], times: int) -> tuple[int, int]:
    """Kill `moecover prune` at random moments and run it again; how often it was killed, and how often it went on."""
    model, plan_file, out = many_shards(tmp_path / "m"), tmp_path / "plan.json", tmp_path / "out"
    half(read_structure(model)).save(plan_file)
    arguments = ["prune", str(model), "--plan", str(plan_file), "-o", str(out)]

    def start() -> tuple[subprocess.Popen[str], float]:
        """The process and the time when it began to write."""
        process = subprocess.Popen(
            [sys.executable, "-m", "moecover", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        while process.poll() is None and not (partial_folder(out).exists() or out.exists()):
            time.sleep(0.0005)
        return process, time.monotonic()

    process, begun = start()
    while process.poll() is None and not out.exists():
        time.sleep(0.0005)
    writing_s = time.monotonic() - begun
    assert process.wait() == 0
    expected = contents(out)
    killed, resumed, chance = 0, 0, random.Random(0)
    for _ in range(4 * times):  # some end before they are killed
        if killed == times:
            break
        shutil.rmtree(out)
        process, _ = start()
        time.sleep(chance.uniform(0, writing_s))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        if out.exists():
            assert contents(out) == expected
            shutil.rmtree(partial_folder(out), ignore_errors=True)  # killed after the renaming: an empty one may stay
        else:
            capsys.readouterr()
            assert main(arguments) == 0
            resumed += "resuming: " in capsys.readouterr().err
            assert contents(out) == expected
            assert names_in(tmp_path) == ["m", "out", "plan.json"]
    return killed, resumed


def test_a_few_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed, _ = kill_and_resume(tmp_path, capsys, 2)
    assert killed == 2


@pytest.mark.slow
def test_kills_at_fifty_moments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed, resumed = kill_and_resume(tmp_path, capsys, 50)
    assert killed == 50
    assert resumed >= 10
