"""The guides' commands, run as they stand: every ``sh`` block of a guide in one empty folder, one after the other.

A block that cannot run here (hub, GPU, another program) says so and why in its first line. Guides use models that come
with the package; for GGUF a tiny file lies in the folder.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moecover.cli.main import make_parser
from tests.support.gguf_models import OPTIONS, convert
from tests.support.pages import DOCS, NOT_RUN, ROOT, blocks
from tests.support.tiny import make_checkpoint

GUIDES = sorted((DOCS / "guides").glob("*.md"))
RUN = [guide for guide in GUIDES if any(block.is_run for block in blocks(guide))]
QUICK = "troubleshooting"


def commands(guide: Path) -> str:
    return "\n".join(block.text for block in blocks(guide) if block.is_run)


def in_folder(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run commands as a shell of the user would, stopping at the first that fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", script]
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_blocks_that_are_not_run_say_why() -> None:
    for guide in GUIDES:
        for block in blocks(guide):
            assert block.language in {"sh", "python", "json"}, f"{guide.name}:{block.line}"
            if not block.is_run and block.language == "sh":
                assert len(block.text.splitlines()[0].removeprefix(NOT_RUN)) > 10, f"{guide.name}:{block.line}"
    assert len(RUN) >= 8


def given(text: str) -> Iterator[list[str]]:
    """The arguments of every ``moecover`` in shell lines, at their beginning, behind ``&&`` or behind ``torchrun``."""
    for line in text.replace("\\\n", " ").splitlines():
        for found in re.finditer(r"(?:^|&& |^torchrun .* -m )moecover ([^#&|]*)", line):
            yield shlex.split(found[1])


def test_all_commands_are_ones_that_the_program_knows(capsys: pytest.CaptureFixture[str]) -> None:
    """Verbs and options of every block in the docs, of those that no test runs too."""
    parser, count = make_parser(), 0
    for page in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))):
        for block in blocks(page):
            for arguments in given(block.text) if block.language in {"sh", "bash", ""} else ():
                count += 1
                try:
                    _, unknown = parser.parse_known_args(arguments)
                except SystemExit:
                    pytest.fail(f"{page.name}:{block.line}: {shlex.join(arguments)}\n{capsys.readouterr().err}")
                assert unknown == [], f"{page.name}:{block.line}"
    assert count > 70


def test_guides_are_short() -> None:
    """Two screens: what is longer belongs to the reference."""
    long = {guide.name: lines for guide in GUIDES if (lines := len(guide.read_text().splitlines())) > 80}
    assert long == {}


def test_messages_of_the_troubleshooting_page_are_the_programs() -> None:
    rows = re.findall(r"^\| (`.+?`) \|", (DOCS / "guides" / "troubleshooting.md").read_text(), re.MULTILINE)
    words = [word for row in rows for word in re.findall("`([^`]+)`", row)]
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # a message that goes on in the next line
    assert len(words) >= 20
    assert [word for word in words if word not in joined] == []


def test_the_quickest_guide_runs(tmp_path: Path) -> None:
    done = in_folder(tmp_path, commands(DOCS / "guides" / f"{QUICK}.md"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "moecover" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("guide", [guide for guide in RUN if guide.stem != QUICK], ids=lambda guide: guide.stem)
def test_a_guide_runs(guide: Path, tmp_path: Path) -> None:
    if guide.stem == "gguf":
        pytest.importorskip("xllamacpp", reason="GGUF files run in llama.cpp: pip install 'moecover[gguf]'")
        convert(make_checkpoint(tmp_path / "tiny", "qwen2_moe", **OPTIONS["qwen2_moe"]), tmp_path / "model.gguf")
    done = in_folder(tmp_path, commands(guide))
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
