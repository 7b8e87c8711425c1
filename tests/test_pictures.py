"""Pictures of plans: which are drawn, that they show the kept set, sizes at both ends, and files that are never half there."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moecover.cli import main
from moecover.errors import InputError
from moecover.explaining import explain
from moecover.pictures import draw, expected_overlap, outline, overlap_picture, stability_picture, utility_picture
from moecover.planning import plan
from moecover.profiles import COUNTS, STATISTICS, Profile
from moecover.topology import Topology


def made_of(layers: int, experts: int, corpora: int, *, parts: int = 3, seed: int = 0) -> Profile:
    rng = np.random.default_rng(seed)
    topology = Topology("m", tuple(range(1, layers + 1)), experts, 2, 8, layers + 1)
    statistics, running = {}, {}
    for i in range(corpora):
        pieces = {
            n: rng.integers(1, 9, (parts + 1, layers, experts)) if n in COUNTS else rng.gamma(0.5, size=(parts + 1, layers, experts))
            for n in STATISTICS
        }  # fmt: skip
        pieces["num_tokens"][:] = 100
        sums = {n: np.cumsum(v, axis=0) for n, v in pieces.items()}
        statistics[f"corpus{i}"] = {n: v[-1] for n, v in sums.items()}
        running[f"corpus{i}"] = {n: v[:-1] for n, v in sums.items()}
    records = {c: [{"sha256": c}] for c in statistics}
    return Profile(topology, statistics, records, {"name": "m", "fingerprint": "f"}, {}, running if parts else {})


def facts_of(profile: Profile, keep: int, **options: Any) -> dict[str, Any]:
    return explain(plan(profile, keep=keep), profile=profile, **options)


def names(paths: list[Path]) -> set[str]:
    return {path.name for path in paths}


def test_outline_by_hand() -> None:
    """Kept: the left and middle cell of the upper row, the right one of the lower."""
    lines = {tuple(sorted(line)) for line in outline(np.array([[True, True, False], [False, False, True]]))}
    upper = {((0, 0), (0, 1)), ((2, 0), (2, 1)), ((0, 0), (1, 0)), ((1, 0), (2, 0)), ((0, 1), (1, 1)), ((1, 1), (2, 1))}
    lower = {((2, 1), (2, 2)), ((3, 1), (3, 2)), ((2, 1), (3, 1)), ((2, 2), (3, 2))}
    assert lines == upper | lower


@pytest.mark.parametrize("shape", [(1, 1), (2, 6), (5, 9)])
def test_outline_has_one_line_between_kept_and_not_kept(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).random(shape) < 0.5

    kept = {(r, c) for r, c in np.argwhere(mask).tolist()}
    expected = set()
    for r, c in kept:
        for other, line in (
            ((r, c - 1), ((c, r), (c, r + 1))), ((r, c + 1), ((c + 1, r), (c + 1, r + 1))),
            ((r - 1, c), ((c, r), (c + 1, r))), ((r + 1, c), ((c, r + 1), (c + 1, r + 1))),
        ):  # fmt: skip
            if other not in kept:
                expected.add(line)
    found = outline(mask)
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_overlap_of_random_sets() -> None:
    sets = list(combinations(range(6), 3))
    every = [len(set(a) & set(b)) / len(set(a) | set(b)) for a in sets for b in sets]
    assert expected_overlap(3, 6) == pytest.approx(sum(every) / len(every))
    assert expected_overlap(6, 6) == 1
    rng = random.Random(0)
    trial = [set(rng.sample(range(60), 15)) for _ in range(4000)]
    mean = np.mean([len(a & b) / len(a | b) for a, b in zip(trial[::2], trial[1::2], strict=True)])
    assert expected_overlap(15, 60) == pytest.approx(mean, rel=0.03)


def test_which_pictures_there_are(tmp_path: Path) -> None:
    both = {f"{n}.{kind}" for n in ("utility", "overlap", "stability") for kind in ("png", "svg")}
    two = made_of(2, 8, 2)
    assert names(draw(facts_of(two, 4), tmp_path / "1")) == both
    assert names(draw(facts_of(two, 4, against=plan(two, keep=5)), tmp_path / "2")) == both | {"changes.png", "changes.svg"}  # fmt: skip
    one = made_of(2, 8, 1, parts=0)
    assert names(draw(facts_of(one, 4), tmp_path / "3")) == {"utility.png", "utility.svg"}
    for path in (tmp_path / "1").glob("*.png"):
        image = Image.open(path)
        assert image.width > 600
        assert len(np.unique(np.asarray(image.convert("L")))) > 20  # not blank


def test_the_same_facts_give_the_same_bytes(tmp_path: Path) -> None:
    profile = made_of(2, 8, 2)
    facts = facts_of(profile, 4, against=plan(profile, keep=5))
    one, two = draw(facts, tmp_path / "1"), draw(json.loads(json.dumps(facts)), tmp_path / "2")
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    other = facts_of(profile, 5)
    assert draw(other, tmp_path / "3")[1].read_bytes() != one[1].read_bytes()


def test_the_heat_map_shows_utility_outline_and_protection() -> None:
    profile = made_of(3, 8, 2)
    facts = facts_of(profile, 4)
    figure = utility_picture(facts)
    mask = np.zeros((3, 8), dtype=bool)
    for line, row in zip(mask, facts["layers"], strict=True):
        line[row["kept"]] = True
    for axis, corpus in zip(figure.axes, facts["corpora"], strict=False):
        mesh, *others = axis.collections
        np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(3, 8), np.array(facts["utility"][corpus]) * 8)
        drawn = {tuple(map(tuple, line.tolist())) for line in others[0].get_segments()}
        assert drawn == {tuple(tuple(map(float, point)) for point in line) for line in outline(mask)}
        dots = {tuple(point) for point in others[-1].get_offsets().tolist()}
        assert dots == {(e + 0.5, i + 0.5) for i, row in enumerate(facts["layers"]) for e in row["protected"][corpus]}
        assert axis.yaxis_inverted()  # the first layer is on top
        assert [t.get_text() for t in axis.get_yticklabels()] == ["1", "2", "3"]


def test_curves_show_the_facts_and_gaps() -> None:
    profile = made_of(3, 8, 3)
    facts = facts_of(profile, 4)
    facts["layers"][1]["agreement"]["corpus0 | corpus1"]["spearman"] = None
    first, second = overlap_picture(facts).axes
    assert len(first.lines) == 3 + 1  # three pairs and what chance gives
    assert first.lines[0].get_ydata().tolist() == [r["agreement"]["corpus0 | corpus1"]["jaccard"] for r in facts["layers"]]  # fmt: skip
    assert [math.isnan(v) for v in second.lines[0].get_ydata()] == [False, True, False]
    (axis,) = stability_picture(facts).axes
    assert axis.lines[0].get_ydata().tolist() == [p["changed"] for p in facts["stability"]["curve"]]
    never = {**facts, "stability": {**facts["stability"], "enough_tokens": None}}
    (axis,) = stability_picture(never).axes
    assert "may not be enough" in axis.get_title()


@pytest.mark.parametrize("layers, experts, corpora", [(61, 256, 5), (2, 6, 1), (1, 2, 7)])
def test_sizes_at_both_ends_without_a_warning(layers: int, experts: int, corpora: int) -> None:
    profile = made_of(layers, experts, corpora)
    facts = facts_of(profile, max(2, experts // 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = utility_picture(facts)
        figure.draw_without_rendering()
        if corpora > 1:
            overlap_picture(facts).draw_without_rendering()
    assert all(0 < side < 60 for side in figure.get_size_inches())


def test_nothing_is_overwritten_unasked_and_stale_pictures_go(tmp_path: Path) -> None:
    profile = made_of(2, 8, 2)
    draw(facts_of(profile, 4, against=plan(profile, keep=5)), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"utility.png exists. Choose another folder, or give --overwrite"):
        draw(facts_of(profile, 5), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "mine.txt"} == before
    draw(facts_of(profile, 5), tmp_path, overwrite=True)
    assert not (tmp_path / "changes.png").exists()
    assert (tmp_path / "mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file, a folder for pictures"):
        draw(facts_of(profile, 5), tmp_path / "file")


def test_the_verb_refuses_before_it_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    profile = made_of(2, 8, 2)
    profile.save(tmp_path / "p")
    plan(profile, keep=4).save(tmp_path / "plan.json")
    command = ["explain", str(tmp_path / "plan.json"), "--profile", str(tmp_path / "p"), "-o", str(tmp_path / "pictures")]  # fmt: skip
    assert main(command) == 0
    assert capsys.readouterr().out.count("picture: ") == 6
    monkeypatch.setattr("moecover.explaining.explain", lambda *a, **k: 1 / 0)
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_another_profile_has_no_stability_picture(tmp_path: Path) -> None:
    one, two = made_of(2, 8, 2), made_of(2, 8, 2, seed=1)
    two = dataclasses.replace(two, model=one.model)
    assert "stability.png" not in names(draw(explain(plan(one, keep=4), profile=two), tmp_path))
