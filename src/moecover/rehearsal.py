"""Dry runs: a job goes on as far as its long work, with all of its refusals, and tells what it would do from there.

Jobs call `ahead` where they learn what will be read, run and written, and `stop` where the long work begins: neither
does anything but in a dry run. No output is locked in one, and no folder made.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

Kind = Literal["read", "run", "write"]


@dataclass(frozen=True)
class Ahead:
    """One thing that a job would do.

    Attributes:
        kind: what happens.
        name: to what.
        tokens: of text; None where it is no text.
        num_bytes: on the disk, or in memory for what runs; None where that is not known before.
        seconds: about how long it takes; None where that is not estimated.
    """

    kind: Kind
    name: str
    tokens: int | None = None
    num_bytes: int | None = None
    seconds: float | None = None


class Rehearsed(Exception):
    """The long work of a job would begin now; caught by `rehearsed`."""


_ahead: ContextVar[list[Ahead] | None] = ContextVar("ahead", default=None)


def on() -> bool:
    """Whether this is a dry run."""
    return _ahead.get() is not None


def ahead(
    kind: Kind,
    name: object,
    *,
    tokens: int | None = None,
    num_bytes: int | None = None,
    seconds: float | None = None,
) -> None:
    """Note what the job would do; see `Ahead`."""
    if (found := _ahead.get()) is not None:
        found.append(Ahead(kind, str(name), tokens, num_bytes, seconds))


def stop() -> None:
    """End a dry run: from here on the job works.

    Raises:
        Rehearsed: it is one.
    """
    if on():
        raise Rehearsed


def rehearsed(job: Callable[[], object]) -> list[Ahead]:
    """What a job would read, run and write, in this order.

    Args:
        job: is called, and ends where it calls `stop`.

    Raises:
        RuntimeError: it went on to its end.
    """
    found: list[Ahead] = []
    token = _ahead.set(found)
    try:
        job()
    except Rehearsed:
        kinds: tuple[Kind, ...] = ("read", "run", "write")
        return sorted(found, key=lambda one: kinds.index(one.kind))
    finally:
        _ahead.reset(token)
    raise RuntimeError("a dry run has worked: a call of rehearsal.stop is missing")
