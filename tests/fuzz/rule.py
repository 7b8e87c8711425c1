"""The rule for every input: done, or refused in one line, quickly, and nothing is left that looks finished."""

from __future__ import annotations

import contextlib
import io
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moecover import progress
from moecover.cli.main import main

SECONDS, WAITED = 30, 300
CHARACTERS = 500
MEMORY_KB = 2 << 20  # what one command may add to the peak of this process


@dataclass(frozen=True)
class Command:
    """A command line and what it writes.

    Attributes:
        arguments: of the program.
        output: the file or folder that must not exist if the command fails; None for none.
    """

    arguments: Sequence[object]
    output: Path | None = None


class TooSlowError(BaseException):
    """The command ran out of its time; not an Exception, so that nothing handles it."""


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """Stop the block after `SECONDS` of computing, or `WAITED` by the clock: the machine may have other work."""

    def stop(*_: object) -> None:
        raise TooSlowError

    before = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITED)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def broken(command: Command) -> str | None:
    """Run a command; what it does against the rule, None if nothing.

    It runs in this process, but with a plugin, which would stay in the tables of the program.
    """
    if "--plugin" in command.arguments:
        words = [sys.executable, "-m", "moecover", *map(str, command.arguments), "-q"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=WAITED, check=False)
        except subprocess.TimeoutExpired:
            return f"longer than {WAITED} s"
        return _judged(command, done.returncode, done.stderr, 0)
    out, err, before = io.StringIO(), io.StringIO(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status: object = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _alarm():
            status = main([*map(str, command.arguments), "-q"])
    except SystemExit as stop:  # argparse
        status = stop.code
    except TooSlowError:
        return f"longer than {SECONDS} s"
    except BaseException:  # an error of a library in another language is no Exception
        return f"it raises\n{traceback.format_exc()}"
    finally:
        progress.quiet = False
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return _judged(command, status, err.getvalue(), grown)


def _judged(command: Command, status: object, err: str, grown: int) -> str | None:
    if grown > MEMORY_KB:
        return f"it takes {grown >> 10} MiB of memory"
    if status == 0:
        return None
    lines = err.splitlines()
    said = lines[-1] if lines else ""
    checks = {
        f"exit status {status!r}": status in (1, 2),
        f"{len(lines)} lines on stderr: {err[:2000]}": len(lines) == 1,
        f"a message of {len(said)} characters": 0 < len(said) < CHARACTERS,
        f"a message that is not printable: {said!r}": said.isprintable(),
        f"an internal error: {said}": "internal error" not in said and "Traceback" not in err,
        f"{command.output} is there": command.output is None or not command.output.exists(),
    }
    return next((what for what, holds in checks.items() if not holds), None)
