"""Holding Ctrl-C back where it would do harm."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


def behind(error: BaseException) -> bool:
    """Whether an error stands for an interrupt: one in the middle of an import comes out as another error raised from it."""
    cause = error.__cause__
    return cause is not None and (isinstance(cause, KeyboardInterrupt) or behind(cause))


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold an interrupt back until the block ends.

    For the first import of torch: a KeyboardInterrupt inside its C++ start-up code aborts the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if caught:
        raise KeyboardInterrupt
