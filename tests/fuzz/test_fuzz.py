"""A short, fixed set of damaged files of every kind; `make fuzz` runs new ones for an hour."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.base import made_base
from tests.fuzz.rule import broken
from tests.fuzz.targets import TARGETS, tried

EXAMPLES = 12
SLOW = {"results": 3, "usage": 3, "plugin": 6}  # examples where a command draws figures, or is a process of its own


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_refused_in_one_line(name: str, base: Path, tmp_path: Path) -> None:
    target = TARGETS[name]

    @settings(
        max_examples=SLOW.get(name, EXAMPLES),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(content=st.deferred(lambda: target.damage(target.file(base).read_bytes())))
    def holds(content: bytes) -> None:
        for command in tried(target, base, tmp_path / "tried", content):
            found = broken(command)
            assert found is None, f"{command.arguments[0]} of {content[:300]!r}: {found}"

    holds()


def test_the_undamaged_folder_is_accepted(base: Path, tmp_path: Path) -> None:
    done = set[object]()
    for name, target in TARGETS.items():
        for command in tried(target, base, tmp_path / "tried", target.file(base).read_bytes()):
            if command.arguments[0] in done:
                continue
            done.add(command.arguments[0])
            assert broken(command) is None, name
            assert command.output is None or command.output.exists(), name
    assert len(done) >= 10
