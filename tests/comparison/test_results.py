"""`compare` as a Python function: forms of a configuration, what it returns and shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from moecover.comparison.config import Config
from moecover.comparison.run import compare
from moecover.errors import InputError
from moecover.files.hashing import unsealed
from moecover.progress import SILENT


class Log:
    """Progress that keeps the lines of log and shows nothing."""

    def __init__(self, lines: list[str]) -> None:
        self.bar, self.spinner, self.say = SILENT.bar, SILENT.spinner, lines.append


def test_compare_returns_what_it_wrote(
    grid: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The path, the fields and the object of a configuration are the same; lines go to `progress` alone."""
    path, out, lines = grid(methods=["random", "tb-coverage"]), tmp_path / "run", list[str]()
    found = compare(path, out, progress=Log(lines))
    assert found.results == unsealed(json.loads((out / "results.json").read_text()))
    assert (found.run, found.made, len(found.done), found.failures) == (out, 4, 4, {})
    assert repr(found) == f"<Comparison {out}: 4 cells, 4 of them new>"
    table = found.rows_shown()
    assert [row["method"] for row in table] == ["full model", "random", "random", "TB-Coverage (contribution)"]
    assert [row["experts"] for row in table] == [12, 6, 6, 6]
    assert table[-1]["calibration"] == "a+b"
    figures = found.results["cells"][-1]["row"]
    assert figures is not None
    assert table[-1]["perplexity test"] == figures["perplexity"]["test"]["perplexity"]
    assert any("4 cells, 0 done, 4 to go" in line for line in lines)
    fields = yaml.safe_load((out / "config.yaml").read_text())
    for same in (fields, Config.model_validate(fields), str(out / "config.yaml")):
        again = compare(same, str(out), progress=False)
        assert (again.made, again.rows_shown()) == (0, table)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_mistakes_in_python(grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They name arguments, and fields without a file; paths are taken from the current folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="^jobs=0 is out of range: 1 or more$"):
        compare(grid(), tmp_path / "run", jobs=0)
    fields = yaml.safe_load(grid().read_text())
    with pytest.raises(InputError, match="^unknown key 'modles'. Did you mean models"):
        compare({**fields, "modles": []}, tmp_path / "run")
    with pytest.raises(InputError, match="^method tb-coverage is deterministic: it has no seeds$"):
        compare({**fields, "methods": [{"method": "tb-coverage", "seeds": [1]}]}, tmp_path / "run")
