"""The registry of methods: the facts of the built-in ones, and methods and saliencies that a plugin brings along."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moecover.cli.main import main
from moecover.errors import InputError
from moecover.planning.artifact import Plan
from moecover.planning.explaining.facts import explain
from moecover.planning.method import RESOURCES
from moecover.planning.methods import METHODS, baseline_method, default_method, options_of_all
from moecover.planning.methods.c_prune import CLUSTERS
from moecover.planning.options import MODE, PROTECT, RESERVE, SALIENCY, SEARCH, SEED, WEIGHTS, Option
from moecover.planning.run import plan, plan_budgets
from moecover.planning.saliency import SALIENCIES, utility_of
from moecover.profiling.artifact import Profile
from moecover.registry import load_plugin

PLUGIN = '''
from moecover import METHODS, SALIENCIES
from moecover.planning.options import SALIENCY, Option
from moecover.planning.saliency import utility_of
from moecover.planning.selection import layer_plan, ranked

@SALIENCIES("busiest", paper="none")
def busiest(s):
    """Tokens, again."""
    return s["count"].astype(float)

floor = Option("floor", "least share", parse=float, check=lambda v: None if v >= 0 else "is out of range: 0 or more")

@METHODS("mine", label="Mine", paper="nowhere", options=(SALIENCY, floor))
def mine(profile, budget, *, saliency="busiest", floor=0.25, extra=None):
    """Ranks by my saliency.

    And more.
    """
    utility = utility_of(saliency, profile.pooled())
    plans = []
    for layer, order in enumerate(ranked(utility).tolist()):
        room = budget.room(layer)
        plans.append(layer_plan(profile, layer, room, room.fill(order)))
    return plans
'''


@pytest.fixture
def family() -> str:
    return "qwen2_moe"


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a plugin enters is gone after the test."""
    with METHODS.restored(), SALIENCIES.restored():
        yield


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    return path


def test_there_is_one_default_and_one_baseline() -> None:
    assert [m.name for m in METHODS.values() if m.default] == [default_method().name]
    assert [m.name for m in METHODS.values() if m.baseline] == [baseline_method().name]
    assert baseline_method().blind
    assert baseline_method().seeded


@pytest.mark.parametrize("name", METHODS)
def test_the_options_of_a_method_are_the_keywords_of_its_function(name: str) -> None:
    method = METHODS[name]
    keywords = inspect.signature(method.function).parameters
    own = {n: p.default for n, p in keywords.items() if p.kind is p.KEYWORD_ONLY and n not in RESOURCES}
    assert {option.name: option.default for option in method.options} == own
    assert method.runs_experts == ("model" in keywords)
    assert method.summary == (method.function.__doc__ or "").split("\n")[0]
    for option in method.options:
        assert option.help
        assert option.check(option.default) is None or option.mapping


def test_options_are_shared() -> None:
    """Methods with the same option have the same object, so that its flag means the same for all of them."""
    found = {option.name: (option, names) for option, names in options_of_all()}
    assert [option for option, _ in found.values()] == [
        SALIENCY,
        PROTECT,
        RESERVE,
        WEIGHTS,
        SEED,
        MODE,
        SEARCH,
        CLUSTERS,
    ]
    for option, names in found.values():
        assert names == [m.name for m in METHODS.values() if m.has(option.name)]
        assert all(option is own for n in names for own in METHODS[n].options if own.name == option.name)


def test_labels() -> None:
    assert METHODS.label("pooled") == "pooled"
    assert METHODS.label("pooled", "reap") == "REAP"
    assert METHODS.label("expert-sparsity") == "ExpertSparsity"
    assert METHODS.label("of an old run") == "of an old run"


def test_the_registry_needs_no_heavy_library() -> None:
    """The command line's help reads it."""
    code = (
        "import sys, moecover.planning.methods; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_method_of_a_plugin_is_known_everywhere(
    plugin: Path, small_profile: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In `plan`, `explain`, `ls` and `options_of_all`, from its file alone."""
    folder, out = tmp_path / "profile", tmp_path / "plan.json"
    small_profile.save(folder)
    assert main(["ls", "methods", "--plugin", str(plugin)]) == 0
    assert "Ranks by my saliency." in capsys.readouterr().out
    assert main(["ls", "saliencies", "--plugin", str(plugin)]) == 0
    assert "Tokens, again." in capsys.readouterr().out
    keep = str(small_profile.topology.num_experts - 1)
    use = ["plan", str(folder), "--plugin", str(plugin), "--method", "mine", "--keep", keep, "-o", str(out)]
    assert main([*use, "--option", "floor=0.5", "--saliency", "frequency"]) == 0
    assert json.loads(out.read_text())["options"] == {"saliency": "frequency", "floor": 0.5}
    assert main(["explain", str(out), "--profile", str(folder), "--plugin", str(plugin)]) == 0
    assert "mine (saliency frequency, floor 0.5) keeps" in capsys.readouterr().out
    method = METHODS["mine"]
    assert (method.label, method.paper, method.summary) == ("Mine", "nowhere", "Ranks by my saliency.")
    assert (method.blind, method.runs_experts, method.together, method.seeded) == (False, False, False, False)
    assert list(METHODS)[-1] == "mine"
    names = {option.name: methods for option, methods in options_of_all()}
    assert names["floor"] == names["extra"] == ["mine"]
    assert names["saliency"][-1] == "mine"


def test_the_options_of_a_plugin_are_checked_and_defaulted(plugin: Path, small_profile: Profile) -> None:
    load_plugin(plugin)
    assert plan(small_profile, method="mine", retain=1.0).options == {"saliency": "busiest", "floor": 0.25}
    with pytest.raises(InputError, match="^floor=-1 is out of range: 0 or more$"):
        plan(small_profile, method="mine", retain=1.0, floor=-1)
    with pytest.raises(InputError, match="unknown saliency 'bussiest'. Did you mean busiest"):
        plan(small_profile, method="mine", retain=1.0, saliency="bussiest")


def test_options_of_other_kinds(small_profile: Profile) -> None:
    """A keyword without a default must be given; a declared option must be a keyword; a mapping is by corpus."""

    @METHODS("needs", paper="none", options=(Option("mix", mapping=True),))
    def needs(profile: Profile, budget: object, *, level: int, mix: object = None) -> None:
        """Never called."""

    with pytest.raises(InputError, match="^method needs needs level$"):
        plan(small_profile, method="needs", retain=1.0)
    with pytest.raises(InputError, match="^unknown corpus in mix 'z'. Known: a, b$"):
        plan(small_profile, method="needs", retain=1.0, level=1, mix={"z": 1})
    with pytest.raises(InputError, match="^mix=3 is not by corpus: give a value for each corpus by name$"):
        plan(small_profile, method="needs", retain=1.0, level=1, mix=3)
    with pytest.raises(InputError, match="declares option roof, which its function does not take by keyword"):
        METHODS("wrong", paper="none", options=(Option("roof"),))(lambda profile, budget: [])


def test_a_method_for_all_budgets_must_give_one_choice_each(small_profile: Profile) -> None:
    METHODS("few", paper="none", together=True)(lambda profile, budgets: [])
    with pytest.raises(InputError, match="method few gives no list of 1 lists of LayerPlan, one per budget"):
        plan_budgets(small_profile, method="few", keeps=[small_profile.topology.num_experts])


def test_plans_and_explanations_show_themselves(small_profile: Profile) -> None:
    made = plan(small_profile, retain=1.0)
    experts, layers = small_profile.topology.num_experts, len(small_profile.topology.decoder_layers)
    assert repr(made).startswith(f"<Plan tb-coverage, keep {experts} experts in each of {layers} MoE layers of ")
    assert str(made) == repr(made)
    assert len(repr(made)) < 200
    assert [row["decoder layer"] for row in made.rows_shown()] == list(small_profile.topology.decoder_layers)
    assert Plan.from_json(made.to_json()) == made
    facts = explain(made, profile=small_profile)
    assert repr(facts) == f"<Explanation tb-coverage, keep {experts} of {experts}: utility kept a 100.0%, b 100.0%>"
    assert [row["a"] for row in facts.rows_shown()] == pytest.approx([1.0] * layers)
    assert json.loads(json.dumps(facts))["overall"] == facts["overall"]
    assert facts.text(layers=True).count("\n") > layers


def test_reserved_places_go_to_what_few_tokens_need(small_profile: Profile) -> None:
    keep, experts = 6 if small_profile.topology.num_experts > 6 else 4, small_profile.topology.num_experts
    rare = np.argsort(-utility_of("reap", small_profile.pooled()), axis=1, kind="stable")
    plain = plan(small_profile, keep=keep)
    assert "reserve" not in plain.options
    found = plan(small_profile, keep=keep, reserve=0.34)
    assert found.options["reserve"] == 0.34
    places = int(0.34 * keep + 0.5)
    for row, best in zip(found.layers, rare, strict=True):
        assert set(best[:places].tolist()) <= set(row.kept)
        assert row.filled[:places] == best[:places].tolist()
    everything = plan(small_profile, keep=keep, reserve=1.0)
    reap = plan(small_profile, method="pooled", saliency="reap", keep=keep)
    assert everything.kept == reap.kept
    assert experts > keep
    with pytest.raises(InputError, match="reserve=2 is out of range"):
        plan(small_profile, keep=keep, reserve=2)
