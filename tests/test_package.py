"""What the wheel says of the package: its description, and the extras that the documentation lists."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def description(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """The function of the build hook, without hatchling, which is only there when a wheel is built."""
    interface = ModuleType("hatchling.metadata.plugin.interface")
    interface.MetadataHookInterface = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[str, str], str] = module.description
    return found


@pytest.mark.parametrize("home", ["", "https://example.org/moecover"])
def test_no_link_of_the_description_is_relative(description: Callable[[str, str], str], home: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]*)\)", description(text, home))
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert (f"{home}/blob/main/docs/install.md" in links) == (f"{home}/raw/main/docs/demo.png" in links) == bool(home)
    assert len(links) > 30 or not home


def test_every_extra_is_documented() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "install.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(extras)
