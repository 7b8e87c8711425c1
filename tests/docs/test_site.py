"""The documentation: every page in the menu, every link and anchor there, and a site that builds without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import moecover
from tests.support.pages import DOCS, ROOT, anchors, links

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

# A script, a picture, a font or a style sheet that a reader's browser would fetch from elsewhere.
FETCHED = re.compile(r'<(?:script|img)[^>]* src="https?:|<link[^>]* rel="(?:stylesheet|preconnect)"[^>]* href="https?:')


def named(menu: object) -> list[str]:
    """The pages of a menu, in its order."""
    if isinstance(menu, str):
        return [menu]
    entries = menu if isinstance(menu, list) else list(menu.values()) if isinstance(menu, dict) else []
    return [page for entry in entries for page in named(entry)]


def test_every_page_is_in_the_menu_once() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["strict"]
    assert [title for entry in settings["nav"] for title in entry] == ["Home", "Guides", "Reference", "Lab records"]
    assert sorted(named(settings["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_reference_has_every_public_name() -> None:
    found = re.findall(r"^::: moecover\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(found) == sorted(moecover.__all__)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Strict: a page outside the menu, a broken link or anchor, a parameter that a signature lacks end the build."""
    pytest.importorskip("mkdocs", reason="the site needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    reference = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert [name for name in moecover.__all__ if f'id="moecover.{name}"' not in reference] == []
    pages = [page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("*.html")]
    assert not any(FETCHED.search(page) for page in pages)
