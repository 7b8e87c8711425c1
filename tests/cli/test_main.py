"""The command line as a user meets it: output, exit status, one-line errors, nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import moecover
from moecover.checkpoints.shipped import shipped_model
from moecover.cli import main as cli
from moecover.cli.main import main
from moecover.errors import InputError
from moecover.profiling.artifact import Profile
from tests.conftest import write_rows


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Token ids for a model without need of its tokenizer."""
    return write_rows(
        tmp_path / "rows.jsonl", [{"input_ids": [(7 * i + j * j) % 300 for j in range(30)]} for i in range(8)]
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command run in this process."""
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_the_verbs_in_order(checkpoints: Callable[..., Path], rows: Path, tmp_path: Path, capsys) -> None:
    model = checkpoints("qwen2_moe")
    status, out, _ = run(capsys, "inspect", model, "--json")
    assert (status, json.loads(out)["experts"]) == (0, 12)
    status, out, _ = run(
        capsys, "profile", model, "--corpus", f"a={rows}", "--corpus", f"b={rows}", "-o", tmp_path / "p", "--json"
    )
    assert status == 0
    assert json.loads(out)["shape"] == [2, 12]
    assert json.loads(out)["tokens"] == {"a": 240, "b": 240}
    status, out, _ = run(
        capsys, "plan", tmp_path / "p", "--method", "tb-coverage", "--retain", 0.5, "-o", tmp_path / "plan.json"
    )
    assert status == 0
    assert "protected per layer: 2 by a, 1 by b" in out
    before = (tmp_path / "plan.json").read_bytes()
    run(capsys, "plan", tmp_path / "p", "--retain", 0.5, "--seed", 7, "-o", tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == before  # nothing in this method is drawn by chance
    status, out, err = run(capsys, "prune", model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert (status, "6 of 12 experts" in out) == (0, True)
    shares = moecover.explain(tmp_path / "plan.json")["overall"]["kept_utility"]
    told = ", ".join(f"{name} {share:.1%}" for name, share in sorted(shares.items(), key=lambda one: one[1]))
    assert f"\nkept of each corpus's utility (contribution): {told}\nnext: moecover verify" in out
    assert "writing" in err
    assert "moecover prune" in (tmp_path / "out" / "README.md").read_text()
    status, out, _ = run(capsys, "verify", model, tmp_path / "out", "--json")
    assert (status, json.loads(out)["equal"], json.loads(out)["max_abs_difference"]) == (0, True, 0.0)
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    status, out, _ = run(capsys, "verify", model, tmp_path / "out", "--corpus", f"a={rows}")
    assert status == 1
    assert "NOT equal: files changed since they were written: tokenizer.json" in out


def test_servers_limits_are_said(checkpoints: Callable[..., Path], rows: Path, tmp_path: Path, capsys) -> None:
    model = checkpoints("qwen2_moe")
    status, out, _ = run(capsys, "inspect", model, "--for", "vllm", "--json")
    assert status == 0
    unmet = {s["keep"]: s["unmet"] for s in json.loads(out)["sizes"]}
    assert [line.split(":")[0] for line in unmet[6]] == [
        "vllm asks for a multiple of 4, at most 512",
        "vllm asks for a multiple of 8",
        "vllm asks for a power of two, or a multiple of 64",
    ]
    assert "unmet" not in json.loads(run(capsys, "inspect", model, "--json")[1])["sizes"][0]
    assert "sglang" in run(capsys, "inspect", model, "--for", "sglang")[1]
    out = run(capsys, "inspect", model, "--for", "llama.cpp")[1]
    assert "16 channels     8 channels" in out
    assert "a token computes  4 experts x 16 channels a layer" in out
    assert "llama.cpp asks for a multiple of 256: with 8 channels K-quants give" in out
    _, _, err = run(capsys, "prune", model, "--corpus", f"r={rows}", "--keep", 6, "-o", tmp_path / "6")
    assert f"note: 6 experts do not suit vllm, sglang, llama.cpp: moecover inspect {model} --keep 6" in err
    _, _, err = run(capsys, "prune", model, "--corpus", f"r={rows}", "--keep", 8, "-o", tmp_path / "8")
    assert "do not suit" not in err


def test_several_budgets_in_one_call(checkpoints: Callable[..., Path], rows: Path, tmp_path: Path, capsys) -> None:
    run(capsys, "profile", checkpoints("qwen2_moe"), "--corpus", f"a={rows}", "-o", tmp_path / "p")
    status, out, _ = run(capsys, "plan", tmp_path / "p", "--retain", "0.5,0.75", "-o", tmp_path / "plans", "--json")
    assert status == 0
    assert [(Path(row["plan"]).name, row["keep"]) for row in json.loads(out)] == [
        ("keep-6.json", 6),
        ("keep-9.json", 9),
    ]
    for keep in (6, 9):
        run(capsys, "plan", tmp_path / "p", "--keep", keep, "-o", tmp_path / "one.json")
        assert (tmp_path / "one.json").read_bytes() == (tmp_path / "plans" / f"keep-{keep}.json").read_bytes()
    for bad, message in (
        ("6,3", "top-k of 4"),
        ("6,6", "give every one once"),
        ("6,x", "invalid ints with commas value: '6,x'"),
    ):
        status, _, err = run(capsys, "plan", tmp_path / "p", "--keep", bad, "-o", tmp_path / "more")
        assert (status, message in err, (tmp_path / "more").exists()) == (2, True, False), err
    status, _, err = run(capsys, "plan", tmp_path / "p", "--keep", "6,9", "-o", tmp_path / "one.json")
    assert (status, "is a file. Give a folder for 2 plans" in err) == (2, True)


def test_expert_sparsity_in_three_steps_and_in_one_shot(
    checkpoints: Callable[..., Path], rows: Path, tmp_path: Path, capsys
) -> None:
    """The sample on disk and the one in memory give the same plan; the bytes on disk are said before the pass."""
    model = checkpoints("mixtral")
    common = ["--corpus", f"a={rows}", "--batch-size", 3, "--keep-inputs", 100]
    status, _, err = run(capsys, "profile", model, *common, "-o", tmp_path / "p")
    assert status == 0
    assert err.index("saving the inputs of 2 layers for 90 tokens: 23.04 kB") < err.index("profiling")
    assert 2 * 90 * 32 * 4 == 23040 < (tmp_path / "p" / "inputs.safetensors").stat().st_size
    plan = ["plan", tmp_path / "p", "--method", "expert-sparsity", "-o", tmp_path / "plan.json"]
    for extra, message in (
        ([], "give --model"),
        (["--model", checkpoints("olmoe")], "the profile is of another model"),
        (["--model", model, "--search", "fast"], "--search fast is unknown"),
    ):
        status, _, err = run(capsys, *plan, "--keep", 4, *extra)
        assert (status, message in err, (tmp_path / "plan.json").exists()) == (2, True, False), err
    status, out, _ = run(capsys, *plan, "--keep", 4, "--model", model)
    assert (status, "exhaustive search on 90 tokens, loss" in out) == (0, True)
    status, _, err = run(
        capsys, "prune", model, *common, "--method", "expert-sparsity", "--keep", 4, "-o", tmp_path / "out"
    )
    assert status == 0, err
    assert "exhaustive search on 90 tokens" in err
    manifest = json.loads((tmp_path / "out" / "moecover.json").read_text())
    assert manifest["plan"]["layers"] == json.loads((tmp_path / "plan.json").read_text())["layers"]
    run(capsys, "profile", model, "--corpus", f"a={rows}", "-o", tmp_path / "bare")
    status, _, err = run(
        capsys,
        "plan",
        tmp_path / "bare",
        "--method",
        "expert-sparsity",
        "--model",
        model,
        "--keep",
        4,
        "-o",
        tmp_path / "x",
    )
    assert (status, "holds no expert-layer inputs" in err) == (2, True)
    status, _, err = run(capsys, "plan", tmp_path / "p", "--model", model, "--keep", 4, "-o", tmp_path / "x")
    assert (status, "--model is no option of method tb-coverage" in err) == (2, True)


def test_planning_needs_no_model_and_no_torch(small_profile_folder: Path, tmp_path: Path) -> None:
    for command in (
        f"plan {small_profile_folder} --keep 4 --protect-super-experts -o {tmp_path}/plan.json",
        f"explain {tmp_path}/plan.json --profile {small_profile_folder}",
    ):
        code = (
            f"import sys; from moecover.cli.main import main\nassert main({command.split()!r}) == 0\nassert "
            "'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.fixture
def small_profile_folder(checkpoints: Callable[..., Path], rows: Path, tmp_path: Path, capsys) -> Path:
    assert run(capsys, "profile", checkpoints("mixtral"), "--corpus", f"a={rows}", "-o", tmp_path / "small")[0] == 0
    return tmp_path / "small"


def test_one_shot_equals_the_three_steps(checkpoints: Callable[..., Path], rows: Path, tmp_path: Path, capsys) -> None:
    model = checkpoints("olmoe")
    corpora = ["--corpus", f"a={rows}", "--corpus", f"b={rows}", "--batch-size", 3]
    run(capsys, "profile", model, *corpora, "-o", tmp_path / "p")
    run(capsys, "plan", tmp_path / "p", "--keep", 4, "-o", tmp_path / "plan.json")
    run(capsys, "prune", model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "three")
    status, _, _ = run(
        capsys, "prune", model, *corpora, "--keep", 4, "-o", tmp_path / "one", "--save-profile", tmp_path / "q"
    )
    assert status == 0
    assert Profile.load(tmp_path / "q").fingerprint == Profile.load(tmp_path / "p").fingerprint
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_text_goes_through_the_models_own_tokenizer(checkpoints: Callable[..., Path], tmp_path: Path, capsys) -> None:
    status, out, err = run(
        capsys,
        "profile",
        checkpoints("mixtral"),
        "--corpus",
        "web",
        "--length",
        32,
        "--sequences",
        4,
        "-o",
        tmp_path / "p",
    )
    assert status == 0, err
    assert "web: 128 tokens" in out
    record = Profile.load(tmp_path / "p").corpora["web"][0]
    assert record["length"] == 32
    assert len(record["sha256"]) == 64


def test_few_blocks_by_default_are_said(checkpoints: Callable[..., Path], tmp_path: Path, capsys) -> None:
    (tmp_path / "t.txt").write_text("A short text about a river.\n" * 30)
    status, _, err = run(
        capsys, "profile", checkpoints("mixtral"), "--corpus", f"t={tmp_path / 't.txt'}", "-o", tmp_path / "p"
    )
    assert status == 0
    assert "corpus t: only" in err
    assert "128 are usual" in err


CASES: list[tuple[str, list[str], str]] = [
    # id, arguments ({m} model, {r} rows, {t} folder), what the message must hold
    ("missing folder", ["profile", "{t}/none", "--corpus", "web", "-o", "{t}/o"], "no folder"),
    ("unknown corpus", ["profile", "{m}", "--corpus", "wikitxt", "-o", "{t}/o"], "Did you mean wikitext2"),
    ("empty corpus", ["profile", "{m}", "--corpus", "e={t}/empty.txt", "-o", "{t}/o"], "holds no text"),
    ("keep below top-k", ["prune", "{m}", "--corpus", "r={r}", "--keep", "3", "-o", "{t}/o"], "top-k of 4"),
    ("keep above E", ["prune", "{m}", "--corpus", "r={r}", "--keep", "13", "-o", "{t}/o"], "above the 12 experts"),
    ("retain 0", ["prune", "{m}", "--corpus", "r={r}", "--retain", "0", "-o", "{t}/o"], "--retain 0.0 is out of range"),
    ("retain 2", ["prune", "{m}", "--corpus", "r={r}", "--retain", "2", "-o", "{t}/o"], "--retain 2.0 is out of range"),
    (
        "both budgets",
        ["prune", "{m}", "--corpus", "r={r}", "--keep", "6", "--retain", ".5", "-o", "{t}/o"],
        "exactly one",
    ),
    ("no budget", ["prune", "{m}", "--corpus", "r={r}", "-o", "{t}/o"], "exactly one"),
    ("no plan, no corpus", ["prune", "{m}", "--retain", ".5", "-o", "{t}/o"], "give --plan PLAN, or --corpus"),
    (
        "plan and corpus",
        ["prune", "{m}", "--plan", "{t}/p", "--corpus", "web", "-o", "{t}/o"],
        "--plan and --corpus exclude each other",
    ),
    (
        "plan and protect 0",
        ["prune", "{m}", "--plan", "{t}/p", "--protect", "0", "-o", "{t}/o"],
        "--plan and --protect exclude each other",
    ),
    (
        "plan and dtype",
        ["prune", "{m}", "--plan", "{t}/p", "--dtype", "float32", "-o", "{t}/o"],
        "--plan and --dtype exclude each other",
    ),
    ("revision of a folder", ["inspect", "{m}", "--revision", "v1"], "--revision is for hub models"),
    ("no such user", ["inspect", "~nosuchuser/m"], "no folder ~nosuchuser/m"),
    (
        "file without a name",
        ["profile", "{m}", "--corpus", "notes.jsonl", "-o", "{t}/o"],
        "give it a name, as --corpus notes=notes.jsonl",
    ),
    ("no such plan", ["prune", "{m}", "--plan", "{t}/p", "-o", "{t}/o"], "no plan"),
    (
        "unknown method",
        ["prune", "{m}", "--corpus", "r={r}", "--retain", ".5", "--method", "randm", "-o", "{t}/o"],
        "Did you mean random",
    ),
    (
        "unknown saliency",
        ["prune", "{m}", "--corpus", "r={r}", "--retain", ".5", "--saliency", "reab", "-o", "{t}/o"],
        "Did you mean reap",
    ),
    ("no profile", ["plan", "{t}", "--retain", ".5", "-o", "{t}/o"], "holds no profile.safetensors"),
    ("verify nothing of ours", ["verify", "{m}", "{m}"], "was not written by `moecover prune`"),
    (
        "sequences 0",
        ["profile", "{m}", "--corpus", "web", "--sequences", "0", "-o", "{t}/o"],
        "--sequences 0 is out of range",
    ),
    (
        "batch size 0",
        ["profile", "{m}", "--corpus", "web", "--batch-size", "0", "-o", "{t}/o"],
        "--batch-size 0 is out of range",
    ),
    (
        "too many sequences",
        ["profile", "{m}", "--corpus", "r={r}", "--sequences", "9", "-o", "{t}/o"],
        "holds 8 rows, 9 are wanted",
    ),
    ("negative tolerance", ["verify", "{m}", "{m}", "--tolerance", "-1"], "--tolerance -1.0 is out of range"),
    ("ls of what", ["ls", "modles"], "invalid choice"),
    (
        "keep-inputs 0",
        ["profile", "{m}", "--corpus", "r={r}", "--keep-inputs", "0", "-o", "{t}/o"],
        "--keep-inputs 0 is out of range",
    ),
    (
        "keep-inputs below a sequence",
        ["profile", "{m}", "--corpus", "r={r}", "--keep-inputs", "29", "-o", "{t}/o"],
        "Give 30 or more",
    ),
    (
        "several keeps in one shot",
        ["prune", "{m}", "--corpus", "r={r}", "--keep", "4,6", "-o", "{t}/o"],
        "invalid int value: '4,6'",
    ),
    (
        "plan and weight",
        ["prune", "{m}", "--plan", "{t}/p", "--weight", "r=2", "-o", "{t}/o"],
        "--plan and --weight exclude each other",
    ),
    (
        "plan and super experts",
        ["prune", "{m}", "--plan", "{t}/p", "--protect-super-experts", "-o", "{t}/o"],
        "--plan and --protect-super-experts exclude",
    ),
    (
        "weight without a number",
        ["prune", "{m}", "--corpus", "r={r}", "--retain", ".5", "--weight", "r", "-o", "{t}/o"],
        "--weight r: give NAME=VALUE",
    ),
    (
        "weight of text",
        ["prune", "{m}", "--corpus", "r={r}", "--retain", ".5", "--weight", "r=much", "-o", "{t}/o"],
        "--weight r=much is out of range",
    ),
    (
        "weight of an unknown corpus",
        ["prune", "{m}", "--corpus", "r={r}", "--retain", ".5", "--weight", "q=2", "-o", "{t}/o"],
        "corpus in --weight 'q'",
    ),
    (
        "search for tb-coverage",
        ["prune", "{m}", "--corpus", "r={r}", "--retain", ".5", "--search", "greedy", "-o", "{t}/o"],
        "--search is no option of method tb-coverage",
    ),
    (
        "saliency for expert-sparsity",
        [
            "prune",
            "{m}",
            "--corpus",
            "r={r}",
            "--retain",
            ".5",
            "--method",
            "expert-sparsity",
            "--saliency",
            "reap",
            "-o",
            "{t}/o",
        ],
        "--saliency is no option of method expert-sparsity. It has: --mode, --search",
    ),
    ("explain nothing", ["explain", "{t}/p"], "no plan"),
    ("no such shipped model", ["demo", "--model", "qwen2-moe-tny", "-o", "{t}/o"], "Did you mean qwen2-moe-tiny"),
    ("no such server", ["inspect", "{m}", "--for", "tgi"], "invalid choice: 'tgi'"),
    ("no such plugin", ["ls", "methods", "--plugin", "{t}/x.py"], "no such Python file"),
]


@pytest.mark.parametrize("arguments, message", [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_bad_input_is_one_line_and_status_2(
    checkpoints: Callable[..., Path], rows: Path, tmp_path: Path, capsys, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("")
    before = sorted(tmp_path.iterdir())
    filled = [a.format(m=checkpoints("qwen2_moe"), r=rows, t=tmp_path) for a in arguments]
    status, out, err = run(capsys, *filled)
    assert status == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("moecover")
    assert sorted(tmp_path.iterdir()) == before


def test_bad_request_is_refused_before_the_model_is_loaded(
    checkpoints: Callable[..., Path], rows: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Fail before the long job: none of these may reach the forward pass."""
    from moecover.runtime import loading as model_module

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(model_module, "load_model", never)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("x")
    model = checkpoints("qwen2_moe")
    bad = [
        "--keep 3",
        "--retain 2",
        "--retain .5 --method x",
        "--retain .5 --protect 5",
        "--retain .5 --saliency x",
        "--retain .5 --method random --saliency reap",
        "--retain .5 --dtype float99",
        "--retain .5 --device nowhere",
        "--retain .5 --save-profile {t}/out",
        "--retain .5 --save-profile {t}/out/p",
        "--retain .5",
    ]
    for extra in (line.format(t=tmp_path).split() for line in bad):
        status, _, err = run(capsys, "prune", model, "--corpus", f"r={rows}", *extra, "-o", tmp_path / "out")
        assert status == 2, err
    assert "out exists" in err


def test_plan_of_another_model(checkpoints: Callable[..., Path], rows: Path, tmp_path: Path, capsys) -> None:
    run(capsys, "profile", checkpoints("mixtral"), "--corpus", f"r={rows}", "-o", tmp_path / "p")
    run(capsys, "plan", tmp_path / "p", "--keep", 4, "-o", tmp_path / "plan.json")
    status, _, err = run(capsys, "prune", checkpoints("olmoe"), "--plan", tmp_path / "plan.json", "-o", tmp_path / "o")
    assert (status, "made for another model" in err, "topologies differ" in err) == (2, True, True)
    sibling = checkpoints("mixtral", seed=1)
    status, _, err = run(capsys, "prune", sibling, "--plan", tmp_path / "plan.json", "-o", tmp_path / "o")
    assert (status, "the routers differ" in err) == (2, True)
    assert not (tmp_path / "o").exists()
    status, _, err = run(
        capsys, "prune", sibling, "--plan", tmp_path / "plan.json", "-o", tmp_path / "o", "--other-weights"
    )
    assert status == 0
    status, _, err = run(capsys, "verify", checkpoints("mixtral"), tmp_path / "o")
    assert (status, "was cut from" in err) == (2, True)


def test_existing_outputs(checkpoints: Callable[..., Path], rows: Path, tmp_path: Path, capsys) -> None:
    command = ["profile", checkpoints("mixtral"), "--corpus", f"r={rows}", "-o", tmp_path / "p"]
    assert run(capsys, *command)[0] == 0
    status, _, err = run(capsys, *command)
    assert (status, "profile.safetensors exists" in err) == (2, True)
    assert run(capsys, *command, "--overwrite")[0] == 0
    (tmp_path / "p" / "notes.txt").write_text("mine")
    assert run(capsys, *command, "--overwrite")[0] == 0
    assert (tmp_path / "p" / "notes.txt").read_text() == "mine"
    (tmp_path / "text.txt").write_text("The river rises in the hills. " * 40)
    text = ["--perplexity", f"t={tmp_path / 'text.txt'}", "--length", 16]
    command = ["evaluate", checkpoints("mixtral"), *text, "-o", tmp_path / "e"]
    assert run(capsys, *command)[0] == 0
    assert run(capsys, *command, "--overwrite")[0] == 0
    (tmp_path / "e" / "notes.txt").write_text("mine")
    status, _, err = run(capsys, *command, "--overwrite")
    assert (status, "e/notes.txt was not written by moecover" in err) == (2, True)


def test_inspect_says_what_would_be_refused(tmp_path: Path, checkpoints: Callable[..., Path], capsys) -> None:
    folder = tmp_path / "m"
    shutil.copytree(checkpoints("olmoe"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_group": 4}))
    status, out, _ = run(capsys, "inspect", folder)
    assert status == 1
    assert "refused" in out
    assert "4 groups for 8 experts" in out


@pytest.mark.parametrize("what", ["methods", "saliencies", "corpora", "families"])
def test_ls(what: str, capsys) -> None:
    status, out, _ = run(capsys, "ls", what, "--json")
    names = [row["name"] for row in json.loads(out)]
    assert status == 0
    assert {"methods": "tb-coverage", "saliencies": "reap", "corpora": "wikitext2", "families": "mixtral"}[
        what
    ] in names
    assert run(capsys, "ls", what)[1].count("\n") == len(names)


LARGE = {
    "torch",
    "transformers",
    "datasets",
    "huggingface_hub",
    "tokenizers",
    "accelerate",
    "safetensors",
    "matplotlib",
    "scipy",
    "rich",
    "pydantic",
    "numpy",
}


def loaded_by(*arguments: object) -> set[str]:
    """The large libraries that a command of its own process has loaded at its end."""
    code = f"""
import sys
from moecover.cli.main import main
try: status = main(sys.argv[1:])
except SystemExit as stop: status = stop.code
assert not status
print(*(name for name in {LARGE} if name in sys.modules), file=sys.stderr)
"""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return set(done.stderr.split("\n")[-2].split())


def test_help_is_quick_and_does_not_load_torch() -> None:
    assert loaded_by("--help") == loaded_by("--version") == loaded_by("prune", "--help") == set()


@pytest.mark.parametrize(
    ("what", "needed"),
    [("methods", set()), ("saliencies", {"numpy"}), ("corpora", set()), ("families", set())],
)
def test_lists_load_little(what: str, needed: set[str]) -> None:
    assert loaded_by("ls", what) == needed


def test_what_was_read_before_needs_no_torch(
    checkpoints: Callable[..., Path], rows: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was inspected once: inspect, plan, explain, prune by a plan."""
    monkeypatch.setenv("MOECOVER_CACHE", str(tmp_path / "cache"))  # not what other tests have read
    model, out = checkpoints("qwen3_moe"), tmp_path / "out"
    assert {"torch", "transformers"} <= loaded_by("inspect", model)
    assert loaded_by("inspect", model, "--for", "vllm") == set()
    run(capsys, "profile", model, "--corpus", f"a={rows}", "--corpus", f"b={rows}", "-o", tmp_path / "p")
    arithmetic = {"numpy", "pydantic", "safetensors"}
    assert loaded_by("plan", tmp_path / "p", "--keep", 4, "-o", tmp_path / "plan.json") == arithmetic
    explain = ["explain", tmp_path / "plan.json", "--profile", tmp_path / "p"]
    assert loaded_by(*explain) == {*arithmetic, "scipy", "rich"}
    assert loaded_by("prune", model, "--plan", tmp_path / "plan.json", "-o", out, "-q") == {"numpy", "pydantic"}
    assert run(capsys, "verify", model, out, "--corpus", f"r={rows}")[0] == 0


def test_public_names_exist_and_are_documented() -> None:
    for name in moecover.__all__:
        value = getattr(moecover, name)
        assert (value.__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = moecover.nonsense
    assert set(moecover.__all__) <= set(dir(moecover))


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "moecover", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_an_interrupt_that_comes_out_as_another_error_is_one(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Python raises a RuntimeError from one that falls into `__set_name__`, while a library is being imported."""

    def fail(args: object) -> None:
        class Interrupts:
            def __set_name__(self, owner: type, name: str) -> None:
                raise KeyboardInterrupt

        try:
            type("Owner", (), {"attribute": Interrupts()})
        except RuntimeError as error:
            raise InputError("could not be loaded") from error

    monkeypatch.setattr(cli.verb("inspect"), "run", fail)
    status, _, err = run(capsys, "inspect", "x")
    assert (status, err) == (130, "moecover: interrupted, nothing half-written was left\n")


# The writing has a test of its own below. A time behind a line is there for what comes between two of them.
@pytest.mark.parametrize(
    "line, delay_s",
    [
        ("reading", 0),
        ("loading", 0),
        *(pytest.param(*at, marks=pytest.mark.slow) for at in (("reading", 1), ("loading", 2), ("profiling", 0))),
    ],
)
def test_ctrl_c_leaves_nothing(tmp_path: Path, line: str, delay_s: float) -> None:
    """The signal comes behind a line that says what a one-shot run does now."""
    process = start(
        "prune",
        shipped_model(),
        "--corpus",
        "encyclopedia",
        "--corpus",
        "web",
        "--length",
        64,
        "--retain",
        0.5,
        "-o",
        tmp_path / "out",
    )
    assert process.stderr is not None
    assert any(said.startswith(line) for said in process.stderr)
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    if process.returncode == 0:  # it was quicker than the signal
        assert (tmp_path / "out" / "moecover.json").exists()
        return
    assert process.returncode == 130, err
    assert "interrupted" in err
    if "is kept in" in err or "Progress saved in" in err:  # the pass had begun, or its only shard was finished
        for left in tmp_path.glob(".out*.partial"):
            shutil.rmtree(left)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "number, finished",
    [
        (signal.SIGINT, 2),
        (signal.SIGTERM, 0),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in ((signal.SIGINT, 0), (signal.SIGTERM, 2))),
    ],
)
def test_a_signal_while_writing_keeps_what_is_finished(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys, number: signal.Signals, finished: int
) -> None:
    """The writer stands still in the middle of a shard, so that the signal surely comes there."""
    code = (
        "import json, sys, time\nfrom pathlib import Path\nfrom moecover.pruning import shards as checkpoint\n"
        "real, calls = checkpoint.write_shard, []\n"
        "def slow(source, target, *a):\n"
        "    calls.append(target); journal = target.parent.parent / 'journal.json'\n"
        f"    if len(calls) <= {finished}: return real(source, target, *a)\n"
        f"    while {finished} and not (journal.exists() and len(json.loads(journal.read_text())['finished']) "
        f"== {finished}): time.sleep(0.01)\n"
        "    real(source, target, *a); print('written', flush=True); time.sleep(20)\n"
        "checkpoint.write_shard = slow\nfrom moecover.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    keep = list(range(6))
    plan = {"schema": 1, "keep": 6, "layers": [{"decoder_layer": d, "kept": keep} for d in (1, 2)]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    model, partial = checkpoints("qwen2_moe", shards=True), tmp_path / ".out.partial"
    arguments = ["prune", str(model), "--plan", str(tmp_path / "plan.json"), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", ".out.partial", "plan.json"]
    status, _, err = run(capsys, *arguments)
    assert (status, err.splitlines()[-1]) == (
        2,
        f"moecover: {tmp_path / 'out'} is being written by another run. Wait until it ends, or choose another output",
    )
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert "Traceback" not in err
    left = [".out.partial"] if finished else []
    assert sorted(p.name for p in tmp_path.iterdir()) == [*left, "plan.json"]
    if number == signal.SIGINT:
        kept = f"Progress is saved in {partial}; rerun the same command to resume"
        assert err.endswith(f"moecover: interrupted. {kept if finished else 'Nothing was left behind'}\n")
    status, _, err = run(capsys, *arguments)
    assert status == 0
    assert (f"resuming: {finished} of " in err) == bool(finished)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "plan.json"]


def test_a_file_size_limit_in_the_middle_of_a_shard(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real write error from the system: the process may write no file above 60 kB. Python ignores SIGXFSZ."""
    plan = {"schema": 1, "keep": 8, "layers": [{"decoder_layer": d, "kept": list(range(8))} for d in (1, 2)]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    model, before = checkpoints("qwen2_moe"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        status, _, err = run(capsys, "prune", model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    assert "File too large" in err
    assert "Nothing was left behind" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json"]


def test_full_disk_while_writing_a_profile(
    checkpoints: Callable[..., Path], rows: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = run(capsys, "profile", checkpoints("mixtral"), "--corpus", f"r={rows}", "-o", tmp_path / "p")
    assert status == 1
    assert "No space left on device; free some space" in err
    assert not (tmp_path / "p").exists()


def test_a_closed_pipe_hides_no_failure(
    checkpoints: Callable[..., Path], pruned: Callable[..., Path], tmp_path: Path
) -> None:
    """`verify ... | true` must still say 1 when the files differ."""
    folder = tmp_path / "changed"
    shutil.copytree(pruned("mixtral"), folder)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    for arguments, expected in ((["verify", checkpoints("mixtral"), folder], 1), (["ls", "methods"], 0)):
        process = start(*arguments)
        process.stdout.close()
        process.stderr.close()
        assert process.wait(timeout=60) == expected


def test_unreadable_and_odd_outputs_are_one_line(
    checkpoints: Callable[..., Path], rows: Path, tmp_path: Path, capsys
) -> None:
    model = checkpoints("mixtral")
    assert run(capsys, "profile", model, "--corpus", f"r={rows}", "-o", tmp_path / "p")[0] == 0
    status, _, err = run(capsys, "plan", tmp_path / "p", "--keep", 4, "-o", tmp_path)
    assert (status, "is a folder, a file is to be written there" in err) == (2, True)
    (tmp_path / "file").write_text("x")
    status, _, err = run(capsys, "profile", model, "--corpus", f"r={rows}", "-o", tmp_path / "file")
    assert (status, "is a file. Give a folder" in err) == (2, True)
    status, _, err = run(capsys, "inspect", "x" * 300)
    assert (status in (1, 2), len(err.strip().splitlines())) == (True, 1)


def test_python_m_and_the_installed_command_are_the_same() -> None:
    script = Path(sys.executable).with_name("moecover")
    for command in ([sys.executable, "-m", "moecover"], [str(script)]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"moecover {moecover.__version__}\n"


def test_out_of_memory_is_one_line(
    checkpoints: Callable[..., Path], rows: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    from moecover.profiling import run as profiling

    def full(*args: object, **kwargs: object) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried ..."
        )

    monkeypatch.setattr(profiling, "in_memory", full)
    status, _, err = run(capsys, "profile", checkpoints("mixtral"), "--corpus", f"r={rows}", "-o", tmp_path / "p")
    assert (status, "not enough memory. Give a smaller --batch-size" in err) == (1, True)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_falls_into_a_destructor_is_not_lost(number: signal.Signals, status: int) -> None:
    """Python drops exceptions that are raised in `__del__`; the signal is delivered again."""
    code = (
        "import os, signal, sys, time\nfrom moecover import __main__\nfrom moecover.cli import main as cli\n"
        "class Dying:\n    def __del__(self):\n"
        f"        os.kill(os.getpid(), {int(number)}); [time.sleep(0.001) for _ in range(50)]\n"
        "def verb(args):\n    Dying(); time.sleep(5); print('went on'); return {}, '', 0\n"
        "cli.verb('ls').run = verb\nsys.argv = ['moecover', 'ls', 'methods']\nsys.exit(__main__.run())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert "went on" not in done.stdout


def test_an_interrupt_inside_an_exec_still_ends_with_130(tmp_path: Path) -> None:
    """Only `python -m` looks at the mark that such an interrupt leaves, so the test is a module."""
    (tmp_path / "marked.py").write_text(
        "import sys\nfrom moecover import __main__\nfrom moecover.cli import main as cli\n"
        "def verb(args):\n    exec('raise KeyboardInterrupt')\n"
        "cli.verb('ls').run = verb\nsys.argv = ['moecover', 'ls', 'methods']\nsys.exit(__main__.run())"
    )
    done = subprocess.run(
        [sys.executable, "-m", "marked"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 130
    assert done.stderr == "moecover: interrupted, nothing half-written was left\n"


def test_an_interrupt_is_held_back_and_then_raised() -> None:
    from moecover.signals import held

    steps = []
    with pytest.raises(KeyboardInterrupt), held():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        steps.append("went on")
    assert steps == ["went on"]
