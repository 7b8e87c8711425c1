"""Errors that end a command with one line instead of a traceback.

A message says what is wrong, where, what was found, what is allowed and what to do about it.
"""

from __future__ import annotations


class MoecoverError(Exception):
    """The job could not be finished, or a check said no (exit status 1)."""

    exit_code = 1


def is_out_of_memory(error: BaseException) -> bool:
    """True for what Python and torch raise when memory runs out, on the CPU or on a GPU."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


class InputError(MoecoverError, ValueError):
    """The request or its input cannot be used as given (exit status 2)."""

    exit_code = 2
