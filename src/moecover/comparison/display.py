"""Where the progress of a comparison is shown: functions of the caller, or nowhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from moecover.progress import Bar

Spinner = Callable[[str], AbstractContextManager[Callable[[str], None]]]


@contextlib.contextmanager
def no_spinner(label: str) -> Iterator[Callable[[str], None]]:
    """A spinner that shows nothing."""
    yield lambda text: None


@contextlib.contextmanager
def no_bar(label: str, total: int, *, unit: str = "") -> Iterator[Callable[[int], None]]:
    """A progress bar that shows nothing."""
    yield lambda amount: None


@dataclass(frozen=True)
class Display:
    """Where the progress of a comparison is shown.

    Attributes:
        say: takes a line of log.
        spinner: shows a step of unknown length, see `progress.spinner`.
        bar: shows how many cells are done, see `progress.bar`.
    """

    say: Callable[[str], None] = lambda line: None
    spinner: Spinner = no_spinner
    bar: Bar = no_bar
