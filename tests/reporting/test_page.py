"""The page of a run: its numbers are those of results.json, its structure, hostile names, words for what is missing."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from moecover.cli.main import main
from moecover.errors import InputError
from moecover.reporting.data import read_run
from moecover.reporting.figures.lines import apart
from moecover.reporting.figures.loss_by_size import families_of, loss_pictures, shown
from moecover.reporting.findings import findings, over_runs
from moecover.reporting.hero import tiles_of
from moecover.reporting.page import rendered, report
from moecover.reporting.svg import source_hash
from tests.support.runs import HOSTILE, METHODS, OURS, TASKS, make_run

SMALL = (("tiny", 3, 8),)


class Page(HTMLParser):
    """The elements of a page with their attributes, its tables by id, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[tuple[dict[str, str | None], str]]]] = {}
        self.words = ""
        self._inside: list[str] = []
        self._table = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag == "table":
            self._table = str(found["id"])
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append((found, ""))
        if tag in ("script", "style", "td", "th"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        inside = self._inside[-1] if self._inside else ""
        if inside in ("td", "th"):
            attributes, text = self.tables[self._table][-1][-1]
            self.tables[self._table][-1][-1] = (attributes, text + data)
        if inside not in ("script", "style"):
            self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, bytes]]:
    """The paper's grid with synthetic numbers: its folder, page and pictures."""
    folder = make_run(tmp_path_factory.mktemp("run") / "paper", samples=2, fails=("ExpertSparsity",))
    return folder, *rendered(folder)


def text_of(folder: Path) -> str:
    return " ".join(Page(rendered(folder)[0]).words.split())


# ------------------------------------------------------------------------------------------------------------ structure
def check_structure(text: str) -> Page:
    page = Page(text)
    ids = Counter(str(a["id"]) for _, a in page.elements if "id" in a)
    assert [name for name, number in ids.items() if number > 1] == []
    for tag, attributes in page.elements:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if tag == "img":
            assert attributes["alt"]
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            if (target := attributes.get(name)) is not None:
                assert target.startswith(("#", "data:")), (tag, target)
                assert not target.startswith("#") or target[1:] in ids, target
        for value in attributes.values():
            for target in re.findall(r"url\(#([^)]*)\)", value or ""):
                assert target in ids
    assert Counter(tag for tag, _ in page.elements)["script"] == 1
    order = [tag for tag, a in page.elements if tag != "h3" or not a.get("class")]
    assert not any(b in ("h2", "h3", "section", "footer") for a, b in itertools.pairwise(order) if a == "h3")
    assert not re.search(r"https?://|@import|//[a-z]+\.", re.sub(r"base64,[\w+/=]*", "", text))
    return page


def test_every_id_is_unique_every_picture_has_words_and_nothing_leads_outside(paper: Any) -> None:
    page = check_structure(paper[1])
    assert len(page.all("svg")) >= 14  # accuracy, 2 perplexities, overlap and 3 of the mechanism, of both models
    assert len(page.all("img")) == 6  # heat maps: 3 budgets of both models
    assert len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_policy_allows_the_pages_own_script_and_style_alone(paper: Any) -> None:
    text = paper[1]
    policy = next(a["content"] for a in Page(text).all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    script, style = (re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)[0] for tag in ("script", "style"))
    assert policy == (
        f"default-src 'none'; img-src data:; style-src {source_hash(style)}; script-src {source_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def test_tables_sort_by_every_column(paper: Any) -> None:
    page = Page(paper[1])
    for attributes in page.all("table"):
        assert str(attributes["class"]).startswith("sortable")
        head, *rows = page.tables[str(attributes["id"])]
        for column, (heading, _) in enumerate(head):
            assert heading["aria-sort"] == "none"
            assert heading["data-first"] in ("ascending", "descending")
            for row in rows:
                value = row[column][0].get("data-value")
                assert value is None or heading["data-kind"] == "text" or float(value) == float(value)
    assert len(page.all("button")) == sum(len(rows[0]) for rows in page.tables.values())


def test_page_is_small_enough_to_send(paper: Any) -> None:
    assert len(paper[1].encode()) < 5_000_000


# -------------------------------------------------------------------------------------------------------------- numbers
def test_numbers_are_those_of_the_results(paper: Any) -> None:
    folder, text, _ = paper
    results, page = json.loads((folder / "results.json").read_text()), Page(text)
    seen = 0
    for number, about in enumerate(results["models"], 1):
        model = about["name"]
        anchor = next(name for name in page.tables if name.startswith(f"m{number}-")).rpartition("-")[0]
        table = page.tables[f"{anchor}-tasks"]
        for row in table[1:]:
            label, retain = row[0][1], float(str(row[1][0]["data-value"]))
            cells = [
                c
                for c in results["cells"]
                if c["model"] == model and c["retain"] == retain and c["label"] == label and c["status"] == "done"
            ]
            assert int(str(row[3][0]["data-value"])) == len(cells)
            scores = np.array([[c["row"]["tasks"][t]["acc"]["value"] for t in TASKS] for c in cells])
            shown = [float(str(cell[0]["data-value"])) for cell in row[4:11]]
            np.testing.assert_allclose(shown, [*scores.mean(axis=0), scores.mean()], rtol=1e-12)
            assert [cell[1].split()[0] for cell in row[4:11]] == [f"{100 * v:.1f}" for v in shown]
            seen += 1
        for row in page.tables[f"{anchor}-perplexity"][1:]:
            label, retain = row[0][1], float(str(row[1][0]["data-value"]))
            cells = [
                c
                for c in results["cells"]
                if c["model"] == model and c["retain"] == retain and c["label"] == label and c["status"] == "done"
            ]
            for column, name in ((5, "wikitext2"), (6, "c4")):
                values = [c["row"]["perplexity"][name]["perplexity"] for c in cells]
                np.testing.assert_allclose(
                    float(str(row[column][0]["data-value"])), np.exp(np.mean(np.log(values))), rtol=1e-12
                )
        mine = sorted((c for c in results["comparisons"] if c["model"] == model), key=lambda c: -c["retain"])
        for row, c in zip(page.tables[f"{anchor}-comparisons"][1:], mine, strict=True):
            assert float(str(row[-2][0]["data-value"])) == c["over_runs"]["p"]
            assert row[-1][1] == ("0.031" if c["kind"] == "tasks" else "–")  # the test is named below the table
        tested = [c for c in mine if c["kind"] == "tasks"]
        for row, c in zip(page.tables[f"{anchor}-by-task"][1:], tested, strict=True):
            assert [float(str(cell[0]["data-value"])) for cell in row[2:]] == [c["by_task"][t]["value"] for t in TASKS]
    assert seen == 2 * (1 + 3 * 4 - 1)


def test_standard_errors_add_the_questions_and_the_runs() -> None:
    made = over_runs([0.5, 0.6], [0.03, 0.04])
    assert made.value == pytest.approx(0.55)
    assert made.stderr == pytest.approx(np.sqrt(0.005 / 2 + (0.03**2 + 0.04**2) / 2))
    assert over_runs([0.5], [0.03]).stderr == pytest.approx(0.03)
    assert over_runs([0.5, 0.6]).stderr == pytest.approx(0.05)
    assert over_runs([0.5]).stderr is None
    assert over_runs([2.0, float("inf")]).stderr is None


def test_method_of_the_paper_comes_first_and_full_model_is_no_method(paper: Any) -> None:
    for model in findings(read_run(paper[0])):
        assert [s.name for s in model.series] == [OURS, "random", "REAP", "ExpertSparsity"]
        assert model.full is not None
        assert [len(s.points) for s in model.series] == [3, 3, 3, 2]


def test_a_label_calibrated_in_several_ways_is_several_lines(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", models=SMALL, budgets=(0.5,), usage=False, plans=False)
    results = json.loads((folder / "results.json").read_text())
    again = [{**c, "id": f"{c['id']}-c4", "calibration": ["c4"]} for c in results["cells"] if c["label"] == "REAP"]
    (folder / "results.json").write_text(json.dumps({**results, "cells": results["cells"] + again}))
    names = [s.name for s in findings(read_run(folder))[0].series]
    assert names == [OURS, "random", "REAP on wikitext2 + c4", "ExpertSparsity", "REAP on c4"]


# --------------------------------------------------------------------------------------------------------- honest words
def test_no_difference_is_said_as_plainly_as_a_win(paper: Any) -> None:
    results, words = json.loads((paper[0] / "results.json").read_text()), " ".join(Page(paper[1]).words.split())
    verdicts = [
        c["verdict"] for c in results["comparisons"] if c["model"] == "Qwen1.5-MoE-A2.7B" and c["kind"] == "tasks"
    ]
    counts = [verdicts.count(v) for v in ("better", "worse", "not resolved")]
    assert all(counts)
    shown = Counter(re.findall(r"(better|worse|not resolved) [+−]", words))
    assert shown == Counter(
        c["verdict"] for c in results["comparisons"]
    )  # beside its difference, in the table of verdicts
    assert "p over tasks: Wilcoxon's signed-rank test over tasks." in words
    assert (
        "{} on accuracy: better in {}, worse in {}, not resolved in {} of {} comparisons.".format(
            OURS, *counts, len(verdicts)
        )
        in words
    )
    cell = "not resolved −0.60% [−1.00%, −0.20%] p 0.030"
    assert words.count(" interval of this one alone") == words.count(cell)
    assert "not resolved +0.20 [−0.20, +0.60] p 0.030" in words  # its interval has 0 in it and needs no word


def test_the_mechanism_is_said_in_numbers(paper: Any) -> None:
    words, usages = " ".join(Page(paper[1]).words.split()), json.loads((paper[0] / "usage.json").read_text())
    for usage in usages:
        means = [
            [np.mean([t[m] for t in tasks.values()]) for m in ("spearman", "jaccard")]
            for tasks in usage["corpora"].values()
        ]
        assert (
            " and ".join(f"{a:.2f} and {b:.2f} on {c}" for (a, b), c in zip(means, usage["corpora"], strict=True))
            in words
        )
    page = Page(paper[1])
    for name, table in page.tables.items():
        if name.endswith("-usage"):
            plans = usages[int(name[1]) - 1]["plans"]
            row = table[1]
            mine = [
                p
                for cell, p in plans.items()
                if cell.split("-")[1] == "3" and cell.endswith(str(45 if name[1] == "1" else 48))
            ]
            shown = [float(str(cell[0]["data-value"])) for cell in row[4:]]
            np.testing.assert_allclose(shown, [np.mean([p[t]["kept_weight"] for p in mine]) for t in TASKS], rtol=1e-12)


def test_failed_cells_are_listed_with_their_reason(paper: Any) -> None:
    page = Page(paper[1])
    failed = [c for c in json.loads((paper[0] / "results.json").read_text())["cells"] if c["status"] == "failed"]
    rows = [[text for _, text in row] for row in page.tables["run-failed"][1:]]
    assert [(row[0], row[1], row[4], row[5]) for row in rows] == [
        (c["model"], c["label"], c["reason"], c["id"]) for c in failed
    ]
    assert f"{len(failed)} failed" in page.words


@pytest.mark.parametrize(
    "options, said",
    [
        ({"tasks": ()}, "No tasks were scored"),
        ({"texts": ()}, "No perplexity was measured"),
        ({"usage": False}, "The use of experts by the tasks was not measured"),
        ({"plans": False}, "there is no heat map"),
        ({"full": False}, "The full model was not evaluated"),
        ({"compared": False}, "No comparison was tested"),
        ({"methods": METHODS[3:], "compared": False}, "there is nothing to compare it with"),
        ({"methods": METHODS[1:]}, "Every method ran once"),
        ({"methods": ()}, "No pruned variant finished"),
        ({"budgets": (0.5,)}, "1 method at 50% of the experts"),
        ({"corpora": ("wikitext2",)}, "calibrated on wikitext2"),
        ({"tasks": ("boolq",)}, "the mean of 1 task"),
        ({"tasks": (), "texts": (), "compared": False}, "no result that all of its runs share"),
        ({"fails": tuple(m[0] for m in METHODS), "budgets": (0.5,), "compared": False}, "No pruned variant finished"),
        ({"methods": (), "full": False, "usage": False}, "No pruned variant was requested"),
    ],
)
def test_what_is_missing_is_said_in_words(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    options = {"models": SMALL, "plans": False, "usage": False, **options}
    if "1 method" in said:
        options["methods"] = METHODS[3:]
    folder = make_run(tmp_path / "run", **options)
    page = check_structure(rendered(folder)[0])
    assert said in " ".join(page.words.split())


def test_one_task_is_not_given_a_mean_and_a_task_that_some_runs_lack_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", models=SMALL, tasks=("boolq", "piqa"), usage=False, plans=False)
    results = json.loads((folder / "results.json").read_text())
    del next(c for c in results["cells"] if c["label"] == "random")["row"]["tasks"]["piqa"]
    (folder / "results.json").write_text(json.dumps(results))
    random = next(s for s in findings(read_run(folder))[0].series if s.name == "random")
    assert [(set(p.tasks), p.mean is None) for p in random.points] == [
        *[({"boolq", "piqa"}, False)] * 2,
        ({"boolq"}, True),
    ]


def test_items_that_the_harness_cuts_are_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", models=SMALL, budgets=(0.5,), usage=False, plans=False)
    results = json.loads((folder / "results.json").read_text())
    name = results["cells"][0]["model"]
    results["cut"] = [{"model": name, "task": "BoolQ", "cut": 45, "items": 3270}]
    (folder / "results.json").write_text(json.dumps(results))
    said = "Note: task BoolQ: 45 of 3,270 items are longer than the model's positions"
    assert said in text_of(folder)


def test_the_worst_text_stands_beside_the_mean(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", models=SMALL, tasks=(), usage=False, plans=False)
    results = json.loads((folder / "results.json").read_text())
    single = [c for c in results["cells"] if c["seed"] is None]
    full, *others = ({t: r["perplexity"] for t, r in c["row"]["perplexity"].items()} for c in single)
    page = Page(rendered(folder)[0])
    words = " ".join(page.words.split())
    lost = [{t: np.log(p / full[t]) for t, p in one.items()} for one in others]
    for one in lost:
        worst = max(one, key=lambda t: one[t])
        mean, most = (np.exp(v + np.array([0, -0.03, 0.03])) for v in (np.mean(list(one.values())), one[worst]))
        columns = ["×{:.2f} [{:.2f}, {:.2f}]".format(*v) for v in (mean, most)]
        assert f"{columns[0]}{columns[1]} {worst}" in words


def test_near_and_far_stand_beside_each_other_with_their_intervals(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", models=SMALL, tasks=(), texts=("wikitext2", "law"), usage=False, plans=False)
    (model,) = findings(read_run(folder))
    assert (model.near, model.far) == (("wikitext2",), ("law",))
    assert model.full is not None
    tiles = tiles_of(model)
    assert [tile.heading.split(" of")[0] for tile in tiles] == ["75%", "50%", "25%"]
    for tile, p in zip(tiles, model.series[0].points, strict=True):
        for (side, (number,)), text, kind in zip(tile.groups, model.texts, ("near", "far"), strict=True):
            lost = p.perplexity[text].value / model.full.perplexity[text].value
            wanted = (f"×{lost:.2f}", f"[{lost * np.exp(-0.03):.2f}, {lost * np.exp(0.03):.2f}]")
            assert (side, number.value, number.interval, number.words) == (kind, *wanted, text)
    results = json.loads((folder / "results.json").read_text())
    of_tasks = [{**loss, "kind": "tasks", "value": -0.5} for loss in results["losses"]]  # a task may have a text's name
    (folder / "results.json").write_text(json.dumps({**results, "losses": [*results["losses"], *of_tasks]}))
    assert tiles_of(*findings(read_run(folder))) == tiles
    (folder / "results.json").write_text(json.dumps({**results, "losses": []}))
    words = text_of(folder)  # of a version that computed none
    assert "intervals are not known" in words
    assert "Bars: 95% intervals" not in words
    assert tiles[0].groups[1][1][0].value in words


def test_shape_and_repair_are_columns_and_lines_of_the_curve(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", models=SMALL, tasks=(), usage=False, plans=False, compared=False)
    results = json.loads((folder / "results.json").read_text())
    thin = []
    for cell in (c for c in results["cells"] if c["method"] not in ("full", "random")):
        label = f"{cell['label']} + ridge, {cell['keep']}x16"
        thin.append({**cell, "id": f"{cell['id']}-thin", "label": label, "repair": "ridge", "width": 16})
    (folder / "results.json").write_text(json.dumps({**results, "cells": results["cells"] + thin}))
    page = Page(rendered(folder)[0])
    head, full, *rows = page.tables["m1-tiny-perplexity"]
    assert [text for _, text in head[:5]] == ["method", "repair", "experts' bytes kept", "experts × channels", "runs"]
    assert [text for _, text in full[:4]] == ["full model", "–", "100%", "8"]
    ours = [[text for _, text in row[:4]] for row in rows if row[0][1] == OURS]
    kept = (("75%", 6), ("50%", 4), ("25%", 2))
    assert ours == [[OURS, r, b, f"{k}{w}"] for b, k in kept for r, w in (("–", ""), ("ridge", "x16"))]
    (model,) = findings(read_run(folder))
    calibrated = (OURS, "REAP", "ExpertSparsity")
    families = families_of(model)
    assert {f.name for f in families} == {"random", *calibrated, *(f"{n} + ridge, thinner" for n in calibrated)}
    assert set(loss_pictures(model)) == {"mean", "worst"}
    drawn = {f.name for f in shown([*families, *families])}
    assert drawn >= {OURS, f"{OURS} + ridge, thinner"}
    assert "random" not in drawn  # all others lose less at every size


def test_infinite_perplexity_is_said_not_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", models=SMALL, tasks=(), usage=False, plans=False)
    results = json.loads((folder / "results.json").read_text())
    for cell in results["cells"]:
        if cell["label"] == "REAP":
            cell["row"]["perplexity"]["c4"]["perplexity"] = float("inf")
    (folder / "results.json").write_text(json.dumps(results))
    page = check_structure(rendered(folder)[0])
    assert page.words.count("not finite") == 3
    assert not re.search(r"(inf|nan)\b", page.words)


# --------------------------------------------------------------------------------------------------------------- safety
def test_hostile_names_are_text(tmp_path: Path) -> None:
    methods = [(HOSTILE + str(i), *m[1:]) for i, m in enumerate(METHODS)]
    folder = make_run(
        tmp_path / "run",
        models=((HOSTILE, 2, 8), (HOSTILE + "2", 2, 8)),
        methods=methods,
        tasks=(HOSTILE, "b"),
        texts=(HOSTILE,),
        corpora=(HOSTILE, "ß"),
        budgets=(0.25, 0.5),
        fails=(methods[1][0],),
        reason=HOSTILE,
        command=HOSTILE,
    )
    text, files = rendered(folder)
    page = check_structure(text)
    assert HOSTILE in page.words
    assert not any(a.get("src") == "x" for a in page.all("img"))
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in files)
    assert len({name.lower() for name in files}) == len(files)


def test_long_names_and_many_methods(tmp_path: Path) -> None:
    methods = [
        (f"method {i} of a very long name that goes on and on, with options {i}", "pooled", "reap", i / 20, (None,))
        for i in range(18)
    ]
    folder = make_run(tmp_path / "run", models=(("a-model-with-a-name-" * 6, 2, 8),), methods=methods, usage=False)
    text, _ = rendered(folder)
    check_structure(text)
    assert len(text) < 5_000_000


@pytest.mark.parametrize(
    "content, said",
    [
        (None, r"it contains no results.json.*the folder of work of `shrink` \(OUT-work\)"),
        ("{", r"results.json is damaged: .*Run `moecover compare` again"),
        ("[]", r"it holds list, a JSON object is needed"),
        ('{"schema": 2}', r"has schema 2, but this version reads 1"),
        ('{"schema": 1, "models": []}', r"is damaged: cells: Field required"),
        (
            '{"schema": 1, "models": [], "cells": [{"id": 1}]}',
            r"is damaged: cells.0.id: Input should be a valid string",
        ),
    ],
)
def test_a_folder_that_is_no_run_is_refused_in_one_line(
    tmp_path: Path, capsys: Any, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error)
    assert error.count("\n") == 1 or "drawing the page" in error.splitlines()[0]
    assert not (tmp_path / "page.html").exists()
    assert not (tmp_path / "page_files").exists()


def test_damaged_usage_and_comparisons_are_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", models=SMALL, plans=False)
    usage, results = json.loads((folder / "usage.json").read_text()), json.loads((folder / "results.json").read_text())
    usage[0]["corpora"]["c4"]["boolq"]["spearman"].pop()
    (folder / "usage.json").write_text(json.dumps(usage))
    with pytest.raises(
        InputError,
        match=r"usage.json is damaged: 0: .*one value for each of the 3 layers.*Run `moecover compare` again",
    ):
        rendered(folder)
    del results["comparisons"][2]["verdict"]
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(InputError, match=r"results.json is damaged: comparisons.2.verdict: Field required"):
        rendered(folder)


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it does not exist"):
        read_run(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="it is a file"):
        read_run(tmp_path / "file")


def test_a_damaged_plan_takes_its_heat_map_and_nothing_else(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", models=SMALL, tasks=(), texts=(), usage=False, compared=False)
    next((folder / "plans").glob("*-2.json")).write_text("{")
    page = check_structure(rendered(folder)[0])
    assert "No heat map at 25%: " in page.words
    assert len(page.all("img")) == 2


# ---------------------------------------------------------------------------------------------------------------- files
def test_page_and_pictures_are_written_and_not_overwritten(tmp_path: Path, capsys: Any) -> None:
    folder = make_run(tmp_path / "run", models=SMALL, tasks=TASKS[:2], texts=("c4",), budgets=(0.5,))
    page = tmp_path / "out" / "report.html"
    assert main(["report", str(folder), "-o", str(page), "--json", "-q"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["bytes"] == page.stat().st_size
    found = sorted(str(p) for p in (tmp_path / "out" / "report_files").iterdir())
    assert found == sorted(made["pictures"])
    assert {p.rpartition(".")[0] for p in found if p.endswith("png")} == {
        p.rpartition(".")[0] for p in found if p.endswith("svg")
    }
    for path in map(Path, found):
        if path.suffix == ".png":
            assert Image.open(path).size[0] >= (1000 if "utility" in path.name else 1200)
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert main(["report", str(folder), "-o", str(page), "-q"]) == 2
    assert "exists. Choose another output, or give --overwrite" in capsys.readouterr().err
    before = page.read_bytes()
    assert main(["report", str(folder), "-o", str(page), "-q", "--overwrite"]) == 0
    assert page.read_bytes() == before  # the same run gives the same bytes
    (tmp_path / "out" / "report_files" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes.txt, which is not a figure"):
        report(folder, page, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report_files"]


def test_figures_go_where_they_are_asked_to(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", models=SMALL, tasks=(), texts=("c4",), usage=False, plans=False)
    made = report(folder, tmp_path / "a.html", figures=tmp_path / "pictures")
    assert {Path(p).parent for p in made["pictures"]} == {tmp_path / "pictures"}


def test_the_page_needs_no_torch(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", models=SMALL, texts=("c4",), usage=False, budgets=(0.5,))
    code = (
        "import sys; from moecover.cli.main import main; assert main(sys.argv[1:]) == 0; "
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, "report", str(folder), "-o", str(tmp_path / "page.html")], check=True)


# ------------------------------------------------------------------------------------------------------------- pictures
def test_names_beside_lines_keep_apart_and_in_order() -> None:
    rng = np.random.default_rng(0)
    for number in range(1, 12):
        wanted, heights = rng.random(number), rng.uniform(0.02, 0.09, number)
        places, order = np.array(apart(wanted.tolist(), heights.tolist())), np.argsort(wanted, kind="stable")
        ends = places - heights / 2, places + heights / 2
        assert (ends[0][order][1:] >= ends[1][order][:-1] - 1e-9).all()
        assert places.min() >= -1e-9
        assert places.max() <= 1 + 1e-9
    assert apart([0.1, 0.9], [0.05, 0.05]) == pytest.approx([0.1, 0.9])
    assert apart([0.5, 0.5], [0.1, 0.1]) == pytest.approx([0.45, 0.55])
    assert apart([0.9, 0.1], [0.05, 0.05]) == pytest.approx([0.9, 0.1])
