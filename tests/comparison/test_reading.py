"""Configurations: from a file and flags, and the errors in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moecover.cli.main import main
from moecover.comparison.reading import read
from tests.support.grids import rows, run, write_text_file, written


def test_flags_give_the_same_configuration(grid: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    path = grid()
    monkeypatch.chdir(tmp_path)
    model = yaml.safe_load(path.read_text())["models"][0]["model"]
    flags = [
        "--corpus",
        "a=a.jsonl",
        "--corpus",
        "b=b.jsonl",
        "--sequences",
        "6",
        "--length",
        "32",
        "--search-tokens",
        "128",
    ]
    flags += [
        "--seeds",
        "0,1",
        "--retain",
        "0.5",
        "--perplexity",
        "test=test.jsonl",
        "--window",
        "32",
        "--windows",
        "6",
    ]
    assert main(["compare", model, "-o", "by-flags", "-q", *flags]) == 0
    assert run(path, tmp_path / "by-file") == 0
    one, two = (yaml.safe_load((tmp_path / n / "config.yaml").read_text()) for n in ("by-flags", "by-file"))
    assert one["models"][0].pop("name") == Path(model).name
    assert two["models"][0].pop("name") == "qwen"
    assert one == two
    assert [float(r["value"]) for r in rows(tmp_path / "by-flags")] == [
        float(r["value"]) for r in rows(tmp_path / "by-file")
    ]


def test_a_flag_takes_the_place_of_a_field(grid: Callable[..., Path]) -> None:
    asked = read(grid(keep=None), {"keep": [7], "seeds": [5]})
    assert (asked.config.retain, asked.config.keep, asked.config.seeds) == (None, [7], [5])


def test_devices_of_a_file_are_in_the_configuration(grid: Callable[..., Path], tmp_path: Path) -> None:
    """A run does not depend on the file; relative paths begin where those of corpora do."""
    devices = {"model": 0, "lm_head": "cuda:1"}
    (tmp_path / "map.json").write_text(json.dumps(devices))
    assert read(grid(device_map="map.json"), {}).config.device_map == devices
    assert read(grid(), {"device_map": str(tmp_path / "map.json")}).config.device_map == devices


def test_sources_are_where_the_file_says_and_mixes_are_what_they_hold(
    grid: Callable[..., Path], tmp_path: Path
) -> None:
    """Whatever a source is; and the configuration of a run names the corpora of a mix, not the file."""
    (tmp_path / "mixes").mkdir()
    mix = "- {name: b, source: ../b.jsonl, weight: 3}\n- web\n- {name: x, source: 'hf:owner/x', text: body}\n"
    (tmp_path / "mixes/mix.yaml").write_text(mix)
    given = [
        "mixes/mix.yaml",
        "a=a.jsonl?n=5",
        "code=mixes?glob=**/*.yaml",
        "c4=c4?sequences=4",
        "hub=hf:owner/y[z]",
        "in=-",
    ]
    of_mix = [f"b={tmp_path}/mixes/../b.jsonl?weight=3", "web", "x=hf:owner/x?text=body"]
    others = [f"a={tmp_path}/a.jsonl?n=5", f"code={tmp_path}/mixes?glob=**/*.yaml", *given[3:]]
    config = read(grid(calibration=given, perplexity=["c4", "z=hf:owner/z/test"]), {}).config
    assert config.calibration == [[*of_mix, *others]]
    assert config.perplexity == ["c4", "z=hf:owner/z/test"]
    assert read(grid(calibration="mixes/mix.yaml"), {}).config.calibration == [of_mix]
    assert read(grid(calibration=[["mixes/mix.yaml"], ["c4"]]), {}).config.calibration == [of_mix, ["c4"]]
    assert read(grid(), {"calibration": [["hub=hf:owner/y", "web=web?n=2"]]}).config.calibration == [
        ["hub=hf:owner/y", "web=web?n=2"]
    ]


def test_the_resolved_configuration_is_one(grid: Callable[..., Path], tmp_path: Path) -> None:
    methods = [{"method": "tb-coverage", "protect": 0.25, "saliency": ["reap", "ean"]}, "random"]
    path = grid(methods=methods)
    assert run(path, tmp_path / "run") == 0
    assert read(tmp_path / "run" / "config.yaml", {}).config == read(path, {}).config
    before = written(tmp_path / "run")
    assert run(tmp_path / "run" / "config.yaml", tmp_path / "run") == 0
    assert written(tmp_path / "run") == before


GOOD = """models: [{model}]
calibration:
  - [a=a.jsonl, b=b.jsonl]
methods:
  - random
  - method: tb-coverage
    protect: 0.5
retain: [0.5]
perplexity: [test=test.jsonl]
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("retain: [0.5]", "retian: [0.5]", 8, "unknown key 'retian'. Did you mean retain? Known: models, calibration"),
        ("retain: [0.5]", "retain: [half]", 8, "`retain.0`: input should be a valid number, not 'half'"),
        (
            "retain: [0.5]",
            "retain: [0.5, 0.1]",
            8,
            "qwen: retain=0.1 keeps 1 of 12 experts, which leaves fewer experts than the router's top-k of 4",
        ),
        ("retain: [0.5]", "retain: [0.5, 0.51]", 8, "qwen: the budgets keep 6, 6 experts: give every one once"),
        (
            "retain: [0.5]",
            "retain: 0.5\nkeep: 6",
            None,
            "give one of `retain` (fractions), `keep` (experts per layer) and `shapes` (experts x channels), not both",
        ),
        ("retain: [0.5]", "retain: [0.5]\nseeds: []", 9, "`seeds`: at least one value is needed"),
        ("retain: [0.5]", "retain: [0.5]\nseeds: [1, 1]", None, "`seeds` has 1 twice"),
        (
            "retain: [0.5]",
            "retain: [0.5]\nbatch_size: 0",
            9,
            "`batch_size`: input should be greater than or equal to 1, not 0",
        ),
        ("retain: [0.5]", "retain: [0.5]\nretain: [0.75]", 9, "retain is given twice, first in line 8"),
        ("retain: [0.5]", "retain: [0.5]\nmemory_limit: much", 9, "'much' is no size"),
        ("retain: [0.5]", "retain: [0.5]\ndtype: int3", 9, "int3"),
        ("retain: [0.5]", "retain: [0.5]\ndevice_map: fast", 9, "device_map=fast is neither auto, balanced"),
        ("retain: [0.5]", "retain: [0.5]\ndevice_map: {{model: moon}}", 9, "device=moon is not available"),
        ("retain: [0.5]", "retain: [0.5]\nrepairs: [rigde]", 9, "unknown repair 'rigde'. Did you mean ridge?"),
        ("    protect: 0.5", "    repair: some", 7, "unknown repair 'some'. Known: none, refit, ridge, scale"),
        (
            "retain: [0.5]",
            "retain: [0.5]\nrepairs: [ridge]\nrepair_tokens: 3",
            10,
            "repair_tokens=3: 1 tokens a corpus are less than the first sequence of a",
        ),
        ("retain: [0.5]", "retain: [0.5", 9, "not YAML"),
        ("  - random", "  - rndom", 5, "unknown method 'rndom'. Did you mean random?"),
        ("    protect: 0.5", "    protcet: 0.5", 6, "protcet is no option of method tb-coverage"),
        ("    protect: 0.5", "    protect: 7", 6, "protect=7 is out of range"),
        ("    protect: 0.5", "    saliency: reep", 6, "unknown saliency 'reep'. Did you mean reap"),
        ("    protect: 0.5", "    seeds: [1]", 6, "method tb-coverage is deterministic"),
        ("  - random", "  - tb-coverage\n  - tb-coverage", 6, "two methods are called TB-Coverage (contribution)"),
        ("b=b.jsonl", "b=c.jsonl", 3, "c.jsonl does not exist"),
        ("b=b.jsonl", "no.yaml", 3, "no.yaml could not be read: No such file or directory"),
        ("b=b.jsonl", "'b=b.jsonl?tetx=body'", 3, "corpus b: unknown option 'tetx'. Did you mean text"),
        ("b=b.jsonl", "wikitxt2", 3, "unknown corpus 'wikitxt2'. Did you mean wikitext2?"),
        (
            "perplexity: [test=test.jsonl]",
            "perplexity: []",
            None,
            "nothing to measure: give `perplexity`, `tasks` or both",
        ),
        ("perplexity: [test=test.jsonl]", "perplexity: [test=empty.jsonl]", 9, "empty"),
        ("perplexity: [test=test.jsonl]", "perplexity: [tset]", 9, "unknown corpus 'tset'"),
        ("models: [{model}]", "models: [{{model: shipped:nobody}}]", 1, "unknown shipped model 'nobody'"),
        ("models: [{model}]", "models: [{{nmae: x}}]", 1, "`models.0.model` is missing"),
        ("models: [{model}]", "models: [./no-such-folder]", 1, "no-such-folder"),
        (
            "models: [{model}]",
            "models: [{{model: x, nmae: y}}]",
            1,
            "unknown key 'nmae'. Did you mean name? Known: model, revision, name",
        ),
        ("models: [{model}]\n", "", None, "`models` is missing"),
    ],
)
def test_mistakes_in_the_file(
    tmp_path: Path, checkpoints: Any, capsys: Any, old: str, new: str, line: int | None, message: str
) -> None:
    for number, name in enumerate(("a", "b", "test")):
        write_text_file(tmp_path / f"{name}.jsonl", number, 4000)
    (tmp_path / "empty.jsonl").write_text("")
    assert GOOD.count(old) == 1
    text = GOOD.replace(old, new).format(model=f"{{model: {checkpoints('qwen2_moe')}, name: qwen}}")
    (tmp_path / "grid.yaml").write_text(text)
    assert main(["compare", str(tmp_path / "grid.yaml"), "-o", str(tmp_path / "run"), "-q"]) == 2
    captured = capsys.readouterr()
    where = f"{tmp_path / 'grid.yaml'}, line {line}: " if line else f"{tmp_path / 'grid.yaml'}: "
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"moecover: {where}")
    assert message in captured.err
    assert not (tmp_path / "run" / "cells").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--retain", "0.5", "--keep", "6"], "give one of `retain`"),
        (["--retain", "0.01"], "--retain: qwen: retain=0.01 keeps 0 of 12 experts"),
        (["--memory-limit", "600MB"], "--memory-limit: qwen: one layer at a time still needs 0."),
        (["--jobs", "0"], "--jobs 0 is out of range"),
        (["--corpus", "x=x.jsonl"], "--corpus: corpus file "),
        (["--method", "rndom"], "unknown method 'rndom'. Did you mean random?"),
        (["--seeds", "1,1"], "`seeds` has 1 twice"),
    ],
)
def test_mistakes_in_flags(
    grid: Callable[..., Path], tmp_path: Path, capsys: Any, flags: list[str], message: str
) -> None:
    assert run(grid(), tmp_path / "run", *flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_other_mistakes(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    path = grid()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for arguments, message in (
        ([str(path), "-o", str(tmp_path / "mine")], "was not written by `moecover compare`"),
        ([str(path), "x", "-o", str(tmp_path / "run")], "give one configuration, or models"),
        (["model", "-o", str(tmp_path / "run")], "give calibration corpora with --corpus"),
        (["no.yaml", "-o", str(tmp_path / "run")], "no configuration no.yaml"),
        (
            ["m.gguf", "--file", "n.gguf", "--trust-remote-code", "-o", str(tmp_path / "run")],
            "--trust-remote-code and --file exclude each other",
        ),
    ):
        assert main(["compare", *arguments, "-q"]) == 2
        assert message in capsys.readouterr().err
