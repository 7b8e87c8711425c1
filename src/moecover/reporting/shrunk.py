"""The page of what `shrink` did: reads its folder of work, gives a chapter for every budget, and the loss over size.

A folder of work serves several budgets, each in a folder of its own with plan.json and evaluation/; the profile is
theirs together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation, Lost, Row
from moecover.planning.artifact import Plan, kept_hash
from moecover.planning.explaining.facts import explain
from moecover.profiling.artifact import Profile
from moecover.reporting.album import Album, file_name
from moecover.reporting.blocks import (
    Block,
    Column,
    Details,
    Lead,
    Number,
    Paragraph,
    Pictures,
    Table,
    Tile,
    Value,
    absent,
    text_column,
)
from moecover.reporting.chapters import Chapter, Page, ShownSection
from moecover.reporting.figures.channels import channels_picture
from moecover.reporting.figures.heatmap import utility_picture
from moecover.reporting.figures.shapes import SizePoint, shapes_picture, sizes_picture
from moecover.reporting.numbers import minus, perplexity_text, size
from moecover.reporting.provenance import RawRecord, calibration_corpora, records_of
from moecover.reporting.sentences import map_words
from moecover.shrinking.work import EVALUATION, FILE, PLAN, PROFILE
from moecover.text import change_text, counted

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

    @cached_property
    def lost(self) -> Lost:
        """What is lost on the texts."""
        return self.row.lost(self.full)

    @property
    def repair(self) -> str | None:
        """The kind of repair that the checkpoint has; None for none."""
        return self.row.plan.get("repair") if self.row.plan else None


def is_shrunk(folder: Path) -> bool:
    """Whether a folder is what `shrink` made on the way."""
    return (folder / FILE).is_file()


def read(folder: Path, profile: Profile) -> tuple[list[Budget], list[str]]:
    """The budgets whose evaluation is finished, the largest first, and a line on each that is left out.

    A budget is left out where its plan is of another profile than that of the folder, as after a call with other
    corpora, or its evaluation of another plan, as after a call that was interrupted.

    Raises:
        InputError: none is left, or a file is damaged.
    """
    found, left_out = list[Budget](), list[str]()
    for place in sorted(path.parent for path in folder.glob(f"*/{PLAN}")):
        if not (place / EVALUATION).is_dir():
            continue
        measured = Evaluation.load(place / EVALUATION)
        plan, (full, row) = Plan.load(place / PLAN), measured.rows
        if plan.profile_fingerprint != profile.fingerprint:
            left_out.append(f"{place.name}: its plan was made from another profile")
        elif row.plan is None or row.plan["fingerprint"] != kept_hash(plan):
            left_out.append(f"{place.name}: its evaluation is of another plan")
        else:
            found.append(Budget(place.name, plan, measured, full, row))
    if not found:
        why = f" ({'; '.join(left_out)})" if left_out else ""
        raise InputError(
            f"{folder} holds no budget that `shrink` has measured{why}. Run the same `shrink` again: it resumes"
        )
    return sorted(found, key=lambda one: -one.row.num_bytes), left_out


def shrunk_page(folder: Path) -> Page:
    """The page of a folder of work.

    Raises:
        InputError: nothing is measured in it, or a file is damaged.
    """
    profile, album = Profile.load(folder / PROFILE), Album()
    found, left_out = read(folder, profile)
    anchors = [file_name(f"s{number}", one.name) for number, one in enumerate(found, 1)]
    chapters = [
        Chapter(anchor, _title(one), _sections(one, anchor, profile, album))
        for anchor, one in zip(anchors, found, strict=True)
    ]
    first = found[0]
    sizes = [ShownSection("sizes", "What smaller costs", _sizes(found, album))] if len(found) > 1 else []
    missing = [absent(f"{line}. Run the same `shrink` again: it resumes.") for line in left_out]
    if missing:
        sizes.append(ShownSection("left-out", "Not shown", missing))
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


def _sections(one: Budget, anchor: str, profile: Profile, album: Album) -> tuple[ShownSection, ...]:
    """What is said of a budget; ``anchor`` begins the names of its figures."""
    facts = explain(one.plan, profile=profile, change=None)
    made: list[tuple[str, str, Sequence[Block]]] = [
        ("summary", "", [_lead(one)]),
        ("texts", "Held-out text", [_text_table(one)]),
        ("shapes", "Why this shape", _shapes(one, anchor, album)),
        ("experts", "Which experts stay", _experts(one, anchor, facts, album)),
    ]
    return tuple(ShownSection(name, title, blocks) for name, title, blocks in made if blocks)


def _change(nats: float) -> str:
    return minus(change_text(nats))


def _lead(one: Budget) -> Lead:
    """The large numbers: mean and worst text, and the size."""
    share = one.row.num_bytes / one.full.num_bytes
    quality = [
        Number(_change(one.lost.mean), f"perplexity, mean of {counted(len(one.found.texts), 'text')}"),
        Number(_change(one.lost.by_text[one.lost.worst]), f"worst text: {one.lost.worst}"),
    ]
    repair = f"repair: {one.repair}" if one.repair else "no repair"
    smaller = [Number(size(one.row.num_bytes), f"{share:.0%} of {size(one.full.num_bytes)}")]
    tile = Tile(f"against the model itself · {repair}", [("held-out text", quality), ("checkpoint", smaller)])
    note = (
        "Held-out text is like the calibration text, but not it. What is lost on text that nobody thought of is not "
        "measured here."
    )
    return Lead(one.plan.method, [tile], note, [], [])


def _text_table(one: Budget) -> Table:
    """Perplexity by text, the worst first."""
    columns = (text_column("text"), *map(Column, ("windows", "the model", "shrunk", "change")))
    rows = []
    for text, lost in sorted(one.lost.by_text.items(), key=lambda item: -item[1]):
        before, after = one.full.perplexity[text], one.row.perplexity[text]
        rows.append(
            (
                Value(text, text),
                Value(str(after.windows), after.windows),
                Value(perplexity_text(before.perplexity), before.perplexity),
                Value(perplexity_text(after.perplexity), after.perplexity),
                Value(_change(lost), lost),
            )
        )
    return Table("texts", "Perplexity on held-out text, the worst first", columns, tuple(rows))


def _shapes(one: Budget, anchor: str, album: Album) -> list[Block]:
    """The curve of equal bytes, where shapes were tried."""
    shapes = one.plan.found.get("shapes", [])
    if len(shapes) < 2:
        return []
    label = f"Loss of {len(shapes)} shapes of about the same bytes on held-out text; {one.row.shape} was chosen"
    figure = shapes_picture(shapes, one.plan.keep, one.plan.width, repaired=one.repair is not None)
    return [Pictures(album.add(f"{anchor}-shapes", figure, label, wide=True))]


def _experts(one: Budget, anchor: str, facts: Facts, album: Album) -> list[Block]:
    """Utility by corpus with what stays, and of thinner experts the energy of their channels."""
    worst = min(facts["overall"]["kept_utility"], key=facts["overall"]["kept_utility"].__getitem__)
    kept = facts["overall"]["kept_utility"][worst]
    words = (
        f"{_guarantee(facts['overall']['guarantee'])} In the mean over the layers, every corpus keeps at least "
        f"{kept:.1%} of its utility ({worst}). {map_words(facts, one.plan.method)}"
    )
    label = f"Utility of every expert by corpus and layer, and which {one.plan.keep} of {one.row.experts} stay"
    pictures = album.add(f"{anchor}-utility", utility_picture(facts), label, raster=True)
    if facts.get("channels", {}).get("channels") is not None:
        label = "Share of the kept experts' channel energy that stays, by layer and corpus"
        pictures += album.add(f"{anchor}-channels", channels_picture(facts), label, wide=True)
    return [Paragraph(words), Pictures(pictures)]


def _guarantee(number: int) -> str:
    """How many of its best experts every corpus keeps, in a sentence."""
    if not number:
        return "In some layer, a corpus loses its best expert."
    return f"Every corpus keeps its {'best expert' if number == 1 else f'{number} best experts'} in every layer."


def _sizes(found: Sequence[Budget], album: Album) -> list[Block]:
    """The curve that people decide by."""
    points = [
        SizePoint(one.row.shape, one.row.num_bytes, math.expm1(lost.mean), math.expm1(lost.by_text[lost.worst]))
        for one in found
        for lost in [one.lost]
    ]
    figure = sizes_picture(points, found[0].full.num_bytes)
    label = f"Perplexity against the model's own at {len(found)} sizes, mean over texts and the worst text"
    return [Pictures(album.add("sizes", figure, label, wide=True))]


def _texts(profile: Profile, measured: Evaluation) -> list[Block]:
    """The records of calibration text and of held-out text, folded away."""
    groups = {
        "Calibration text": records_of(calibration_corpora([profile])),
        "Held-out text": records_of(cast("dict[str, RawRecord]", measured.texts)),
    }
    return [Details(f"{heading} ({len(records)})", records) for heading, records in groups.items()]
