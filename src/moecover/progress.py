"""Progress bars with an estimate, and log lines: on stderr, so that stdout carries the result alone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

quiet = False
Bar = Callable[..., contextlib.AbstractContextManager[Callable[[int], None]]]  # `bar`, or what takes its place


def say(line: str) -> None:
    """One line of log."""
    if not quiet:
        with contextlib.suppress(BrokenPipeError):  # nobody reads the log: the job goes on
            print(line, file=sys.stderr, flush=True)  # noqa: T201


@contextlib.contextmanager
def bar(label: str, total: int, *, unit: str = "tokens") -> Iterator[Callable[[int], None]]:
    """A progress bar; yields the function that advances it. ``unit`` is bytes, or what is counted.

    Where stderr is no terminal, one line says what is done and, at the end, how long it took.
    """
    import time

    if quiet:
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        started = time.monotonic()
        yield lambda amount: None
        say(f"{label}: {total:,} {unit} in {time.monotonic() - started:.1f} s")
        return
    amounts = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = [TextColumn("{task.description}"), BarColumn(), amounts, TimeRemainingColumn(elapsed_when_finished=True)]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total)
        yield lambda amount: progress.advance(task, amount)


@contextlib.contextmanager
def spinner(label: str) -> Iterator[Callable[[str], None]]:
    """A turning mark beside a label that can be changed, for steps whose length is not known."""
    if quiet:
        yield lambda text: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        say(label)
        yield say
        return
    with console.status(label) as status:
        yield lambda text: status.update(text)


class Progress:
    """How a job shows its progress: bars, spinners and lines of log. This one is silent."""

    def bar(
        self, label: str, total: int, *, unit: str = "tokens"
    ) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """See `bar`."""
        return contextlib.nullcontext(lambda amount: None)

    def spinner(self, label: str) -> contextlib.AbstractContextManager[Callable[[str], None]]:
        """See `spinner`."""
        return contextlib.nullcontext(lambda text: None)

    def say(self, line: str) -> None:
        """See `say`."""


class Drawn(Progress):
    """Progress on stderr."""

    bar = staticmethod(bar)
    spinner = staticmethod(spinner)
    say = staticmethod(say)


def resolve(progress: bool | Progress = True) -> Progress:
    """The progress that is meant by a ``progress=`` argument."""
    return progress if isinstance(progress, Progress) else Drawn() if progress else Progress()
