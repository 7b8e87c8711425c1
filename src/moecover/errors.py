"""Errors that end a command with one line instead of a traceback.

A message says what is wrong, where, what was found, what is allowed and what to do about it.
"""

from __future__ import annotations


class MoecoverError(Exception):
    """The job could not be finished, or a check said no (exit status 1)."""

    exit_code = 1


class InputError(MoecoverError, ValueError):
    """The request or its input cannot be used as given (exit status 2)."""

    exit_code = 2
