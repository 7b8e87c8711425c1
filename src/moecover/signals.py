"""Signals that end the process: held back where they would do harm, sent again where Python loses them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


def behind(error: BaseException) -> bool:
    """Whether an error stands for an interrupt: one in the middle of an import comes out as another error raised from it."""
    cause = error.__cause__
    return cause is not None and (isinstance(cause, KeyboardInterrupt) or behind(cause))


def deliver_again(unraisable: Any) -> None:
    """Send a signal once more that Python had to drop, because it came while a destructor ran: a `sys.unraisablehook`."""
    number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(unraisable.exc_type)
    if number is None:
        sys.__unraisablehook__(unraisable)
    else:
        threading.Timer(0.02, os.kill, (os.getpid(), number)).start()


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
