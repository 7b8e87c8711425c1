"""A method in a file of the user's own is found everywhere, with no other edit: ls, plan, explain, compare, report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moecover.cli.main import main
from moecover.planning.methods import METHODS
from tests.support.grids import write_text_file

PLUGIN = '''
from moecover import METHODS, Option
from moecover.planning.selection import layer_plan


@METHODS("every-nth", label="Every n-th", paper="a test", options=(Option("step", "distance of the kept", parse=int),))
def every_nth(profile, budget, *, step=2):
    """Experts at equal distances."""
    plans = []
    for layer in range(len(profile.topology.decoder_layers)):
        room = budget.room(layer)
        order = sorted(range(budget.num_experts), key=lambda e: (e % step, e))
        plans.append(layer_plan(profile, layer, room, room.fill(order)))
    return plans
'''
METHOD, LABEL = "every-nth", "Every n-th"


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "mine.py").write_text(PLUGIN)
    with METHODS.restored():
        yield tmp_path / "mine.py"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_text_file(tmp_path / "text.jsonl", seed=0)


def test_a_method_of_the_user_is_found_everywhere(
    plugin: Path, corpus: Path, checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    model, text = checkpoints("qwen2_moe"), f"a={corpus}"
    assert METHOD in run("ls", "methods", "--plugin", plugin)
    run("profile", model, "--corpus", text, "--sequences", 4, "--length", 32, "-o", tmp_path / "p", "-q")
    plan = tmp_path / "plan.json"
    run("plan", tmp_path / "p", "--method", METHOD, "--option", "step=3", "--keep", 6, "--plugin", plugin, "-o", plan)
    kept = json.loads(plan.read_text())["layers"][0]["kept"]
    assert kept == [0, 1, 3, 4, 6, 9]
    explained = run("explain", plan, "--profile", tmp_path / "p", "--plugin", plugin)
    assert METHOD in explained
    methods = ["--method", METHOD, "--method", "tb-coverage"]
    texts = ["--corpus", text, "--sequences", 4, "--length", 32]
    texts += ["--perplexity", f"b={corpus}", "--window", 32, "--windows", 2]
    run("compare", model, *texts, *methods, "--keep", 6, "--plugin", plugin, "-o", tmp_path / "run", "-q")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert not results["failed"]
    assert LABEL in (tmp_path / "run" / "results.md").read_text()
    run("report", tmp_path / "run", "-o", tmp_path / "page.html", "--plugin", plugin, "-q")
    assert LABEL in (tmp_path / "page.html").read_text()
    with METHODS.restored():
        run("report", tmp_path / "run", "-o", tmp_path / "again.html", "-q")  # its label is in the run
    assert LABEL in (tmp_path / "again.html").read_text()
