"""The form of the code where the linter could be told to look away."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "benchmarks", "docs", "training", "examples")
SETTINGS = ("pyproject.toml", "Makefile", "mkdocs.yml", ".pre-commit-config.yaml", ".github/workflows/ci.yml")
LONGEST = 120
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
