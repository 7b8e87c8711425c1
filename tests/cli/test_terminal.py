"""What the command says when it is not understood, and what it takes as people write it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moecover.cli.main import VERBS
from moecover.cli.values import dtype, share
from moecover.comparison.config import Config
from tests.support.command_line import run


def test_alone_it_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys)
    assert (status, err) == (0, "")
    assert all(f"\n    {verb}" in out for verb in VERBS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["prun"], "moecover: unknown verb 'prun'. Did you mean prune? Known: shrink, "),
        (["x\x1b[31m"], "moecover: unknown verb"),
        (["inspect", "m", "n", "o"], "moecover: 'n' is one argument too many"),
        (["prune", "m", "-o", "x", "--retian", "0.5"], "moecover: unknown option --retian. Did you mean --retain"),
        (["inspect", "m", "--zzz"], "moecover: unknown option --zzz. See `moecover inspect --help`"),
        (["prune", "m", "-o", "x", "--sparsity=0.5"], "moecover: unknown option --sparsity: say how much stays"),
        (["profile", "m", "-o", "x", "--max_seq_length", "9"], "moecover: unknown option --max_seq_length: blocks of"),
        (["prune", "m", "--output-dir", "half"], "moecover: unknown option --output-dir: the output is -o FOLDER"),
        (["prune", "--model-name", "m", "-o", "x"], "moecover: unknown option --model-name: the model is the first"),
        (["plan", "p", "-o", "x", "--model-name", "m"], "moecover: unknown option --model-name: the model is --model"),
        (["evaluate", "m", "-o", "x", "--sparsity", "0.5"], "moecover: unknown option --sparsity. Did you"),
        (["inspect", "shipped:qwen2-moe-tiny", "--revision", "v2"], "moecover: --revision is for hub models"),
    ],
)
def test_what_may_be_meant(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()


def test_shares_and_dtypes_as_people_write_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert [share(text) for text in ("0.5", "50%", "12.5%")] == [0.5, 0.5, 0.125]
    assert [dtype(text) for text in ("bf16", "fp16", "fp32", "float16", "auto")] == [
        *("bfloat16", "float16", "float32", "float16", "auto")
    ]
    profile, text = tmp_path / "profile", ["--corpus", "web", "--sequences", "2", "--length", "16"]
    assert run(capsys, "profile", "shipped:qwen2-moe-tiny", *text, "--dtype", "fp32", "-o", profile)[0] == 0
    status, out, _ = run(capsys, "plan", profile, "--retain", "50%", "-o", tmp_path / "plan.json", "--json")
    assert (status, json.loads(out)["keep"]) == (0, 30)
    status, _, err = run(capsys, "plan", profile, "--retain", "half", "-o", tmp_path / "other.json")
    assert (status, "value: 'half'" in err) == (2, True)


def test_a_shipped_model_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "inspect", "shipped:deepseek-moe-tiny", "--json")
    assert (status, json.loads(out)["family"]) == (0, "deepseek")
    status, _, err = run(capsys, "inspect", "shipped:qwen")
    assert status == 2
    assert "unknown shipped model 'qwen'. Did you mean" in err or "unknown shipped model 'qwen'. Known" in err


def test_the_log_goes_to_a_file_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log, text = tmp_path / "log", ["--corpus", "web", "--sequences", "2", "--length", "16"]
    for name in ("one", "two"):
        command = ["profile", "shipped:qwen2-moe-tiny", *text, "-o", tmp_path / name, "--log-file", log]
        status, _, err = run(capsys, *command, *(["-q"] if name == "two" else []))
        assert status == 0
    assert err == ""
    lines = log.read_text().splitlines()
    assert sum("profiling: 32 tokens in" in line for line in lines) >= 1
    assert all(line[:4].isdigit() and line[10] == " " for line in lines)
    assert run(capsys, "inspect", tmp_path / "gone", "--log-file", log)[0] == 2
    assert "no folder" in log.read_text().splitlines()[-1]
    status, _, err = run(capsys, "ls", "methods", "--log-file", tmp_path / "none" / "log")
    assert (status, "log cannot be written: No such file or directory" in err) == (2, True)


def test_env_names_what_computes_and_no_secret(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hf_secret@mirror.example/hub")
    status, out, _ = run(capsys, "env", "--json")
    found = json.loads(out)
    assert (status, found["HF_TOKEN"], found["HF_HUB_OFFLINE"]) == (0, "(set)", "1")
    assert found["HF_ENDPOINT"] == "https://mirror.example/hub"
    assert {"moecover", "torch", "transformers", "system", "memory free", "llama.cpp"} <= found.keys()
    assert "hf_secret" not in run(capsys, "env")[1]


def test_completion_knows_verbs_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "completion", "bash")
    assert status == 0
    assert "--retain-width" in out
    assert all(verb in out for verb in VERBS)


def test_init_writes_a_configuration_that_is_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    status, out, _ = run(capsys, "init", path)
    assert (status, f"next: moecover compare {path} -o run" in out) == (0, True)
    config = Config.model_validate(yaml.safe_load(path.read_text()))
    assert [model.name for model in config.models] == ["qwen2-moe-tiny"]
    assert "compare mine.yaml" in path.read_text()
    status, _, err = run(capsys, "init", path)
    assert (status, "mine.yaml exists. Choose another name, or give --overwrite" in err) == (2, True)


def test_a_shipped_model_that_the_wheel_lacks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "assets" / "models" / "qwen2-moe-tiny").mkdir(parents=True)
    monkeypatch.setattr("moecover.checkpoints.shipped.resources.files", lambda package: tmp_path)
    status, _, err = run(capsys, "inspect", "shipped:deepseek-moe-tiny")
    assert (status, "comes with the source, not with the wheel. Use qwen2-moe-tiny" in err) == (2, True)
