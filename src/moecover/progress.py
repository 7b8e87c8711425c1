"""Progress bars with the estimated time left, and log lines: on stderr, so that stdout carries only the result.

`Progress` is what long-running functions take. `Drawn` draws live bars in a terminal and in a Jupyter notebook, and
prints one line per finished step elsewhere; `SILENT` draws nothing. The functions of this module are those of the
instance that the command line uses, which its ``--quiet`` silences (`quiet`).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from moecover.errors import InputError, arg, printable
from moecover.terminal import columns, folded

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import ProgressColumn

Advance = Callable[[int], None]  # called with the amount that was done since the last call
Relabel = Callable[[str], None]
Label = str | Callable[[], str]  # of a bar; a function says anew what runs now, and how long the rest takes
Bar = Callable[..., contextlib.AbstractContextManager[Advance]]  # `Progress.bar`

quiet = False
_log: TextIO | None = None  # a file that the log goes to as well


@contextlib.contextmanager
def logged(path: Path | None) -> Iterator[None]:
    """A block whose log is appended to a file too, each line with its time; None for no file.

    Raises:
        InputError: the file cannot be written.
    """
    global _log
    if path is None:
        yield
        return
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{arg('log_file', path)} cannot be written: {error.strerror}") from error
    with file:
        _log = file
        try:
            yield
        finally:
            _log = None


def note(line: str) -> None:
    """A line of the log's file."""
    if _log is not None:
        with contextlib.suppress(OSError):  # the job does not depend on its log
            _log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(line)}\n")
            _log.flush()


class Progress(Protocol):
    """Reports the progress of a long-running function."""

    def bar(self, label: Label, total: int, *, unit: str = "tokens") -> contextlib.AbstractContextManager[Advance]:
        """Show a progress bar while the block runs; yields the function that advances it.

        Args:
            label: what is being done; a function that says it whenever the bar is drawn, with an estimate of its own.
            total: the amount at the end.
            unit: what is counted; ``bytes`` are shown in decimal units.
        """

    def spinner(self, label: str) -> contextlib.AbstractContextManager[Relabel]:
        """Show a label while a block of unknown length runs; yields the function that changes the label."""

    def say(self, line: str) -> None:
        """Log one line."""


class Drawn:
    """Progress on stderr.

    Args:
        console: the console to draw on; one on stderr by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console

    @contextlib.contextmanager
    def bar(self, label: Label, total: int, *, unit: str = "tokens") -> Iterator[Advance]:
        """See `Progress.bar`; without a terminal or notebook, one line at the end gives the duration."""
        console = self._open()
        if not _is_live(console):
            started = time.monotonic()
            yield lambda amount: None
            self.say(f"{_said(label)}: {total:,} {unit} in {time.monotonic() - started:.1f} s")
            return
        from rich import progress

        amount = progress.DownloadColumn() if unit == "bytes" else progress.MofNCompleteColumn()
        columns: list[progress.ProgressColumn]
        if isinstance(label, str):
            said = progress.TextColumn("{task.description}", markup=False)
            columns = [said, progress.BarColumn(), amount, progress.TimeRemainingColumn(elapsed_when_finished=True)]
        else:
            columns = [progress.BarColumn(10), amount, _now(label)]
        started = time.monotonic()
        with progress.Progress(*columns, console=console, expand=not isinstance(label, str)) as drawn:
            task = drawn.add_task(printable(_said(label)), total=total)
            yield lambda amount: drawn.advance(task, amount)
        note(f"{_said(label)}: {total:,} {unit} in {time.monotonic() - started:.1f} s")

    @contextlib.contextmanager
    def spinner(self, label: str) -> Iterator[Relabel]:
        """See `Progress.spinner`; without a terminal or notebook, every label is a line of the log."""
        console = self._open()
        if not _is_live(console):
            self.say(label)
            yield self.say
            return
        with console.status(_literal(label)) as status:
            yield lambda text: status.update(_literal(text))

    def say(self, line: str) -> None:
        """Print one line; a closed stderr is ignored, since the job does not depend on its log."""
        note(line)
        with contextlib.suppress(BrokenPipeError):
            print(folded(printable(line), columns(sys.stderr)), file=sys.stderr, flush=True)  # noqa: T201

    def _open(self) -> Console:
        from rich.console import Console

        return self._console or Console(stderr=True)


class Silent:
    """Progress that is not shown."""

    @contextlib.contextmanager
    def bar(self, label: Label, total: int, *, unit: str = "tokens") -> Iterator[Advance]:
        """See `Progress.bar`."""
        yield lambda amount: None

    @contextlib.contextmanager
    def spinner(self, label: str) -> Iterator[Relabel]:
        """See `Progress.spinner`."""
        yield lambda text: None

    def say(self, line: str) -> None:
        """Keep the line for the log's file alone."""
        note(line)


DRAWN, SILENT = Drawn(), Silent()


def _said(label: Label) -> str:
    return label if isinstance(label, str) else label()


def _now(label: Callable[[], str]) -> ProgressColumn:
    """The column of a bar that says what runs now, cut where the terminal is too narrow for it."""
    from rich.progress import ProgressColumn, Task
    from rich.table import Column

    class Now(ProgressColumn):
        def render(self, task: Task) -> RenderableType:
            return _literal(label())

    return Now(Column(no_wrap=True, overflow="ellipsis", ratio=1))


def _literal(label: str) -> RenderableType:
    """A label that may hold names from files: square brackets are no markup."""
    from rich.text import Text

    return Text(printable(label))


def _is_live(console: Console) -> bool:
    """Whether a console can redraw: a terminal, or a notebook that has what rich draws with there."""
    from importlib.util import find_spec

    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


def resolve(progress: bool | Progress = True) -> Progress:
    """The progress that a function's ``progress`` argument asks for.

    Args:
        progress: True for bars on stderr (none if the command line is quiet), False for none, or an object of one's
            own.
    """
    if isinstance(progress, bool):
        return DRAWN if progress and not quiet else SILENT
    return progress


def say(line: str) -> None:
    """Log one line on stderr."""
    resolve().say(line)


def bar(label: Label, total: int, *, unit: str = "tokens") -> contextlib.AbstractContextManager[Advance]:
    """A progress bar on stderr, see `Progress.bar`."""
    return resolve().bar(label, total, unit=unit)


def spinner(label: str) -> contextlib.AbstractContextManager[Relabel]:
    """A spinner on stderr, see `Progress.spinner`."""
    return resolve().spinner(label)
