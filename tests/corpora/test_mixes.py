"""Corpora in a file: what they stand for, what every command makes of them, and files that are no mix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moecover
from moecover.comparison.config import corpora_of
from moecover.corpora.arguments import parse_corpora, with_reading
from moecover.errors import InputError
from moecover.planning.artifact import Plan
from moecover.planning.lines import calibration_notes
from moecover.planning.run import plan_budgets
from moecover.profiling.artifact import Profile
from tests.conftest import write_rows
from tests.support.command_line import run
from tests.support.tiny import TEXT

MIX = """
- name: mine
  source: texts.jsonl?text=body
  weight: 3
  sequences: 4
  seed: 7
- name: others
  source: more/rows.jsonl
  parse_special: true
- other=more/rows.jsonl?n=20
- web
- name: c4
  source: hf:owner/name[en]/train
  revision: v1
"""


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    (tmp_path / "more").mkdir()
    write_rows(tmp_path / "texts.jsonl", [{"body": f"{i} {TEXT}"} for i in range(40)])
    write_rows(tmp_path / "more/rows.jsonl", [{"text": f"{i} <end> {TEXT}"} for i in range(40)])
    path = tmp_path / "mix.yaml"
    path.write_text(MIX)
    return path


def test_a_mix_stands_for_arguments(mix: Path) -> None:
    assert parse_corpora([str(mix)]) == {
        "mine": f"{mix.parent}/texts.jsonl?weight=3&sequences=4&seed=7&text=body",
        "others": f"{mix.parent}/more/rows.jsonl?parse_special=yes",
        "other": f"{mix.parent}/more/rows.jsonl?n=20",
        "web": "",
        "c4": "hf:owner/name[en]/train?revision=v1",
    }
    assert corpora_of([str(mix), "wikitext2"]) == ["mine", "others", "other", "web", "c4", "wikitext2"]
    assert with_reading(["web", "x=a.jsonl?text=b"], {"text": "c", "parse_special": None}) == [
        "web=web?text=c",
        "x=a.jsonl?text=b",
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1", "mix.yaml: it must be a list of corpora, each with a name"),
        ("[", "mix.yaml is not YAML"),
        ("- web\n- source: c4", "mix.yaml, line 2: the corpus has no name"),
        ("- name: a\n  weigth: 2", "mix.yaml, line 1: unknown key 'weigth'. Did you mean weight"),
        ("- web\n\n- name: c4\n  weight: -1", "mix.yaml, line 3: weight=-1 is out of range. Allowed: a whole number"),
        ("- web\n- name: c4\n  seed: 1\n  seed: 2", "mix.yaml, line 4: seed is given twice, first in line 3"),
        ("- [web]", "mix.yaml, line 1: .* is no corpus. Give its name, source"),
        ("- name: no\n  source: a.txt", "mix.yaml, line 1: name is False, which is no text. Put it in quotes"),
        ("- web\n- name: x\n  source:", "mix.yaml, line 2: source is None, which is no text"),
        ("- name: x\n  source: nowhere.jsonl", "corpus file .*nowhere.jsonl does not exist"),
        ("- web\n- web", "corpus web is given twice"),
    ],
)
def test_files_that_are_no_mix(text: str, message: str, mix: Path) -> None:
    mix.write_text(text)
    with pytest.raises(InputError, match=message):
        parse_corpora([str(mix)])
    with pytest.raises(InputError, match="mix nowhere.yaml could not be read: No such file"):
        parse_corpora(["nowhere.yaml"])


def test_profile_and_plan_take_it_and_record_it(
    mix: Path, checkpoints: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = checkpoints("qwen2_moe"), mix.parent
    mix.write_text(MIX[: MIX.index("- web")])
    given = ["--corpora", mix, "--sequences", 6, "--length", 32]
    assert run(capsys, "profile", model, *given, "-o", folder / "p")[0] == 0
    made = Profile.load(folder / "p")
    records: dict[str, dict[str, Any]] = {name: found[0] for name, found in made.corpora.items()}
    assert {name: one["sequences"] for name, one in records.items()} == {"mine": 4, "others": 6, "other": 6}
    assert {"weight": 3, "seed": 7, "text": "body", "source": "texts.jsonl"}.items() <= records["mine"].items()
    assert records["others"]["parse_special"] is True
    (weighted,) = plan_budgets(made, keeps=[6], method="tb-coverage")
    (asked,) = plan_budgets(made, keeps=[6], method="tb-coverage", weights={"mine": 3})
    assert weighted.options["weights"] == asked.options["weights"] == {"mine": 3}
    assert weighted.layers == asked.layers
    assert "weights" not in plan_budgets(made, keeps=[6], method="random")[0].options
    (pooled,) = plan_budgets(made, keeps=[6], method="pooled")
    note = "note: the weights of the mix (mine) are not used: method pooled rates every corpus alike"
    assert note in calibration_notes(pooled, made)
    assert not [line for line in calibration_notes(weighted, made) if "weights" in line]
    one_shot = ["prune", model, *given, "--keep", 6, "--method", "tb-coverage", "-o", folder / "out"]
    assert run(capsys, *one_shot)[0] == 0
    manifest = json.loads((folder / "out/moecover.json").read_text())
    assert Plan.from_json(json.dumps(manifest["plan"]), name="x").layers == weighted.layers
    assert run(capsys, "shrink", model, "--budget", "50%", *given[:2], "-o", folder / "s", "--dry-run")[0] == 0
    status, _, err = run(capsys, "profile", model, "--corpora", folder / "texts.jsonl", "-o", folder / "q")
    assert (status, "a mix ends in .yaml or .yml. A corpus is given as --corpus" in err) == (2, True)
    status, _, err = run(capsys, "shrink", model, "--budget", "50%", "--parse-special", "-o", folder / "s")
    assert (status, "--parse-special says how corpora are read, and none is given" in err) == (2, True)
    assert list(moecover.profile(model, str(mix), progress=False, sequences=2, length=16).corpora) == list(records)
