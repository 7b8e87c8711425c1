"""What the command says when it is not understood, and what it takes as people write it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from moecover.cli.demo import rows_from_json, table
from moecover.cli.ls import LISTS
from moecover.cli.main import VERBS, main
from moecover.cli.values import dtype, share
from moecover.comparison.config import Config
from moecover.terminal import WHOLE
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
        (
            ["prune", "m", "-o", "x", "--profile", "p"],
            "moecover: unknown option --profile: a profile is made a plan first",
        ),
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


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of the shipped model on little text."""
    folder = tmp_path_factory.mktemp("terminal") / "profile"
    text = ["--corpus", "web", "--corpus", "encyclopedia", "--sequences", "2", "--length", "16"]
    assert main(["profile", "shipped:qwen2-moe-tiny", *text, "--dtype", "fp32", "-q", "-o", str(folder)]) == 0
    return folder


def test_shares_and_dtypes_as_people_write_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, profile: Path
) -> None:
    assert [share(text) for text in ("0.5", "50%", "12.5%")] == [0.5, 0.5, 0.125]
    assert [dtype(text) for text in ("bf16", "fp16", "fp32", "float16", "auto")] == [
        *("bfloat16", "float16", "float32", "float16", "auto")
    ]
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
    monkeypatch.setenv("HF_ENDPOINT", "https://me:p@s/s@mirror.example/hub")
    assert json.loads(run(capsys, "env", "--json")[1])["HF_ENDPOINT"] == "https://mirror.example/hub"


def test_the_bars_of_libraries_can_be_turned_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that says "show them" would overrule transformers' own switch, which keeps its loading bar away."""
    for terminal, value in ((True, None), (False, "1")):
        monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
        monkeypatch.setattr("sys.stderr.isatty", lambda is_one=terminal: is_one)
        assert run(capsys, "ls", "merges")[0] == 0
        assert os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == value
    assert os.environ["PYTHONWARNINGS"] == "ignore"  # in the processes of --jobs N too


def test_completion_knows_verbs_and_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, _ = run(capsys, "completion", "bash")
    assert status == 0
    monkeypatch.setenv("COLUMNS", "80")
    assert run(capsys, "completion", "bash")[1] == out  # a script folds on no terminal
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


def long_lines(text: str) -> list[str]:
    """Lines that an 80-column terminal would break, but for commands and lines with a path that is long itself."""
    long = [line for line in text.splitlines() if len(line) > 80 and not WHOLE.search(line)]
    return [line for line in long if max(map(len, line.split())) < 40]


def test_nothing_is_wider_than_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, profile: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    model, texts = "shipped:qwen2-moe-tiny", ["encyclopedia-heldout", "web-heldout", "python-heldout"]
    heldout = [word for name in texts for word in ("--perplexity", name)]
    small = ["--windows", "1", "--length", "16", "--dtype", "float32"]
    verbs: list[list[object]] = [
        ["inspect", model],
        *(["inspect", model, "--for", server] for server in ("vllm", "llama.cpp", "mlx-lm")),
        ["inspect", model, "--keep", "15", "--width", "40"],
        ["plan", profile, "--retain", "0.5,0.25", "--width", "32,64", "-o", "plans"],
        ["explain", "plans/keep-15-width-32.json", "--profile", profile, "--layers"],
        *(["ls", what] for what in LISTS),
        ["env"],
        ["evaluate", model, "--plan", "plans/keep-15-width-32.json", *heldout, *small, "-o", "evaluated"],
        ["shrink", model, "--budget", "50%", "--corpus", "web", "--dry-run", "-o", "half"],
        ["prune", model, "--plan", "plans/keep-30.json", "-o", "pruned"],
    ]
    for words in verbs:
        status, out, err = run(capsys, *words)
        assert (status, long_lines(out), long_lines(err)) == (0, [], []), words
    rows = rows_from_json((Path(__file__).parents[2] / "docs" / "demo-results.json").read_text())
    assert long_lines(table(rows)) == []


def test_a_shape_comes_with_what_servers_ask_and_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "inspect", "shipped:qwen2-moe-tiny", "--retain", "50%")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert (status, "30 experts: 11.84 MB, 62% of the size now" in lines["asked"]) == (0, True)
    assert " ".join(lines["sglang"].split()) == "sglang asks of the experts a multiple of 8: --multiple-of 8 gives 32"
    assert "size by shape" not in out
    out = run(capsys, "inspect", "shipped:qwen2-moe-tiny", "--keep", "32", "--width", "40", "--json")[1]
    asked = json.loads(out)["asked"]
    assert {wish["server"]: wish["way"] for wish in asked["wishes"]} == {
        **{"vllm": [], "sglang": []},
        "llama.cpp": ["--width-multiple-of 32 gives 32"],
    }
    status, _, err = run(capsys, "inspect", "shipped:qwen2-moe-tiny", "--keep", "2")
    assert (status, "Allowed: --keep 4 to 60" in err) == (2, True)
