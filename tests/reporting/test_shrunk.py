"""The page of a folder of work of `shrink`: its numbers by hand, what is left out of it, and its figures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation, Row, TextResult
from moecover.evaluation.run import plan_record
from moecover.planning.artifact import Plan
from moecover.planning.explaining.facts import explain
from moecover.planning.run import plan_budgets
from moecover.profiling.artifact import Profile
from moecover.reporting.blocks import Details, Lead, Paragraph, Table
from moecover.reporting.chapters import Page
from moecover.reporting.figures.shapes import SizePoint, shapes_picture, sizes_picture
from moecover.reporting.shrunk import shrunk_page
from tests.support.profiles import profile_with_channels

BEFORE = {"a": 1.0, "b": 2.0}
SHAPES = [
    {"keep": keep, "width": width, "loss": loss, "gap": {"a": loss, "b": loss / 2}}
    for keep, width, loss in ((6, 8, 0.3), (3, 16, 0.4), (2, 24, 0.5))
]


def profile(seed: int = 0) -> Profile:
    """Two corpora, 2 layers, 6 experts, 24 channels."""
    rng = np.random.default_rng(seed)
    return profile_with_channels({name: rng.random((2, 6, 24)) for name in ("a", "b")})


def text(nll: float) -> TextResult:
    return TextResult(math.exp(nll), nll, 100, 4)


def measured(plan: Plan, num_bytes: int, lost: dict[str, float], repair: str | None = None) -> Evaluation:
    """An evaluation in which the texts lose so many nats."""
    record = plan_record(plan)
    rows = [
        Row("full", None, 6, 6, 4_000_000_000, {name: text(nll) for name, nll in BEFORE.items()}),
        Row(
            "shrunk",
            {**record, "repair": repair} if repair else record,
            plan.keep,
            6,
            num_bytes,
            {name: text(BEFORE[name] + more) for name, more in lost.items()},
        ),
    ]
    texts = {n: {"source": f"file {n}", "sha256": n, "tokens": 1234, "sketch": "no", "overlap": {}} for n in BEFORE}
    return Evaluation({"name": "some/model", "fingerprint": "f"}, texts, {}, rows)


def work(folder: Path) -> Path:
    """A folder of work: half the experts repaired, thinner ones that are not, and their names differ in case alone."""
    made = profile()
    made.save(folder / "profile")
    half, thin = plan_budgets(made, keeps=[3, 6], widths=[None, 8])
    half, thin = (one.model_copy(update={"found": {"shapes": SHAPES}}) for one in (half, thin))
    for name, plan, num_bytes, lost, repair in (
        ("2GB-auto", thin, 1_000_000_000, {"a": 0.3, "b": 0.1}, None),
        ("2gb-auto", half, 2_000_000_000, {"a": -0.1, "b": 0.2}, "ridge"),
    ):
        plan.save(folder / name / "plan.json")
        measured(plan, num_bytes, lost, repair).save(folder / name / "evaluation")
    (folder / "shrink.json").write_text("{}")
    return folder


def blocks(page: Page, chapter: int, name: str) -> list:
    (section,) = [one for one in page.chapters[chapter].sections if one.name == name]
    return list(section.blocks)


def test_the_numbers_are_those_of_the_evaluations(tmp_path: Path) -> None:
    """By hand: the large one loses 5.1 % in the mean and 22.1 % at worst, the small one 22.1 % and 35.0 %."""
    page = shrunk_page(work(tmp_path))
    assert [chapter.name for chapter in page.chapters] == [
        "3 of 6 experts: 2.00 GB",
        "6 of 6 experts of 8 channels: 1.00 GB",
    ]
    (first,), (second,) = (blocks(page, number, "summary") for number in (0, 1))
    assert isinstance(first, Lead)
    assert isinstance(second, Lead)
    numbers = [[(n.value, n.words) for n in lead.tiles[0].groups[0][1]] for lead in (first, second)]
    assert numbers[0] == [("+5.1 %", "perplexity, mean of 2 texts"), ("+22.1 %", "worst text: b")]
    assert numbers[1] == [("+22.1 %", "perplexity, mean of 2 texts"), ("+35.0 %", "worst text: a")]
    assert first.tiles[0].heading == "against the model itself · repair: ridge"
    assert second.tiles[0].heading == "against the model itself · no repair"
    (table,) = blocks(page, 0, "texts")
    assert isinstance(table, Table)
    assert [[value.text for value in row] for row in table.rows] == [
        ["b", "4", "7.39", "9.03", "+22.1 %"],
        ["a", "4", "2.72", "2.46", "−9.5 %"],
    ]
    stems = {name.removesuffix(".svg") for name in page.album.files if name.endswith(".svg")}
    assert stems == {
        *(f"s{n}-2gb-auto-{figure}" for n in (1, 2) for figure in ("shapes", "utility")),
        "s2-2gb-auto-channels",
        "sizes",
    }
    assert len({chapter.anchor for chapter in page.chapters}) == 2
    read = [block for section in page.run_sections if section.name == "text" for block in section.blocks]
    assert [block.summary for block in read if isinstance(block, Details)] == [
        "Calibration text (2)",
        "Held-out text (2)",
    ]
    held = read[1].blocks[0]
    assert dict(held.entries)["source"] == "file a"
    assert dict(held.entries)["tokens"] == "1,234"


def test_what_does_not_belong_together_is_left_out(tmp_path: Path) -> None:
    folder = work(tmp_path)
    plan = Plan.load(folder / "2GB-auto" / "plan.json")
    other = plan_budgets(profile(), keeps=[2])[0]
    other.save(folder / "2GB-auto" / "plan.json")
    page = shrunk_page(folder)
    assert len(page.chapters) == 1
    (section,) = [one for one in page.run_sections if one.name == "left-out"]
    assert section.blocks[0].text == (
        "2GB-auto: its evaluation is of another plan. Run the same `shrink` again: it resumes."
    )
    plan.save(folder / "2GB-auto" / "plan.json")
    assert len(shrunk_page(folder).chapters) == 2
    profile(seed=1).save(folder / "profile")
    with pytest.raises(
        InputError, match="2gb-auto: its plan was made from another profile.*Run the same `shrink` again"
    ):
        shrunk_page(folder)


def test_what_every_corpus_keeps_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = work(tmp_path)
    for guarantee, words in (
        (0, "a corpus loses its best"),
        (1, "keeps its best expert in"),
        (2, "its 2 best experts"),
    ):

        def facts(*args: object, guarantee: int = guarantee, **options: object) -> dict:
            found = explain(*args, **options)
            return {**found, "overall": {**found["overall"], "guarantee": guarantee}}

        monkeypatch.setattr("moecover.reporting.shrunk.explain", facts)
        paragraph = blocks(shrunk_page(folder), 0, "experts")[0]
        assert isinstance(paragraph, Paragraph)
        assert words in paragraph.text
        assert "In the mean over the layers, every corpus keeps at least" in paragraph.text
        assert "Outlined experts are kept by tb-coverage" in paragraph.text


def test_the_chosen_shape_is_marked() -> None:
    for keep, width, place, title in ((3, 16, 1, "were chosen"), (6, 8, 2, "lose least"), (2, None, 0, "were chosen")):
        figure = shapes_picture(SHAPES, keep, width, repaired=keep == 3)
        (axes,) = figure.axes
        assert [line.get_xdata()[0] for line in axes.lines if line.get_label() == "chosen"] == [place]
        assert title in figure.get_suptitle()
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2 x 24", "3 x 16", "6 x 8"]
        assert axes.get_ylabel() == ("loss before the repair, nats" if keep == 3 else "loss, nats")


def test_sizes_fall_and_lines_join_the_best_of_each() -> None:
    points = [
        SizePoint("6x8", 1_000_000_000, 0.2, 0.3),
        SizePoint("3", 1_990_000_000, 0.15, 0.16),
        SizePoint("6x16", 2_000_000_000, 0.1, 0.25),
    ]
    figure = sizes_picture(points, 4_000_000_000)
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata()) > 1}
    assert lines == {
        "mean over texts": [[4, 0], [2, 0.1], [1, 0.2]],
        "worst text": [[4, 0], [2, 0.25], [1, 0.3]],
    }
    assert sorted(tuple(*line.get_xydata()) for line in axes.lines if len(line.get_xdata()) == 1) == [
        (1.99, 0.15),
        (1.99, 0.16),
    ]
    assert axes.xaxis_inverted()
    assert axes.get_xlabel() == "size of the checkpoint, GB"
    assert figure.get_suptitle() == "What smaller costs: up to 30% on the worst text"
    better = sizes_picture([SizePoint("3", 2_000_000_000, -0.1, -0.05)], 4_000_000_000)
    assert better.get_suptitle() == "What smaller costs: nothing, −5% on the worst text"
