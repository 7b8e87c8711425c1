"""Options that nothing would look at, or that are given twice, are refused, on the command line and in Python."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moecover
from moecover.errors import InputError
from moecover.planning.artifact import Plan
from moecover.profiling.artifact import Profile
from tests.conftest import hand_plan, random_corpus, write_rows
from tests.support.command_line import run

METHOD = """
from moecover.planning.method import METHODS
from moecover.planning.methods.random import random

@METHODS("drawn", paper="test")
def drawn(profile, budget, {star}seed=0):
    \"\"\"Drawn at random.\"\"\"
    return random(profile, budget, seed=seed)
"""


@pytest.fixture(scope="module")
def place(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a link to a model, rows, a profile (with inputs), a plan and plugins."""
    folder = tmp_path_factory.mktemp("unused")
    (folder / "model").symlink_to(checkpoints("qwen2_moe"))
    rows = [{"input_ids": list(range(i, i + 30))} for i in range(9)]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "text.jsonl", [{"text": f"{i} The river rises in the hills. " * 9} for i in range(9)])
    corpora = [random_corpus("a", seed=1), random_corpus("b", seed=2)]
    made = moecover.profile(folder / "model", corpora, output=folder / "p", keep_inputs=96, progress=False)
    moecover.plan(made, keep=6, progress=False).save(folder / "plan.json")
    for name, star in (("keyword", "*, "), ("position", "")):
        (folder / f"{name}.py").write_text(METHOD.format(star=star).replace("drawn", f"drawn-{name}", 1))
    return folder


PLAN = "plan {p}/p -o {o}/plan.json --retain 0.5"
ONE_SHOT = "prune {p}/model --corpus r={p}/rows.jsonl --retain 0.5 -o {o}/cut"
BY_PLAN = "prune {p}/model --plan {p}/plan.json -o {o}/cut"
EVALUATE = "evaluate {p}/model -o {o}/e --perplexity t={p}/text.jsonl --windows 1"
REFUSED = {
    f"{PLAN} --weight a=1 --weight a=3": "--weight a=3: a has the value 1 already. Give it once",
    f"{PLAN} --retain 0.25": "--retain is given twice. Give it once",
    f"{PLAN} --seed 3": "--seed is no option of method tb-coverage",
    f"{PLAN} --option seed=3": "--seed is no option of method tb-coverage",
    f"{PLAN} --protect 0.2 --option protect=0.3": "--protect and --option protect=... give the same option",
    f"{PLAN} --option protect=0.2 --option protect=0.3": "--option protect=0.3: protect has the value 0.2 already",
    f"{PLAN} --method random --seed 3 --option seed=4": "--seed and --option seed=... give the same option",
    f"{EVALUATE} --served-name x": "--served-name goes with --endpoint, and there is none",
    f"{PLAN} --dtype float32": "--dtype has no use here: no model runs for --retain with method tb-coverage",
    f"{PLAN} --device cpu": "--device has no use here",
    f"{PLAN} --memory-limit 4GB": "--memory-limit has no use here",
    f"{PLAN} --revision main": "--revision has no use here",
    f"{PLAN} --bos never": "--bos goes with --max-perplexity-increase",
    f"{ONE_SHOT} --option seed=2": "--seed is no option of method tb-coverage",
    f"{ONE_SHOT} --length 64": "row 1: 30 tokens, --length 64 is asked for",
    f"{ONE_SHOT} --keep-inputs 60": "--keep-inputs has no use here: method tb-coverage runs no experts",
    f"{ONE_SHOT} --other-weights": "--other-weights goes with a plan",
    f"{ONE_SHOT} --dtype float32 --dtype bfloat16": "--dtype is given twice",
    f"{BY_PLAN} --bos never": "--plan and --bos exclude each other",
    "profile {p}/model --corpus r={p}/rows.jsonl --length 64 -o {o}/p": "row 1: 30 tokens, --length 64 is asked for",
    f"{EVALUATE} --limit 3": "--limit goes with --tasks, and there are none",
    f"{EVALUATE} --data-dir {{p}}": "--data-dir goes with --tasks, and there are none",
    f"{EVALUATE} --include-path {{p}}": "--include-path goes with --tasks, and there are none",
    "explain {p}/plan.json --change 0.1": "--change says what is stable, which a profile tells",
    "explain {p}/plan.json --overwrite": "--overwrite replaces figures: give -o DIR",
}


@pytest.mark.parametrize("command", list(REFUSED))
def test_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    status, _, err = run(capsys, *command.format(p=place, o=tmp_path).split())
    assert status == 2
    assert REFUSED[command] in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["keyword", "position"])
def test_the_seed_of_a_plugins_method(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """`--seed` in `plan` and one shot, `--option seed=` in both; in one shot `--seed` is the sample's too."""
    plugin = ["--plugin", place / f"{name}.py", "--method", f"drawn-{name}", "--retain", 0.5]
    seeds = {}
    for at, given in enumerate((["--seed", 2], ["--option", "seed=2"], ["--seed", 3], [])):
        path = tmp_path / f"{at}.json"
        assert run(capsys, "plan", place / "p", *plugin, *given, "-o", path)[0] == 0
        seeds[at] = Plan.load(path)
    assert [seeds[at].options["seed"] for at in seeds] == [2, 2, 3, 0]
    assert seeds[0].kept == seeds[1].kept != seeds[2].kept
    one = ["prune", place / "model", "--corpus", f"r={place / 'rows.jsonl'}", *plugin, "--sequences", 3]
    for at, given in enumerate((["--seed", 2], ["--option", "seed=2"], ["--seed", 5, "--option", "seed=2"])):
        output = tmp_path / f"cut-{at}"
        assert run(capsys, *one, *given, "-o", output)[0] == 0
        plan = json.loads((output / "moecover.json").read_text())["plan"]
        assert plan["options"]["seed"] == 2
        assert [layer["kept"] for layer in plan["layers"]] == seeds[0].kept


def test_python(place: Path, tmp_path: Path, checkpoints: Callable[..., Path]) -> None:
    """Functions refuse what the command line refuses."""
    model, structure = place / "model", moecover.read_structure(checkpoints("qwen2_moe"))
    live, plan, made = moecover.load_model(structure), Plan.load(place / "plan.json"), Profile.load(place / "p")
    loaded = random_corpus("a")
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("keep exclude", lambda: moecover.prune(model, plan, tmp_path / "o", keep=3)),
        ("method exclude", lambda: moecover.prune(model, plan, tmp_path / "o", method="pooled")),
        ("corpora has no use", lambda: moecover.prune(model, plan, tmp_path / "o", corpora=[loaded])),
        ("dtype has no use", lambda: moecover.prune(model, plan, tmp_path / "o", dtype="float32")),
        ("repair_tokens says", lambda: moecover.prune(model, plan, tmp_path / "o", repair_tokens=99)),
        (
            "dtype says how a model is opened",
            lambda: moecover.profile(structure, [loaded], model=live, dtype="float32"),
        ),
        ("seed says how text is read", lambda: moecover.profile(structure, [loaded], seed=3)),
        ("corpus a is given twice", lambda: moecover.profile(structure, [loaded, random_corpus("a", seed=1)])),
        ("there is no calibration text", lambda: moecover.profile(structure, [], seed=3)),
        ("there is no calibration text", lambda: moecover.prune(model, corpora=[], keep=6, output=tmp_path / "o")),
        ("is neither a text", lambda: moecover.profile(structure, [loaded, place / "rows.jsonl"])),
        ("dtype has no use here", lambda: moecover.plan(made, keep=6, dtype="float32")),
        ("memory_limit has no use here", lambda: moecover.plan(made, keep=6, memory_limit="4GB")),
        ("windows says how held-out text", lambda: moecover.evaluate(structure, texts=[loaded], windows=3)),
        ("limit goes with tasks", lambda: moecover.evaluate(structure, texts=[loaded], limit=3)),
        ("sequences says how text is read", lambda: moecover.split(model, loaded, tmp_path / "o", sequences=3)),
    ]
    for message, call in refused:
        with pytest.raises(InputError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


def test_verification_runs_the_corpora_that_it_is_given(place: Path, tmp_path: Path) -> None:
    structure = moecover.read_structure(place / "model")
    cut = moecover.prune(structure, hand_plan(structure, [list(range(8))] * 2), tmp_path / "cut", progress=False)
    found = moecover.verify(place / "model", cut, corpora=[random_corpus("web", sequences=2)], progress=False)
    assert (found.equal, found.corpora, found.tokens) == (True, ["web"], 48)


def test_a_sum_of_profiles_names_what_both_have(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = Profile.load(place / "p")
    about = {"c": [{**one.corpora["a"][0], "sha256": "other"}]}
    changed: dict[str, Any] = {"statistics": {"c": one.statistics["a"]}, "parts": {}, "corpora": about, "inputs": None}
    for name, settings in (("batch", {"batch_size": 99}), ("dtype", {"dtype": "float16"})):
        other = dataclasses.replace(one, **changed, settings={**one.settings, **settings})
        other.save((tmp_path / name).mkdir() or tmp_path / name)
    status, _, err = run(capsys, "merge", place / "p", tmp_path / "dtype", "-o", tmp_path / "sum")
    assert status == 2
    assert "profiles in different dtypes do not add up: float16 and float32" in err
    status, _, err = run(capsys, "merge", place / "p", tmp_path / "batch", "-o", tmp_path / "sum")
    assert status == 0
    assert "note: the profiles differ in batch size (4, 99), which the sum does not name" in err
    assert Profile.load(tmp_path / "sum").settings == {k: v for k, v in one.settings.items() if k != "batch_size"}


def test_a_memory_limit_of_a_search(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model runs layer by layer where the limit asks for it, and the plan is the same."""
    from moecover.planning.search import products
    from moecover.runtime import cost

    command = ["plan", place / "p", "--model", place / "model", "--method", "expert-sparsity", "--keep", 6]
    assert run(capsys, *command, "-o", tmp_path / "whole.json")[0] == 0
    monkeypatch.setattr(cost, "OVERHEAD", 0)
    monkeypatch.setattr(products, "CHUNK_BYTES", 2**16)
    structure = moecover.read_structure(place / "model")
    extra = products.peak_bytes(structure.topology, Profile.load(place / "p").inputs.num_tokens)
    made = cost.cost(structure, tokens=0, batch_tokens=48, limit=0, extra=extra)
    limit = (made.streamed + made.whole) // 2
    status, _, err = run(capsys, *command, "--memory-limit", limit, "-o", tmp_path / "parts.json")
    assert status == 0
    assert "running layer by layer" in err
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
