"""The page of what `shrink` did: reads its folder of work, gives a chapter for every budget, and the loss over size.

A folder of work serves several budgets, each in a folder of its own with plan.json and evaluation/; the profile is
theirs together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation, Row
from moecover.planning.artifact import Plan
from moecover.planning.explaining.facts import explain
from moecover.profiling.artifact import Profile
from moecover.reporting.album import Album, file_name
from moecover.reporting.blocks import (
    Block,
    Column,
    Lead,
    Number,
    Paragraph,
    Pictures,
    Record,
    Table,
    Tile,
    Value,
    text_column,
)
from moecover.reporting.chapters import Chapter, Page, ShownSection
from moecover.reporting.figures.channels import channels_picture
from moecover.reporting.figures.heatmap import utility_picture
from moecover.reporting.figures.shapes import shapes_picture, sizes_picture
from moecover.reporting.numbers import perplexity_text, size
from moecover.shrinking.work import EVALUATION, FILE, PLAN, PROFILE
from moecover.text import counted

if TYPE_CHECKING:
    from moecover.reporting.figures.style import Facts


@dataclass(frozen=True)
class Budget:
    """One budget: the name of its folder, its plan, and what was measured of it and of the model itself."""

    name: str
    plan: Plan
    found: Evaluation
    full: Row
    row: Row

    def increase(self, text: str) -> float:
        """Perplexity of a text over the model's own, less 1."""
        return math.expm1(self.row.perplexity[text].nll - self.full.perplexity[text].nll)

    @property
    def mean(self) -> float:
        """The geometric mean of the texts' perplexities over the model's own, less 1."""
        texts = self.found.texts
        return math.expm1(
            statistics.fmean(self.row.perplexity[text].nll - self.full.perplexity[text].nll for text in texts)
        )

    @property
    def worst(self) -> str:
        """The text that loses most."""
        return max(self.found.texts, key=self.increase)


def is_shrunk(folder: Path) -> bool:
    """Whether a folder is what `shrink` made on the way."""
    return (folder / FILE).is_file()


def read(folder: Path) -> list[Budget]:
    """The budgets whose evaluation is finished, the largest first.

    Raises:
        InputError: there is none, or a file is damaged.
    """
    found = []
    for place in sorted(path.parent for path in folder.glob(f"*/{PLAN}")):
        if not (place / EVALUATION).is_dir():
            continue
        measured = Evaluation.load(place / EVALUATION)
        full, row = measured.rows
        found.append(Budget(place.name, Plan.load(place / PLAN), measured, full, row))
    if not found:
        raise InputError(
            f"{folder} holds no budget that `shrink` has measured. Run the same `shrink` again: it resumes"
        )
    return sorted(found, key=lambda one: -one.row.num_bytes)


def shrunk_page(folder: Path) -> Page:
    """The page of a folder of work.

    Raises:
        InputError: nothing is measured in it, or a file is damaged.
    """
    found, album = read(folder), Album()
    profile = Profile.load(folder / PROFILE)
    chapters = [Chapter(file_name(one.name), _title(one), _sections(one, profile, album)) for one in found]
    first = found[0]
    sizes = [ShownSection("sizes", "What smaller costs", _sizes(found, album))] if len(found) > 1 else []
    return Page(
        title="What shrink left",
        kicker="moecover · one model made smaller",
        about=first.found.model["name"],
        facts=f"{counted(len(found), 'size')}, {size(first.full.num_bytes)} before.",
        chapters=chapters,
        run_sections=[*sizes, ShownSection("text", "What was read", _texts(profile, first.found))],
        album=album,
    )


def _title(one: Budget) -> str:
    """The heading of a chapter."""
    channels = "" if one.plan.width is None else f" of {one.plan.width} channels"
    return f"{one.plan.keep} of {one.row.experts} experts{channels}: {size(one.row.num_bytes)}"


def _sections(one: Budget, profile: Profile, album: Album) -> tuple[ShownSection, ...]:
    """What is said of a budget."""
    facts = explain(one.plan, profile=profile)
    made: list[tuple[str, str, Sequence[Block]]] = [
        ("summary", "", [_lead(one)]),
        ("texts", "Held-out text", [_text_table(one)]),
        ("shapes", "Why this shape", _shapes(one, album)),
        ("experts", "Which experts stay", _experts(one, facts, album)),
    ]
    return tuple(ShownSection(name, title, blocks) for name, title, blocks in made if blocks)


def _signed(proportion: float) -> str:
    return f"{100 * proportion:+.1f} %".replace("-", "−")


def _lead(one: Budget) -> Lead:
    """The large numbers: mean and worst text, and the size."""
    share = one.row.num_bytes / one.full.num_bytes
    quality = [
        Number(_signed(one.mean), f"perplexity, mean of {counted(len(one.found.texts), 'text')}"),
        Number(_signed(one.increase(one.worst)), f"worst text: {one.worst}"),
    ]
    smaller = [Number(size(one.row.num_bytes), f"{share:.0%} of {size(one.full.num_bytes)}")]
    tile = Tile("against the model itself", [("held-out text", quality), ("checkpoint", smaller)])
    note = (
        "Held-out text is like the calibration text, but not it. What is lost on text that nobody thought of is not "
        "measured here."
    )
    return Lead(one.plan.method, [tile], note, [], [])


def _text_table(one: Budget) -> Table:
    """Perplexity by text, the worst first."""
    columns = (text_column("text"), *map(Column, ("windows", "the model", "shrunk", "change")))
    rows = []
    for text in sorted(one.found.texts, key=one.increase, reverse=True):
        before, after = one.full.perplexity[text], one.row.perplexity[text]
        rows.append(
            (
                Value(text, text),
                Value(str(after.windows), after.windows),
                Value(perplexity_text(before.perplexity), before.perplexity),
                Value(perplexity_text(after.perplexity), after.perplexity),
                Value(_signed(one.increase(text)), one.increase(text)),
            )
        )
    return Table("texts", "Perplexity on held-out text, the worst first", columns, tuple(rows))


def _shapes(one: Budget, album: Album) -> list[Block]:
    """The curve of equal bytes, where shapes were tried."""
    shapes = one.plan.found.get("shapes", [])
    if len(shapes) < 2:
        return []
    label = f"Loss of {len(shapes)} shapes of about the same bytes on held-out text; {one.row.shape} was chosen"
    figure = shapes_picture(shapes, one.plan.keep, one.plan.width)
    return [Pictures(album.add(file_name(one.name, "shapes"), figure, label, wide=True))]


def _experts(one: Budget, facts: Facts, album: Album) -> list[Block]:
    """Utility by corpus with what stays, and of thinner experts the energy of their channels."""
    worst = min(facts["overall"]["kept_utility"], key=facts["overall"]["kept_utility"].__getitem__)
    kept = facts["overall"]["kept_utility"][worst]
    best = counted(facts["overall"]["guarantee"], "best expert")
    words = f"Every corpus keeps its {best} in every layer, and at least {kept:.1%} of its utility ({worst})."
    label = f"Utility of every expert by corpus and layer, and which {one.plan.keep} of {one.row.experts} stay"
    pictures = album.add(file_name(one.name, "utility"), utility_picture(facts), label, raster=True)
    if facts.get("channels", {}).get("channels") is not None:
        label = "Share of the kept experts' channel energy that stays, by layer and corpus"
        pictures += album.add(file_name(one.name, "channels"), channels_picture(facts), label, wide=True)
    return [Paragraph(words), Pictures(pictures)]


def _sizes(found: Sequence[Budget], album: Album) -> list[Block]:
    """The curve that people decide by."""
    points = [(one.row.shape, one.row.num_bytes / 1e6, one.mean, one.increase(one.worst)) for one in found]
    figure = sizes_picture(points, found[0].full.num_bytes / 1e6)
    label = f"Perplexity against the model's own at {len(found)} sizes, mean over texts and the worst text"
    return [Pictures(album.add("sizes", figure, label, wide=True))]


def _texts(profile: Profile, measured: Evaluation) -> list[Block]:
    """Calibration text and held-out text as records."""
    made: list[Block] = []
    for name, records in profile.corpora.items():
        tokens = sum(int(record.get("tokens", 0)) for record in records)
        made.append(Record(name, (("tokens", f"{tokens:,}"), ("source", str(records[0].get("source", name))))))
    return made
