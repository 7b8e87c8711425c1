"""Progress: live bars in terminals and notebooks, one line elsewhere, nothing when it is not wanted."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from moecover import progress


def test_without_a_terminal_a_bar_is_one_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("profiling", 1200) as advance:
        advance(700)
        assert capsys.readouterr().err == ""
        advance(500)
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("profiling: 1,200 tokens in 0.")
    assert out.err.endswith(" s\n")
    assert out.err.count("\n") == 1


def test_a_bar_that_fails_does_not_say_that_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), progress.bar("profiling", 1200):
        raise ValueError
    assert capsys.readouterr().err == ""


def test_without_a_terminal_a_spinner_is_a_line_per_label(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.spinner("reading") as relabel:
        relabel("still reading")
    assert capsys.readouterr().err == "reading\nstill reading\n"


@pytest.mark.parametrize("unit, amount", [("tokens", "1200/1200"), ("bytes", "1.2/1.2 kB")])
def test_in_a_terminal_a_bar_is_drawn(unit: str, amount: str) -> None:
    text = io.StringIO()
    drawn = progress.Drawn(Console(file=text, force_terminal=True, width=100))
    with drawn.bar("profiling", 1200, unit=unit) as advance:
        advance(1200)
    assert "profiling" in text.getvalue()
    assert amount in text.getvalue()
    assert "━" in text.getvalue()


def test_a_label_that_changes_says_what_runs_now() -> None:
    text, doing = io.StringIO(), ["reading"]
    drawn = progress.Drawn(Console(file=text, force_terminal=True, width=40, color_system=None))
    with drawn.bar(lambda: doing[0], 2, unit="cells") as advance:
        doing[0] = "measuring what has a name that is far too long"
        advance(1)
    assert "0/2 reading" in text.getvalue()
    assert "1/2 measuring what has a nam…" in text.getvalue()
    assert ":" not in text.getvalue()  # the label has an estimate of its own


def test_in_a_terminal_a_spinner_is_drawn() -> None:
    text = io.StringIO()
    with progress.Drawn(Console(file=text, force_terminal=True, width=100)).spinner("reading") as relabel:
        relabel("verifying")
    assert "verifying" in text.getvalue()
    assert "\x1b[" in text.getvalue()


@pytest.mark.parametrize("widgets", [True, False])
def test_in_a_notebook_a_bar_is_live_if_it_can_be(
    widgets: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without ipywidgets rich would draw nothing and warn instead."""
    shown: list[str] = []

    class Live:
        def __init__(self, *columns: object, console: Console, expand: bool) -> None:
            assert console.is_jupyter

        def __enter__(self) -> Live:
            return self

        def __exit__(self, *error: object) -> None:
            shown.append("end")

        def add_task(self, label: str, total: int) -> int:
            shown.append(f"{label} {total}")
            return 0

        def advance(self, task: int, amount: int) -> None:
            shown.append(f"+{amount}")

    monkeypatch.setattr("rich.progress.Progress", Live)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: (name == "ipywidgets" and widgets) or None)
    console = Console(file=io.StringIO(), force_jupyter=True, force_terminal=False, width=100)
    with progress.Drawn(console).bar("profiling", 10) as advance:
        advance(10)
    assert shown == (["profiling 10", "+10", "end"] if widgets else [])
    assert ("profiling: 10 tokens" in capsys.readouterr().err) != widgets


def test_a_closed_stderr_does_not_stop_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        tried = 0

        def write(self, text: str) -> int:
            self.tried += 1
            raise BrokenPipeError

    closed = Closed()
    monkeypatch.setattr(sys, "stderr", closed)
    progress.say("a line")
    assert closed.tried == 1


def used(shown: progress.Progress) -> None:
    """Use everything that a progress has."""
    shown.say("a line")
    with shown.bar("profiling", 10) as advance, shown.spinner("reading") as relabel:
        advance(10)
        relabel("still reading")


def test_silence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    used(progress.SILENT)
    used(progress.resolve(False))
    assert capsys.readouterr().err == ""
    used(progress.resolve(True))
    assert capsys.readouterr().err.startswith("a line\nreading\nstill reading\nprofiling: 10 tokens in ")
    monkeypatch.setattr(progress, "quiet", True)
    used(progress.resolve(True))
    progress.say("a line")
    with progress.bar("profiling", 10), progress.spinner("reading"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_progress_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is used whatever the command line says, since it was asked for."""
    said: list[str] = []

    class Own:
        @contextlib.contextmanager
        def bar(self, label: str, total: int, *, unit: str = "tokens") -> Iterator[progress.Advance]:
            said.append(f"{label} {total} {unit}")
            yield lambda amount: said.append(str(amount))

        @contextlib.contextmanager
        def spinner(self, label: str) -> Iterator[progress.Relabel]:
            said.append(label)
            yield said.append

        def say(self, line: str) -> None:
            said.append(line)

    monkeypatch.setattr(progress, "quiet", True)
    used(progress.resolve(Own()))
    assert said == ["a line", "profiling 10 tokens", "reading", "10", "still reading"]
