"""One command from a model to a thinner one: what it writes, that it resumes, and what it refuses before any work."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moecover import Shrunk, report, shrink
from moecover.checkpoints.structure import read_structure
from moecover.cli.main import main
from moecover.corpora.packing import Corpus
from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation
from moecover.planning.artifact import Plan
from moecover.profiling.artifact import Profile
from moecover.progress import resolve
from moecover.shrinking import quality
from moecover.shrinking.quality import Quality
from moecover.shrinking.texts import divided
from tests.conftest import random_corpus, write_rows


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few blocks of everything."""
    monkeypatch.setitem(quality.QUALITIES, "fast", Quality(6, 6, "ridge", 200, 2, "little"))


def corpora() -> list[Corpus]:
    return [random_corpus("a", seed=1, sequences=12), random_corpus("b", seed=2, sequences=12)]


def files(tmp_path: Path) -> list[str]:
    """The same corpora as arguments."""
    found = []
    for corpus in corpora():
        rows = [{"input_ids": row} for row in corpus.tokens.tolist()]
        found += ["--corpus", f"{corpus.name}={write_rows(tmp_path / f'{corpus.name}.jsonl', rows)}"]
    return found


def test_the_best_shape_is_repaired_proven_and_measured(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoints("qwen2_moe", moe_intermediate_size=32)
    made = shrink(
        source,
        tmp_path / "out",
        budget="50%",
        multiple_of=4,
        corpora=corpora(),
        own_text=False,
        quality="fast",
        dtype="float32",
        progress=False,
    )
    assert isinstance(made, Shrunk)
    assert made.work.name == "50pct-auto-of4"
    plan = Plan.load(made.work / "plan.json")
    assert plan == made.pruned.plan
    shapes = {(point["keep"], point["width"]): point["loss"] for point in plan.found["shapes"]}
    assert len(shapes) > 1
    assert {keep % 4 for keep, _ in shapes} == {0}
    assert shapes[plan.keep, plan.width or 32] == min(shapes.values())
    assert all(keep * width <= 0.5 * 12 * 32 for keep, width in shapes)
    assert made.verification.equal
    assert made.verification.repaired > 0
    assert Evaluation.load(made.work / "evaluation").rows[1].plan["repair"] == "ridge"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Measured" in card
    assert "perplexity, a," in card
    assert re.search(r"Perplexity: geometric mean over 2 texts [+-][\d.]+ %; worst text [ab], [+-][\d.]+ %\.", card)
    held = {name: text["sha256"] for name, text in made.evaluation.texts.items()}
    assert set(held) == {"a", "b"}
    assert not {record["sha256"] for records in plan.calibration.values() for record in records} & set(held.values())
    loaded = read_structure(tmp_path / "out")
    assert loaded.topology.num_experts == plan.keep
    assert "rare-tokens" in json.dumps(plan.calibration)
    _page_of(made)


def _page_of(made: Shrunk) -> None:
    """The page of the folder: the numbers of the evaluation, a curve over sizes once there are two, no page of none."""
    folder, page = made.work.parent, made.work.parent.with_suffix(".html")
    written = report(folder, page, progress=False)
    full, row = made.evaluation.rows
    change = {name: one.perplexity / full.perplexity[name].perplexity - 1 for name, one in row.perplexity.items()}
    worst = max(change, key=lambda name: change[name])
    text = page.read_text().replace("−", "-")
    assert f"worst text: {worst}" in text
    assert f"{100 * change[worst]:+.1f} %" in text
    assert f"{row.keep} of 12 experts" in text
    assert "repair: ridge" in text
    assert {Path(path).stem for path in written["pictures"]} >= {
        f"s1-{made.work.name}-{name}" for name in ("shapes", "utility")
    }
    shutil.copytree(made.work, folder / "again")
    assert "sizes" in {Path(path).stem for path in report(folder, page, overwrite=True, progress=False)["pictures"]}
    for one in ("again", made.work.name):
        shutil.rmtree(folder / one / "evaluation")
    with pytest.raises(InputError, match="Run the same `shrink` again"):
        report(folder, page, overwrite=True, progress=False)


def test_the_command_goes_on_where_it_stopped(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(checkpoints("qwen2_moe", moe_intermediate_size=32))
    asked = ["shrink", source, *files(tmp_path), "--no-own-text", "--quality", "fast", "--dtype", "float32"]
    out = ["-o", str(tmp_path / "out")]
    assert main([*asked, "--budget", "50%", *out, "--dry-run", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)
    runs = [step["name"] for step in steps["steps"] if step["kind"] == "run"]
    assert runs[:3] == ["profile", "measure shapes", "repair (ridge)"]
    assert main([*asked[:-4], "--budget", "50%", *out, "--dry-run", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)
    assert "repair (refit)" in [step["name"] for step in steps["steps"]]
    assert not (tmp_path / "out-work").exists(), "a dry run makes nothing"
    assert main([*asked, "--budget", "50%", "--repair", "none", *out]) == 0
    first = capsys.readouterr()
    assert "chosen" in first.out
    assert "worst text:" in first.out
    profile = (tmp_path / "out-work" / "profile" / "profile.safetensors").stat().st_mtime_ns
    assert main([*asked, "--budget", "50%", "--repair", "none", *out]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*asked, "--budget", "50%", "--repair", "none", *out, "--overwrite"]) == 0
    again = capsys.readouterr()
    assert "the profile in" in again.err
    assert "plan.json is made" in again.err
    assert (tmp_path / "out-work" / "profile" / "profile.safetensors").stat().st_mtime_ns == profile
    assert main([*asked, "--budget", "25%", "--shape", "4x16", *out, "--overwrite"]) == 0
    assert Plan.load(tmp_path / "out-work" / "25pct-4x16" / "plan.json").width == 16
    assert Plan.load(tmp_path / "out-work" / "50pct-auto" / "plan.json").found
    capsys.readouterr()
    other = str(checkpoints("qwen2_moe", moe_intermediate_size=48))
    assert main(["shrink", other, *files(tmp_path), "--no-own-text", "--quality", "fast", "--budget", "50%", *out]) == 2
    assert (
        main([*asked[:-4], "--budget", "50%", "-o", str(tmp_path / "two"), "--work", str(tmp_path / "out-work")]) == 2
    )
    assert "was made with another quality" in capsys.readouterr().err


def test_a_plan_of_another_profile_is_made_again(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """The work folder keeps its plan when its profile was removed and other text is given."""
    source = checkpoints("qwen2_moe", moe_intermediate_size=32)

    def made(text: list[Corpus]) -> Plan:
        found = shrink(
            source,
            tmp_path / "out",
            budget="50%",
            shape="12x16",
            corpora=text,
            own_text=False,
            repair="none",
            quality="fast",
            dtype="float32",
            overwrite=True,
            progress=False,
        )
        assert isinstance(found, Shrunk)
        return Plan.load(found.work / "plan.json")

    first = made(corpora())
    shutil.rmtree(tmp_path / "out-work" / "profile")
    second = made([random_corpus(name, seed=seed, sequences=12) for name, seed in (("a", 3), ("b", 4))])
    assert second.profile_fingerprint == Profile.load(tmp_path / "out-work" / "profile").fingerprint
    assert second.profile_fingerprint != first.profile_fingerprint
    assert second.layers != first.layers


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("blocks", [2, 3, 5, 6, 11, 12, 13, 40])
def test_no_block_is_calibrated_on_and_held_out(
    checkpoints: Callable[..., Path], tmp_path: Path, blocks: int, from_file: bool
) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    corpus = random_corpus("a", sequences=blocks)
    rows = [{"input_ids": row} for row in corpus.tokens.tolist()]
    source = f"a={write_rows(tmp_path / 'a.jsonl', rows)}" if from_file else corpus
    wanted = Quality(blocks=8, rows=0, repair="ridge", repair_tokens=0, windows=3, cost="")
    found = divided([source], structure, wanted, progress=resolve(False))
    (calibration, rare), (held_out,) = found.calibration, found.held_out
    assert rare.name == "rare-tokens"
    one, two = ({tuple(row) for row in text.tokens.tolist()} for text in (calibration, held_out))
    assert not one & two
    assert one | two <= {tuple(row) for row in corpus.tokens.tolist()}
    assert 1 <= len(one) <= 8
    assert 1 <= len(two) <= 3


@pytest.mark.parametrize(
    "options, says",
    [
        ({}, "exactly one of budget"),
        ({"budget": 0.5, "max_size": 10}, "exactly one of budget"),
        ({"budget": "5%"}, "the budget leaves no shape"),
        ({"budget": 0.5, "shape": "8x32"}, "beyond the budget"),
        ({"budget": 0.5, "shape": "13x8"}, "above the 12 experts"),
        ({"budget": 0.5, "repair": "magic"}, "unknown kind"),
        ({"budget": 0.5, "quality": "perfect"}, "Did you mean|Known"),
        ({"budget": 0.5, "multiple_of": 0}, "multiple_of=0 is out of range: 1 or more"),
        ({"budget": 0.5, "multiple_of": 2, "shape": "6x32"}, "multiple_of=2 says which shapes are looked for"),
        ({"max_size": "1GB"}, "nothing is to be removed"),
    ],
)
def test_refusals_come_before_any_work(
    checkpoints: Callable[..., Path], tmp_path: Path, options: dict[str, object], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        shrink(
            checkpoints("qwen2_moe", moe_intermediate_size=32),
            tmp_path / "out",
            corpora=corpora(),
            progress=False,
            **options,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        shrink(
            checkpoints("qwen2_moe"),
            tmp_path / "out",
            budget=0.5,
            corpora=corpora(),
            own_text=False,
            work=tmp_path / "w",
            progress=False,
        )
    for work in (tmp_path / "out", tmp_path / "out" / "in", tmp_path):
        with pytest.raises(InputError, match="overlap"):
            shrink(checkpoints("qwen2_moe"), tmp_path / "out", budget=0.5, corpora=corpora(), work=work, progress=False)
    one = [random_corpus("a", sequences=1)]
    with pytest.raises(InputError, match="one block of text, two are needed"):
        shrink(checkpoints("qwen2_moe"), tmp_path / "out", budget=0.5, corpora=one, own_text=False, progress=False)
    assert np.array([p.name == "w" or p.name.startswith((".", "out-work")) for p in tmp_path.iterdir()]).all()
