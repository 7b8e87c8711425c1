"""What a verb of the command line is: a module of this folder with `HELP`, `add_options` and `run`."""

from __future__ import annotations

import argparse
from typing import NamedTuple, Protocol


class Outcome(NamedTuple):
    """What a verb gives.

    Attributes:
        result: for ``--json``.
        text: printed otherwise.
        status: exit status.
        problem: why that is not 0, in one line for stderr; empty where the log has said so.
        folds: whether long lines of the text fold on a narrow terminal; a script is printed as it is.
    """

    result: object
    text: str
    status: int = 0
    problem: str = ""
    folds: bool = True


class Verb(Protocol):
    """A module of this folder; its name is the verb's."""

    HELP: str  # and, where it is true, SHARED: processes that torchrun starts share out the work

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's arguments."""
        ...

    def run(self, args: argparse.Namespace) -> Outcome:
        """Do what the verb says."""
        ...
