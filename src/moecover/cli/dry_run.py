"""``--dry-run`` of every long verb: its declaration, and the table of what would be read, run and written."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from moecover.cli.verb import Outcome
from moecover.rehearsal import rehearsed
from moecover.terminal import aligned
from moecover.text import duration_text, size_text

if TYPE_CHECKING:
    from moecover.rehearsal import Ahead


def add_dry_run(parser: argparse._ActionsContainer) -> None:
    """Declare the option; `main` runs the verb accordingly."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that can be checked, print what would be read, run and written, with sizes and an "
        "estimated time, and make nothing",
    )


def dry_run(verb: Callable[[], object]) -> Outcome:
    """What a verb would do, as a table."""
    found = rehearsed(verb)
    known = [one.seconds for one in found if one.seconds is not None]
    unknown = [one for one in found if one.kind == "run" and one.seconds is None]
    total = sum(known) if known and not unknown else None
    rows = [[one.kind, one.name, _amount(one), _about(one.seconds)] for one in found]
    rows.append(["all", "", "", _about(total) or ("not estimated" if unknown else "")])
    result = {"steps": [asdict(one) for one in found], "seconds": total}
    return Outcome(result, aligned(["", "what", "size", "time"], rows, left=2))


def _amount(one: Ahead) -> str:
    """Tokens and bytes, as far as they are known."""
    parts: Sequence[str] = [
        *([] if one.tokens is None else [f"{one.tokens:,} tokens"]),
        *([] if one.num_bytes is None else [size_text(one.num_bytes)]),
    ]
    return ", ".join(parts)


def _about(seconds: float | None) -> str:
    return "" if seconds is None else duration_text(seconds)
