"""What a verb of the command line is: a module of this folder with `HELP`, `add_options` and `run`."""

from __future__ import annotations

import argparse
from typing import NamedTuple, Protocol


class Outcome(NamedTuple):
    """What a verb gives: the result for ``--json``, the text to print otherwise, the exit status."""

    result: object
    text: str
    status: int = 0


class Verb(Protocol):
    """A module of this folder; its name is the verb's."""

    HELP: str

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's arguments."""
        ...

    def run(self, args: argparse.Namespace) -> Outcome:
        """Do what the verb says."""
        ...
