"""How much text the steps of `shrink` read, by quality: a table."""

from __future__ import annotations

from dataclasses import dataclass

from moecover.errors import arg
from moecover.registry import unknown_name


@dataclass(frozen=True)
class Quality:
    """How much text is read.

    Attributes:
        blocks: of a calibration corpus at most.
        rows: of text that the model writes; they are divided into kinds.
        repair_tokens: on which what stays is refitted.
        windows: of every text, held out to measure shapes and the result on.
        cost: what it costs, against the default.
    """

    blocks: int
    rows: int
    repair_tokens: int
    windows: int
    cost: str


QUALITIES = {
    "fast": Quality(32, 48, 32_768, 4, "about a third of the default's time"),
    "default": Quality(128, 128, 65_536, 8, "see --dry-run"),
    "best": Quality(512, 512, 262_144, 32, "about four times the default's time"),
}
DEFAULT = "default"


def quality_of(name: str) -> Quality:
    """A quality by name.

    Raises:
        InputError: there is none.
    """
    if name not in QUALITIES:
        raise unknown_name(arg("quality"), name, QUALITIES)
    return QUALITIES[name]
