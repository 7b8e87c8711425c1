"""``--dry-run``: the refusals of the verb, what it would read, run and write, and nothing made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from moecover.files.hashing import sealed
from moecover.files.locks import claim as claimed
from moecover.pruning.job import prune
from moecover.rehearsal import rehearsed
from tests.conftest import write_rows
from tests.support.command_line import run
from tests.support.gguf_files import plan_for, write_gguf
from tests.support.tiny import TEXT


@pytest.fixture(scope="module")
def made(
    checkpoints: Callable[..., Path], pruned: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a model, a profile that can be searched on, a plan, a pruned checkpoint, text and a grid."""
    from moecover.cli.main import main

    folder = tmp_path_factory.mktemp("dry")
    (folder / "model").symlink_to(checkpoints("qwen2_moe"))
    (folder / "pruned").symlink_to(pruned("qwen2_moe"))
    write_rows(folder / "a.jsonl", [{"text": TEXT * 3}] * 8)
    text = ["--corpus", f"a={folder / 'a.jsonl'}", "--sequences", "4", "--length", "24"]
    profile = ["profile", str(folder / "model"), *text, "--keep-inputs", "48", "-q", "-o", str(folder / "profile")]
    assert main(profile) == 0
    assert main(["plan", str(folder / "profile"), "--keep", "6", "-q", "-o", str(folder / "plan.json")]) == 0
    write_rows(folder / "empty.jsonl", [{"id": 1}])
    (folder / "elsewhere").mkdir()
    note = {"model": "of another one", "quality": "default", "own_text": True}
    (folder / "elsewhere" / "shrink.json").write_text(json.dumps(sealed(note)))
    whole = write_gguf(folder / "a.gguf", "qwen2moe")
    prune(whole, plan_for([[0, 2, 4, 5]] * 2), folder / "b.gguf", progress=False)
    grid = {"models": ["model"], "calibration": [["a=a.jsonl"]], "sequences": 4, "length": 24, "methods": ["random"]}
    grid |= {"seeds": [0], "keep": [6], "perplexity": ["test=a.jsonl"], "window": 24, "windows": 4}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return folder


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are read."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("moecover.runtime.memory.load_model", refuse)


SHRINK = ["shrink", "model", "--budget", "50%", "-o", "new/half"]
TEXT_OPTIONS = ["--corpus", "a=a.jsonl", "--sequences", "4", "--length", "24"]
LONG = {
    "profile": (["profile", "model", *TEXT_OPTIONS, "-o", "new/p"], "new/p/profile.safetensors"),
    "search": (
        ["plan", "profile", "--method", "expert-sparsity", "--model", "model", "--keep", "6", "-o", "new/plan.json"],
        "new/plan.json",
    ),
    "bound": (
        [
            *("plan", "profile", "--max-perplexity-increase", "10%", "--model", "model"),
            *("--perplexity", "test=a.jsonl", "-o", "new/plan.json"),
        ],
        "new/plan.json",
    ),
    "plan": (["plan", "profile", "--keep", "6", "-o", "new/plan.json"], "new/plan.json"),
    "list": (["plan", "--from", "plan.json", "--model", "model", "-o", "new/plan.json"], "new/plan.json"),
    "export": (
        ["plan", "--from", "plan.json", "--model", "model", "--export", "kept", "-o", "new/list.json"],
        "new/list.json",
    ),
    "prune": (["prune", "model", "--plan", "plan.json", "-o", "new/half"], "new/half"),
    "repair": (
        ["prune", "model", "--plan", "plan.json", *TEXT_OPTIONS, "--repair", "ridge", "-o", "new/half"],
        "new/half",
    ),
    "one shot": (["prune", "model", *TEXT_OPTIONS, "--keep", "6", "-o", "new/half"], "new/half"),
    "evaluate": (
        ["evaluate", "model", "--plan", "plan.json", "--perplexity", "test=a.jsonl", "--length", "24", "-o", "new/e"],
        "new/e/evaluation.json",
    ),
    "compare": (["compare", "grid.yaml", "-o", "new/run"], "new/run"),
    "generate": (["generate", "model", "--sequences", "2", "--length", "24", "-o", "new/own.jsonl"], "new/own.jsonl"),
    "verify": (["verify", "model", "pruned"], ""),
    "verify bytes": (["verify", "a.gguf", "b.gguf"], ""),
    "shrink": (["shrink", "model", "--budget", "50%", "--corpus", "a=a.jsonl", "-o", "new/half"], "new/half"),
}

WITHOUT_PASS = {"prune", "plan", "list", "export"}


@pytest.mark.parametrize("name", LONG)
def test_it_tells_and_makes_nothing(
    name: str, made: Path, no_work: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    (command, output) = LONG[name]
    status, out, err = run(capsys, *command, "--dry-run", "--json")
    assert status == 0, err
    found = json.loads(out)
    kinds = [step["kind"] for step in found["steps"]]
    assert kinds == sorted(kinds, key=["read", "run", "write"].index)
    assert [Path(step["name"]).name for step in found["steps"] if step["kind"] == "write"][:1] == (
        [Path(output).name] if output else []
    )
    if name not in WITHOUT_PASS:
        assert any(step["kind"] == "read" and step["num_bytes"] for step in found["steps"])
        assert "run" in kinds
    assert (found["seconds"] is None) == (name in ("search", "verify bytes") or name in WITHOUT_PASS - {"prune"})
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


@pytest.mark.parametrize(
    "command",
    [
        ["profile", "model", "--corpus", "a=none.jsonl", "-o", "new"],
        ["profile", "model", *TEXT_OPTIONS, "-o", "profile"],
        ["profile", "model", *TEXT_OPTIONS, "--memory-limit", "1KB", "-o", "new"],
        ["prune", "model", "--plan", "plan.json", "-o", "pruned"],
        ["prune", "pruned", "--plan", "plan.json", "-o", "new"],
        ["evaluate", "model", "-o", "new"],
        ["generate", "model", "-o", "new.txt"],
        ["compare", "grid.yaml", "--method", "none", "-o", "new"],
        ["verify", "model", "model"],
        ["verify", "a.gguf", "none.gguf"],
        ["verify", "a.gguf", "model"],
        ["verify", "a.gguf", "a.gguf"],
        ["verify", "a.gguf", "b.gguf", "--libllama", "none.so"],
        [*SHRINK, "--corpus", "a=empty.jsonl"],
        [*SHRINK, "--corpus", "a=a.jsonl", "--work", "elsewhere"],
        ["shrink", "a.gguf", "--budget", "50%", "--libllama", "none.so", "-o", "new.gguf"],
    ],
)
def test_it_refuses_what_the_verb_refuses(
    command: list[str], made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    dry = run(capsys, *command, "-q", "--dry-run")
    assert dry == run(capsys, *command, "-q")
    assert dry[0] == 2


def test_a_locked_output_is_refused(
    made: Path, no_work: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    for name in ("half", "half-work"):
        release = claimed(made / f".{name}.lock")
        assert release is not None
        command = [*SHRINK[:-1], "half", "--corpus", "a=a.jsonl", "-q", "--dry-run"]
        status, _, err = run(capsys, *command)
        release()
        (made / f".{name}.lock").unlink()
        assert (status, f"{name} is being written by another run" in err) == (2, True)


def test_as_a_table(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(made)
    lines = run(capsys, *LONG["profile"][0], "-q", "--dry-run")[1].splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["read", "read", "run", "write", "all"]
    assert " ".join(lines[2].split()) == "read corpus a 96 tokens"
    with pytest.raises(RuntimeError, match="rehearsal.stop is missing"):
        rehearsed(lambda: None)
