"""The sections of the page in their order: functions from data to blocks, each entered in a registry by its decorator.

`SECTIONS` has those of every model, `RUN_SECTIONS` those of the whole run, which follow. A plugin adds one with::

    from moecover.reporting.blocks import Paragraph
    from moecover.reporting.sections import SECTIONS

    @SECTIONS("cost", title="What it cost")
    def cost(data):
        return [Paragraph(f"{len(data.of.run.cells)} cells")]
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from moecover.evaluation.task_scores import cut_text
from moecover.registry import Registry
from moecover.reporting.album import file_name
from moecover.reporting.blocks import Block, Bullets, Code, Details, Lead, Paragraph, Picture, Pictures, Table, absent
from moecover.reporting.comparison_tables import by_task_table, comparison_table, verdict_table
from moecover.reporting.context import ModelData, RunData
from moecover.reporting.figures.style import short
from moecover.reporting.hero import note_on, tiles_of
from moecover.reporting.numbers import percentage, plain
from moecover.reporting.provenance import calibration_corpora, provenance_of
from moecover.reporting.sentences import map_words, memory_words, summary_of, usage_words, verdicts_of
from moecover.reporting.size_tables import by_size_table, size_table
from moecover.reporting.tables import (
    accuracy_table,
    distance_table,
    failed_table,
    others_table,
    overlap_table,
    perplexity_table,
    usage_table,
)
from moecover.reporting.usage_figures import usage_pictures
from moecover.reporting.values import width_words

if TYPE_CHECKING:
    from markupsafe import Markup

    Content = Sequence[Block | Markup]

Data = TypeVar("Data", ModelData, RunData)


# --------------------------------------------------------------------------------------------------------- the registry
@dataclass(frozen=True)
class Section(Generic[Data]):
    """A section: its id, its heading ("": none), and its function. It is left out if the function gives no blocks."""

    name: str
    title: str
    function: Callable[[Data], Content]


class Sections(Generic[Data]):
    """Sections in the order in which they were entered; a registry whose entries have a heading."""

    def __init__(self) -> None:
        self._functions: Registry[Callable[[Data], Content]] = Registry("section of the page")
        self._titles: dict[str, str] = {}

    def __call__(self, name: str, *, title: str) -> Callable[[Callable[[Data], Content]], Callable[[Data], Content]]:
        """Decorator that enters a section.

        Args:
            name: id of the section.
            title: heading; "" for none.

        Raises:
            InputError: a plugin uses a name that is taken.
        """

        def enter(function: Callable[[Data], Content]) -> Callable[[Data], Content]:
            self._functions(name, paper="")(function)
            self._titles[name] = title
            return function

        return enter

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Remove at the end of the block the sections that were entered within it."""
        with self._functions.restored():
            yield

    def __iter__(self) -> Iterator[Section[Data]]:
        return iter([Section(name, self._titles[name], function) for name, function in self._functions.items()])


SECTIONS: Sections[ModelData] = Sections()
RUN_SECTIONS: Sections[RunData] = Sections()


# ------------------------------------------------------------------------------------------------------- of every model
@SECTIONS("summary", title="")
def summary(data: ModelData) -> Content:
    """Tiles, sentences, and the first figures: of loss by size, else of accuracy, else of the first perplexity."""
    tiles = tiles_of(data.model)
    method = data.model.main.base if data.model.main else ""
    return [Lead(method, tiles, note_on(data.model, tiles), summary_of(data.model), data.first)]


@SECTIONS("comparisons", title="Is the difference real?")
def comparisons(data: ModelData) -> Content:
    """Verdicts, tests and differences task by task."""
    verdicts, tests = verdict_table(data.model), comparison_table(data.model)
    if verdicts is None or tests is None:
        return []
    blocks: list[Block] = [verdicts, Details("How each was tested", [tests], printed=False)]
    if (by_task := by_task_table(data.model)) is not None:
        blocks.append(Details("Where the differences come from, task by task", [by_task]))
    return blocks


@SECTIONS("tasks", title="Task by task")
def tasks(data: ModelData) -> Content:
    """Accuracy by task, and the metrics that do not enter the mean."""
    notes = [Paragraph(f"Note: {cut_text(c.task, c.cut, c.items)}.", "note") for c in data.model.cut]
    table = accuracy_table(data.model)
    pictures = _shown(_later(data, data.accuracy)) if table else []
    return [*pictures, *_with_details(table, "Other metrics", others_table(data.model)), *notes]


@SECTIONS("perplexity", title="Perplexity")
def perplexity(data: ModelData) -> Content:
    """Perplexity by text, and closeness to the full model."""
    distance = distance_table(data.model)
    table = perplexity_table(data.model)
    tables = _with_details(table, "KL divergence and agreement with the full model", distance)
    pictures = _shown(_later(data, data.perplexity)) if table else []
    if pictures and data.loss:
        return [*tables, Details("Figures text by text", pictures, printed=False)]
    return [*pictures, *tables]


@SECTIONS("experts", title="Which experts are kept")
def experts(data: ModelData) -> Content:
    """A heat map per budget of the main method, the middle one open."""
    from moecover.reporting.figures.heatmap import utility_picture

    missing = [absent(f"No heat map at {line}") for line in data.missing]
    pictures = [
        picture
        for retain, facts in data.explained
        for picture in data.album.add(
            file_name("utility", data.anchor, percentage(retain), width_words(facts)),
            utility_picture(facts),
            f"Heat map of {data.model.name}: share of the layer's utility by layer and expert, one panel per corpus; "
            f"{facts['keep']} of {facts['experts']} experts are kept. {map_words(facts, short(facts['method']))}",
            f"{percentage(retain)} of the {data.model.kept_of}{width_words(facts)}",
            raster=True,
        )
    ]
    if not pictures or data.model.main is None:
        return missing
    text = (
        "Each panel shows every expert's share of its layer's utility on one calibration corpus. "
        f"{map_words(data.explained[0][1], data.model.main.name)}"
    )
    middle = len(pictures) // 2
    maps = [Details(p.caption, [Pictures([p], bare=True)], i == middle, printed=False) for i, p in enumerate(pictures)]
    return [Paragraph(text), *maps, *missing]


@SECTIONS("overlap", title="Do the corpora favour the same experts?")
def overlap(data: ModelData) -> Content:
    """How far the corpora agree, at the middle budget as a figure and at all budgets as a table."""
    from moecover.reporting.figures.overlap import overlap_picture

    table = overlap_table(data.model, data.explained)
    several = [facts for _, facts in data.explained if len(facts["corpora"]) > 1]
    if table is None or not several:
        return []
    pictures = data.album.add(
        f"overlap-{data.anchor}",
        overlap_picture(several[len(several) // 2]),
        f"How far the calibration corpora agree on the best experts of {data.model.name}, by decoder layer; "
        "the means are in the table of overlaps",
        wide=True,
    )
    return [*_shown(pictures), table]


@SECTIONS("usage", title="Do the tasks use the experts that generic text rates highly?")
def usage(data: ModelData) -> Content:
    """How far utility agrees with the tasks' use of experts, and what pruning leaves of their routing weight."""
    pictures, table = usage_pictures(data), usage_table(data.model, data.usage)
    if not pictures and table is None:
        return []
    words = usage_words(data.usage)
    return [*([Paragraph(words)] if words else []), *_shown(pictures), *([table] if table else [])]


@SECTIONS("size", title="Size before and after")
def size(data: ModelData) -> Content:
    """Size of the checkpoint by budget, quality by size where there are further files, and peak memory."""
    table, memory = size_table(data.model), memory_words(data.model)
    if table is None:
        return []
    by_size, blocks = by_size_table(data.model), list[Block]()
    if by_size is not None:
        blocks.append(by_size)
    if verdicts := verdicts_of(data.model.by_size):
        blocks.append(Details("Files at about equal bytes, in a sentence each", [Bullets(verdicts, "verdicts")]))
    return [*blocks, table, *([Paragraph(memory, "note")] if memory else [])]


@SECTIONS("absent", title="")
def nothing_on(data: ModelData) -> Content:
    """What the run does not have, in one place: a section without content has no heading either."""
    model = data.model
    lacks = {
        "No comparison was tested in this run.": not model.comparisons,
        "No perplexity was measured in this run.": not model.texts,
        "This run has no plan with utilities by corpus, so there is no heat map.": not data.explained,
        "The use of experts by the tasks was not measured in this run.": not (data.usage.corpora or data.usage.plans),
    }
    missing = [text for text, lacking in lacks.items() if lacking]
    return [absent(" ".join(missing))] if missing else []


# ----------------------------------------------------------------------------------------------------------- of the run
@RUN_SECTIONS("failed", title="Failed cells")
def failed(data: RunData) -> Content:
    """The cells that did not finish."""
    table = failed_table(data.run)
    return [] if table is None else [table]


@RUN_SECTIONS("provenance", title="Provenance")
def provenance(data: RunData) -> Content:
    """The command, versions, and the records of models, corpora, texts and tasks."""
    command, blocks = data.run.command, list[Block]()
    if command:
        blocks += [Paragraph("Command:"), Code(command if isinstance(command, str) else " ".join(command))]
    if data.run.created_by:
        blocks.append(Paragraph(f"Made by {plain(data.run.created_by)}."))
    groups = provenance_of(data.run, data.models, calibration_corpora(data.profiles.values()))
    return [*blocks, *(Details(f"{heading} ({len(records)})", records) for heading, records in groups.items())]


# -------------------------------------------------------------------------------------------------------------- helpers
def _shown(pictures: Sequence[Picture]) -> list[Pictures]:
    return [Pictures(pictures)] if pictures else []


def _later(data: ModelData, pictures: Sequence[Picture]) -> list[Picture]:
    """The figures that do not stand at the top already."""
    return [picture for picture in pictures if picture not in data.first]


def _with_details(table: Table | None, summary: str, further: Table | None) -> list[Block]:
    """A table, and a further one folded away below it."""
    if table is None:
        return []
    return [table] if further is None else [table, Details(summary, [further])]
