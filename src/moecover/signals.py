"""Signals that end the process: interrupts delayed where they would do harm, and sent again where Python loses them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

RESEND_SECONDS = 0.02


def behind(error: BaseException) -> bool:
    """Whether an error was caused by an interrupt.

    Python raises another error from the KeyboardInterrupt when it arrives in the middle of an import.
    """
    cause = error.__cause__
    return cause is not None and (isinstance(cause, KeyboardInterrupt) or behind(cause))


def deliver_again(unraisable: UnraisableHookArgs) -> None:
    """Send a signal again that Python had to drop because it arrived while a destructor ran: a `sys.unraisablehook`."""
    signals: dict[type[BaseException], signal.Signals] = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}
    number = signals.get(unraisable.exc_type)
    if number is None:
        sys.__unraisablehook__(unraisable)
    else:
        threading.Timer(RESEND_SECONDS, os.kill, (os.getpid(), number)).start()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Delay an interrupt until the block ends.

    For the first import of torch: a KeyboardInterrupt inside its C++ start-up code aborts the process. In other threads
    than the main one nothing is delayed.

    Raises:
        KeyboardInterrupt: at the end of the block, if an interrupt arrived within it.
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
