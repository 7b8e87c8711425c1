"""The public face of the package: its names, their types, what importing it does, and that Python has every verb."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import moecover
from moecover.cli.main import VERBS

SOURCE = Path(moecover.__file__)
ROOT = Path(__file__).parents[1]


def imported_for_types() -> set[tuple[str, str]]:
    """Module and name of every import that only type checkers see."""
    tree = ast.parse(SOURCE.read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {
        (str(node.module).removeprefix("moecover."), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_types_names_and_table_agree() -> None:
    table = {(module, name) for module, names in moecover.PUBLIC.items() for name in names}
    assert imported_for_types() == table
    assert sorted(moecover.__all__) == sorted(name for _, name in table)


@pytest.mark.parametrize("name", moecover.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    found = getattr(moecover, name)
    if inspect.isfunction(found) or inspect.isclass(found):
        assert (found.__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'profil'"):
        _ = moecover.profil  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", [v for v in VERBS if v not in ("demo", "ls", "init", "env", "completion")])
def test_every_verb_is_a_function(verb: str) -> None:
    """With a ``progress`` argument where it takes long, and a model in any form where it takes one."""
    function = getattr(moecover, verb)
    parameters = inspect.signature(function).parameters
    if verb not in ("inspect", "merge", "explain"):
        assert parameters["progress"].default is True
    if "checkpoint" in parameters:
        assert "Model" in str(parameters["checkpoint"].annotation)


@pytest.mark.slow  # part of `make lint` too, whose cache this run does not share
def test_a_script_passes_the_strict_type_checker() -> None:
    """The types are public and complete: an example of every function, held against them."""
    script = ROOT / "examples" / "pipeline.py"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
