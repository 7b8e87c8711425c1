"""Figures of plans: which are drawn, that they show the kept set, extreme sizes, and that no partial file is left."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import subprocess
import sys
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moecover.checkpoints.topology import Topology
from moecover.cli.main import main
from moecover.errors import InputError
from moecover.planning.explaining.facts import explain
from moecover.planning.run import plan
from moecover.profiling.artifact import Profile
from moecover.profiling.statistics import COUNTS, STATISTICS
from moecover.reporting.figures.heatmap import arrangement, is_ranked, outlines, scale_ticks, utility_picture
from moecover.reporting.figures.overlap import expected_overlap, overlap_picture
from moecover.reporting.figures.plan_figures import NAMES, changes_picture, draw, stability_picture
from moecover.reporting.figures.ranked import KEPT, REMOVED, by_rank, colours
from moecover.reporting.sentences import map_words


def made_of(layers: int, experts: int, corpora: int, *, parts: int = 3, seed: int = 0) -> Profile:
    rng = np.random.default_rng(seed)
    topology = Topology("m", tuple(range(1, layers + 1)), experts, 2, 8, layers + 1)
    statistics, running = {}, {}
    for i in range(corpora):
        pieces = {
            n: rng.integers(1, 9, (parts + 1, layers, experts))
            if n in COUNTS
            else rng.gamma(0.5, size=(parts + 1, layers, experts))
            for n in STATISTICS
        }
        pieces["num_tokens"][:] = 100
        sums = {n: np.cumsum(v, axis=0) for n, v in pieces.items()}
        statistics[f"corpus{i}"] = {n: v[-1] for n, v in sums.items()}
        running[f"corpus{i}"] = {n: v[:-1] for n, v in sums.items()}
    records = {c: [{"sha256": c, "tokens": 100}] for c in statistics}
    return Profile(topology, statistics, records, {"name": "m", "fingerprint": "f"}, {}, running if parts else {})


def facts_of(profile: Profile, keep: int, **options: Any) -> dict[str, Any]:
    return explain(plan(profile, keep=keep), profile=profile, **options)


def names(paths: list[Path]) -> set[str]:
    return {path.name for path in paths}


def test_outlines_by_hand() -> None:
    """Kept of 2 x 3: left and middle expert above, right one below; the line runs a quarter and an eighth inside."""
    found = outlines([[0, 1], [2]], 0.25, 0.125)
    above, below = (-0.375, 0.375), (0.625, 1.375)
    assert found.tolist() == [
        [[-0.25, above[0]], [0.25, above[0]], [0.25, above[1]], [-0.25, above[1]]],
        [[0.75, above[0]], [1.25, above[0]], [1.25, above[1]], [0.75, above[1]]],
        [[1.75, below[0]], [2.25, below[0]], [2.25, below[1]], [1.75, below[1]]],
    ]


@pytest.mark.parametrize(
    "top, expected",
    [(16.4, [0, 0.5, 2, 5, 10]), (50, [0, 1, 5, 10, 20, 50]), (0.003, [0, 0.00005, 0.0002, 0.0005, 0.001, 0.002])],
)
def test_scale_ticks_stand_apart(top: float, expected: list[float]) -> None:
    assert scale_ticks(top) == pytest.approx(expected)


@pytest.mark.parametrize(
    "layers, experts, panels",
    [(61, 256, 5), (94, 128, 5), (126, 256, 5), (32, 8, 5), (48, 512, 2), (2, 6, 1), (1, 1, 1), (1, 2, 12)],
)
def test_pages_are_bounded(layers: int, experts: int, panels: int) -> None:
    columns, width, height = arrangement(layers, experts, panels)
    assert 1 <= columns <= panels
    assert width >= 3
    assert height >= 4
    assert columns * experts * width <= 3000
    assert -(-panels // columns) * layers * height <= 3600


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
    assert names(draw(facts_of(two, 4, against=plan(two, keep=5)), tmp_path / "2")) == both | {
        "changes.png",
        "changes.svg",
    }
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


def test_the_heat_map_shows_utility_outlines_and_protection() -> None:
    profile = made_of(3, 8, 2)
    facts = facts_of(profile, 4)
    for corpus, place in zip(facts["corpora"], (0, -1), strict=True):  # a dot on a pale cell is drawn too
        facts["utility"][corpus][0][facts["layers"][0]["protected"][corpus][place]] = 0.0
    panels = [axes for axes in utility_picture(facts).axes if axes.images]
    for axes, corpus in zip(panels, facts["corpora"], strict=True):
        np.testing.assert_allclose(axes.images[0].get_array(), 100 * np.array(facts["utility"][corpus]))
        corners = axes.patches[0].get_path().vertices.reshape(-1, 5, 2)[:, :4]
        outlined = {(round(x), round(y)) for x, y in corners.mean(axis=1)}
        assert outlined == {(e, i) for i, row in enumerate(facts["layers"]) for e in row["kept"]}
        dots = {(x, y) for line in axes.lines for x, y in zip(*line.get_data(), strict=True)}
        assert dots == {(e, i) for i, row in enumerate(facts["layers"]) for e in row["protected"][corpus]}
        assert axes.yaxis_inverted()  # the first layer is on top
        assert [t.get_text() for t in axes.get_yticklabels()] == ["1", "2", "3"]


def test_a_large_map_is_sorted_from_each_corpus_s_best_expert() -> None:
    """By hand for four experts; at 48 x 128 the line stands after the ranks that every layer keeps, and no further."""
    facts = {"utility": {"c": [[0.1, 0.4, 0.2, 0.3]]}, "layers": [{"kept": [1, 2]}]}
    values, kept = by_rank(facts, "c")
    assert values.tolist() == [[40, 30, 20, 10]]
    assert kept.tolist() == [[True, False, True, False]]
    facts = facts_of(made_of(48, 128, 2, parts=0), 64)
    assert is_ranked(facts)
    lower, upper, *panels = (figure := utility_picture(facts)).axes
    shown = [bar.collections[-1].cmap(0.6) for bar in (upper, lower)]
    assert shown == [colours(REMOVED)(0.6), colours(KEPT)(0.6)]
    line = "every layer keeps all experts left of the line"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["kept", "removed", line]
    for axes, corpus in zip(panels, facts["corpora"], strict=True):
        (line,) = axes.lines
        _, kept = by_rank(facts, corpus)
        assert line.get_xdata()[0] == kept.all(axis=0).argmin() - 0.5 > 0
        hidden = [np.ma.getmaskarray(image.get_array()) for image in axes.images]
        assert (hidden[0] == ~kept).all()
        assert (hidden[1] == kept).all()
    facts["overall"]["covered_rank"] = dict.fromkeys(facts["corpora"], 0)
    assert line not in [t.get_text() for t in utility_picture(facts).legends[0].get_texts()]
    for small in (facts_of(made_of(2, 8, 2), 4), facts):
        words = (
            "orange ones are removed; every panel is sorted" if small is facts else "Outlined experts are kept by X."
        )
        assert words in map_words(small, "X")


def test_outlines_stand_on_the_pixels_of_the_kept_cells(tmp_path: Path) -> None:
    """Vermilion in the upper left corner of every kept cell of the PNG, and of no other."""
    facts = facts_of(made_of(3, 8, 1), 4)
    draw(facts, tmp_path)
    image = np.asarray(Image.open(tmp_path / "utility.png").convert("RGB")).astype(int)
    (axes,) = (axes for axes in utility_picture(facts).axes if axes.images)
    box, high = axes.get_position(), image.shape[0]
    left, top = round(box.x0 * image.shape[1]), round((1 - box.y1) * high)
    _, wide, tall = arrangement(3, 8, 1)
    for i, row in enumerate(facts["layers"]):
        for e in range(8):
            pixel = image[top + i * tall + 2, left + e * wide + wide // 2]
            assert (np.abs(pixel - (0xD5, 0x5E, 0x00)).max() <= 3) == (e in row["kept"]), (i, e)


def test_many_pairs_are_told_apart_and_odd_names_are_drawn(tmp_path: Path) -> None:
    profile = made_of(2, 8, 6)
    odd = dict(zip(profile.statistics, ["_hidden", r"$\frac$", "中文", "a\nb", "x" * 60, "plain"], strict=True))
    profile = dataclasses.replace(profile, statistics={odd[c]: s for c, s in profile.statistics.items()}, parts={})
    facts = facts_of(profile, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(facts, tmp_path)
    few = dataclasses.replace(profile, statistics=dict(list(profile.statistics.items())[:5]))
    figure = overlap_picture(facts_of(few, 4))
    looks = {(x.get_color(), x.get_marker(), x.get_linestyle()) for x in figure.axes[0].lines}
    assert len(looks) == 10 + 1
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(shown)) == 10 + 1
    assert "_hidden and \\u4e2d\\u6587" in shown


def test_the_module_does_not_load_matplotlib() -> None:
    code = "import sys, moecover.reporting.figures.plan_figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_drawing_leaves_the_settings_of_matplotlib(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 23, "axes.labelcolor": "red"}):
        before = dict(matplotlib.rcParams)
        facts = facts_of(made_of(2, 8, 1), 4)
        one = draw(facts, tmp_path / "1")[0].read_bytes()
        assert dict(matplotlib.rcParams) == before
    assert draw(facts, tmp_path / "2")[0].read_bytes() == one


def test_bars_stack_to_what_both_plans_keep() -> None:
    profile = made_of(3, 8, 2)
    facts = facts_of(profile, 4, against=plan(profile, keep=5))
    (axes,) = changes_picture(facts).axes
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    rows = facts["changes"]["layers"]
    assert heights == [
        [r["common"] for r in rows],
        [len(r["only_here"]) for r in rows],
        [len(r["only_there"]) for r in rows],
    ]
    assert [a.get_y() for a in axes.containers[2]] == [a + b for a, b in zip(*heights[:2], strict=True)]


def test_no_picture_is_left_where_one_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moecover.reporting.figures import plan_figures as pictures

    def full(path: Path, content: bytes) -> None:
        if path.name == "overlap.svg":
            raise InputError("disk full")
        path.write_bytes(content)

    monkeypatch.setattr(pictures, "write_bytes", full)
    with pytest.raises(InputError, match="disk full"):
        draw(facts_of(made_of(2, 8, 2), 4), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_any_picture_that_is_there_is_enough_to_refuse(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecover.reporting.figures.plan_figures.utility_picture", lambda facts: 1 / 0)
    (tmp_path / f"{name}.svg").write_text("mine")
    with pytest.raises(InputError, match=rf"{name}.svg exists. Choose another folder, or give overwrite"):
        draw(facts_of(made_of(2, 8, 1), 4), tmp_path)
    assert (tmp_path / f"{name}.svg").read_text() == "mine"


def test_curves_show_the_facts_and_gaps() -> None:
    profile = made_of(3, 8, 3)
    facts = facts_of(profile, 4)
    facts["layers"][1]["agreement"]["corpus0 | corpus1"]["spearman"] = None
    first, second = overlap_picture(facts).axes
    assert len(first.lines) == 3 + 1  # three pairs and what chance gives
    assert first.lines[0].get_ydata().tolist() == [
        r["agreement"]["corpus0 | corpus1"]["jaccard"] for r in facts["layers"]
    ]
    assert [math.isnan(v) for v in second.lines[0].get_ydata()] == [False, True, False]
    (axis,) = stability_picture(facts).axes
    curve = next(line for line in axis.lines if "full text" in str(line.get_label()))
    assert list(curve.get_ydata()) == [p["changed"] for p in facts["stability"]["curve"]]
    never = {**facts, "stability": {**facts["stability"], "enough_tokens": None}}
    (axis,) = stability_picture(never).axes
    assert "may not be enough" in axis.figure.get_suptitle()


def test_many_corpora_are_a_matrix() -> None:
    """Of means over layers, each pair on both sides; a pair without a number has none."""
    facts = facts_of(made_of(3, 8, 6), 4)
    pairs = facts["overall"]["agreement"]
    pairs["corpus1 | corpus4"]["spearman"] = None
    first, second = overlap_picture(facts).axes
    table, order = (axes.get_images()[0].get_array() for axes in (first, second))
    for (i, one), (j, two) in combinations(enumerate(facts["corpora"]), 2):
        assert table[i, j] == table[j, i] == pairs[f"{one} | {two}"]["jaccard"]
    assert order.mask[1, 4]
    assert [t.get_text() for t in second.texts].count("-") == 2
    assert len(overlap_picture(facts_of(made_of(3, 8, 5), 4)).axes[0].lines) == 10 + 1


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
    with pytest.raises(InputError, match=r"utility.png exists. Choose another folder, or give overwrite"):
        draw(facts_of(profile, 5), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "mine.txt"} == before
    draw(facts_of(profile, 5), tmp_path, overwrite=True)
    assert not (tmp_path / "changes.png").exists()
    assert (tmp_path / "mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file, but the figures need a folder"):
        draw(facts_of(profile, 5), tmp_path / "file")


def test_the_verb_refuses_before_it_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    profile = made_of(2, 8, 2)
    profile.save(tmp_path / "p")
    plan(profile, keep=4).save(tmp_path / "plan.json")
    command = [
        "explain",
        str(tmp_path / "plan.json"),
        "--profile",
        str(tmp_path / "p"),
        "-o",
        str(tmp_path / "pictures"),
    ]
    assert main(command) == 0
    assert capsys.readouterr().out.count("picture: ") == 6
    monkeypatch.setattr("moecover.planning.explaining.facts.explain", lambda *a, **k: 1 / 0)
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_another_profile_has_no_stability_picture(tmp_path: Path) -> None:
    one, two = made_of(2, 8, 2), made_of(2, 8, 2, seed=1)
    two = dataclasses.replace(two, model=one.model)
    assert "stability.png" not in names(draw(explain(plan(one, keep=4), profile=two), tmp_path))
