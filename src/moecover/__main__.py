"""The `moecover` command, also as `python -m moecover`."""

from __future__ import annotations

import gc
import signal
import sys

from moecover.signals import deliver_again


def run() -> int:
    """Run the command as a process of its own; an interrupt while it is still being imported ends it in one line too.

    The garbage collector walks the millions of objects that importing torch and transformers makes, again and again and
    once more at exit: a fifth of a short run. It is called less often here, and the last walk is left out.
    """
    gc.set_threshold(100_000, 50, 100)
    sys.unraisablehook = deliver_again
    try:
        from moecover.cli.main import main

        return main()
    except KeyboardInterrupt:
        print("moecover: interrupted, nothing half-written was left", file=sys.stderr)  # noqa: T201
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done or cleaned up, only the interpreter has to end
        # An interrupt inside an exec() of text (dataclasses and named tuples are made so) leaves a mark in CPython, by
        # which the process would kill itself at exit although the interrupt was handled. The next exec() takes it away.
        exec("")
        gc.freeze()


if __name__ == "__main__":
    raise SystemExit(run())
