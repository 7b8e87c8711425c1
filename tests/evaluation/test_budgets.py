"""A budget of bytes: whole experts, a shape by name, or of the shapes of equal bytes the one that loses least."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moecover import plan_for_budget
from moecover.checkpoints.structure import Structure, read_structure
from moecover.cli.main import main
from moecover.errors import InputError
from moecover.evaluation.run import evaluate
from moecover.evaluation.shape_search import LIKED, loss_of
from moecover.planning.run import plan
from moecover.profiling.artifact import Profile
from moecover.profiling.run import profile
from moecover.runtime.loading import load_model
from tests.conftest import random_corpus

WIDTH = 64  # of the experts: servers like it, so the widest shape wins where it is within noise of the best


@pytest.fixture(scope="module")
def source(checkpoints: Callable[..., Path]) -> Structure:
    return read_structure(checkpoints("qwen2_moe", moe_intermediate_size=WIDTH))


@pytest.fixture(scope="module")
def made(source: Structure) -> Profile:
    return profile(source, [random_corpus("a", seed=1), random_corpus("b", seed=2)], dtype="float32")


def test_the_shape_that_loses_least_is_found(made: Profile, source: Structure) -> None:
    texts = [random_corpus("a", seed=1, sequences=9)[6:], random_corpus("b", seed=2, sequences=9)[6:]]
    found = plan_for_budget(made, source, budget="50%", texts=texts, dtype="float32", progress=False)
    points = {(point["keep"], point["width"]): point for point in found.found["shapes"]}
    model, full = load_model(source, dtype="float32"), found.found["full"]
    for (keep, width), point in points.items():
        assert keep * width <= 0.5 * 12 * WIDTH
        again = plan(made, keep=keep, width=width)
        row = evaluate(source, {"x": again}, model=model, texts=texts, full=False).rows[0]
        gap = {name: result.nll - full[name] for name, result in row.perplexity.items()}
        assert point["gap"] == pytest.approx(gap, abs=1e-6)
        assert point["loss"] == pytest.approx((sum(gap.values()) + max(gap.values())) / 3, abs=1e-6)
        assert point["num_bytes"] == source.num_bytes(keep, width=width)
    best = min(points, key=lambda shape: points[shape]["loss"])
    chosen = found.keep, found.width or WIDTH
    assert chosen == best or chosen[1] % LIKED[-1] == 0
    assert loss_of([1.0, 3.0]) == pytest.approx(7 / 3)


def test_whole_experts_and_named_shapes_need_no_model(made: Profile) -> None:
    assert plan_for_budget(made, budget=0.5, shape="experts", progress=False).kept == plan(made, keep=6).kept
    thin = plan_for_budget(made, budget=0.5, shape="12x32", progress=False)
    assert (thin.keep, thin.width) == (12, 32)
    for options, says in (
        ({"budget": 0.5, "shape": "12x40"}, "beyond the budget"),
        ({"budget": 0.5}, "shape=auto measures shapes|measures shapes in the model"),
        ({"shape": "experts"}, "exactly one of budget"),
        ({"max_size": "1MB", "shape": "experts"}, "looks at the headers"),
        ({"budget": 0.3, "shape": "experts"}, "fewer whole experts than the router needs"),
    ):
        with pytest.raises(InputError, match=says):
            plan_for_budget(made, progress=False, **options)


def test_the_size_of_the_checkpoint_is_a_budget_too(made: Profile, source: Structure) -> None:
    most = source.num_bytes(9, width=32)
    found = plan_for_budget(made, source, max_size=most, shape="9x32", progress=False)
    assert source.num_bytes(found.kept, width=found.width) == most
    with pytest.raises(InputError, match="beyond the budget"):
        plan_for_budget(made, source, max_size=most - 1, shape="9x32", progress=False)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--budget", "50%", "--keep", "6"], "exactly one of"),
        (["--keep", "6", "--shape", "auto"], "says what --budget or --max-size is spent on"),
        (["--budget", "50%", "--width", "32"], "exclude each other"),
        (["--budget", "50%", "--shape", "auto"], "looks at the model: give --model"),
        (["--budget", "50%", "--windows", "4"], "measures nothing"),
        (["--budget", "50", "--shape", "12x32"], "give a share of the routed bytes"),
        (["--width", "32", "--retain-width", "0.5"], "give one of --width"),
    ],
)
def test_the_command_refuses(
    made: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    made.save(tmp_path / "p")
    assert main(["plan", str(tmp_path / "p"), *arguments, "-o", str(tmp_path / "plan.json")]) == 2
    assert says in capsys.readouterr().err
    assert (
        main(["plan", str(tmp_path / "p"), "--budget", "50%", "--shape", "12x32", "-o", str(tmp_path / "p.json")]) == 0
    )
    assert main(["plan", str(tmp_path / "p"), "--keep", "6,9", "--width", "32,64", "-o", str(tmp_path / "all")]) == 0
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == ["keep-6-width-32.json", "keep-6.json", "keep-9-width-32.json", "keep-9.json"]
