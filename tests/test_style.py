"""The form of the code where the linter could be told to look away."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "benchmarks", "docs", "training", "examples")
SETTINGS = ("pyproject.toml", "Makefile", "mkdocs.yml", ".pre-commit-config.yaml", ".github/workflows/ci.yml")
LONGEST = 120
LONGEST_FILE = 300
LONGEST_BODY = 60
SKIPS = re.compile(r"#\s*(fmt:\s*(skip|off)|yapf:\s*disable|noqa(:[\s\w,]*\bE501|\s*$))")


def test_no_line_is_longer_and_no_formatting_is_skipped() -> None:
    """In every Python file, those that belong to a shipped model included, and in the settings; counted in bytes.

    Tools that count bytes agree with those that count characters then.
    """
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 300
    settings = [ROOT / name for name in SETTINGS]
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in (*files, *settings, *sorted((ROOT / "examples").glob("*.ipynb")))
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if len(line.encode()) > LONGEST or SKIPS.search(line)
    ]
    assert found == []


def test_no_file_of_the_package_is_long_and_no_function_is() -> None:
    """A function counts from behind its docstring: signatures and what is said of arguments may be long."""
    files = sorted((ROOT / "src").rglob("*.py"))
    assert len(files) > 200
    found = list[str]()
    for file in files:
        text, name = file.read_text(encoding="utf-8"), file.relative_to(ROOT)
        if (lines := len(text.splitlines())) > LONGEST_FILE:
            found.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _body(node) > LONGEST_BODY:
                found.append(f"{name}:{node.lineno} {node.name}: {_body(node)} lines")
    assert found == []


def _body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's statements, without signature and docstring."""
    said = ast.get_docstring(function, clean=False) is not None
    statements = function.body[1:] if said else function.body
    return statements[-1].end_lineno - statements[0].lineno + 1 if statements else 0
