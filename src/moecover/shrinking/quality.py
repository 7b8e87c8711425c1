"""How much text the steps of `shrink` read, by quality: a table."""

from __future__ import annotations

from dataclasses import dataclass

from moecover.errors import arg, flag
from moecover.registry import unknown_name


@dataclass(frozen=True)
class Quality:
    """How much text is read.

    Attributes:
        blocks: of a calibration corpus at most.
        rows: of text that the model writes; they are divided into kinds.
        repair: kind of the repair.
        repair_tokens: on which what stays is refitted.
        windows: of every text, held out to measure shapes and the result on.
        cost: how much text that is, against the default.
        better: name of the one that reads more; None where none does.
    """

    blocks: int
    rows: int
    repair: str
    repair_tokens: int
    windows: int
    cost: str
    better: str | None = None

    @property
    def remedy(self) -> str:
        """What to do where this is too little text."""
        more = f", or {flag('quality')} {self.better}" if self.better is not None else ""
        return f"Give more corpora, or longer ones ({flag('corpora')}){more}"


QUALITIES = {
    "fast": Quality(
        32,
        48,
        "ridge",
        32_768,
        4,
        "a quarter to a half of the default's text, repaired in closed form only",
        "default",
    ),
    "default": Quality(128, 128, "refit", 65_536, 8, "--dry-run says its time", "best"),
    "best": Quality(512, 512, "refit", 262_144, 32, "four times the default's text"),
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
