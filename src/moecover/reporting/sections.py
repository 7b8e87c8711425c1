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
from moecover.reporting.data import Usage
from moecover.reporting.figures.style import short
from moecover.reporting.findings import ModelFindings
from moecover.reporting.numbers import percentage, plain
from moecover.reporting.provenance import calibration_corpora, provenance_of
from moecover.reporting.sentences import memory_words, summary_of, usage_words, verdicts_of
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
from moecover.reporting.values import width_words

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

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
    """Tiles, sentences, and the first figure: of accuracy, else of the first text's perplexity."""
    found = summary_of(data.model)
    method = data.model.main.name if data.model.main else ""
    return [Lead(method, found.tiles, found.sentences, data.accuracy or data.perplexity[:1])]


@SECTIONS("comparisons", title="Is the difference real?")
def comparisons(data: ModelData) -> Content:
    """Verdicts, tests and differences task by task."""
    verdicts, tests = verdict_table(data.model), comparison_table(data.model)
    if verdicts is None or tests is None:
        return [absent("No comparison was tested in this run.")]
    blocks: list[Block] = [verdicts, Details("Every comparison with its test", [tests])]
    if (by_task := by_task_table(data.model)) is not None:
        blocks.append(Details("Where the differences come from, task by task", [by_task]))
    if sentences := summary_of(data.model).verdicts:
        blocks.append(Details("Every comparison in a sentence", [Bullets(sentences, "verdicts")]))
    return blocks


@SECTIONS("tasks", title="Task by task")
def tasks(data: ModelData) -> Content:
    """Accuracy by task, and the metrics that do not enter the mean."""
    notes = [Paragraph(f"Note: {cut_text(c.task, c.cut, c.items)}.", "note") for c in data.model.cut]
    return [*_with_details(accuracy_table(data.model), "Other metrics", others_table(data.model)), *notes]


@SECTIONS("perplexity", title="Perplexity")
def perplexity(data: ModelData) -> Content:
    """Perplexity by text, and closeness to the full model."""
    table = perplexity_table(data.model)
    if table is None:
        return [absent("No perplexity was measured in this run.")]
    pictures = data.perplexity if data.accuracy else data.perplexity[1:]  # the first is in the summary
    distance = distance_table(data.model)
    return [*_shown(pictures), *_with_details(table, "KL divergence and agreement with the full model", distance)]


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
            f"the {facts['keep']} experts that {short(facts['method'])} keeps of {facts['experts']} are outlined",
            f"{percentage(retain)} of the {data.model.kept_of}{width_words(facts)}",
            raster=True,
        )
    ]
    if not pictures or data.model.main is None:
        return [absent("This run has no plan with utilities by corpus, so there is no heat map."), *missing]
    text = (
        "Each panel shows every expert's share of its layer's utility on one calibration corpus. "
        f"Outlined experts are kept by {data.model.main.name}."
    )
    middle = (len(pictures) - 1) // 2
    maps = [Details(p.caption, [Pictures([p], bare=True)], i == middle) for i, p in enumerate(pictures)]
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
    pictures, table = _usage_pictures(data), usage_table(data.model, data.usage)
    if not pictures and table is None:
        return [absent("The use of experts by the tasks was not measured in this run.")]
    words = usage_words(data.usage)
    return [*([Paragraph(words)] if words else []), *_shown(pictures), *([table] if table else [])]


@SECTIONS("size", title="Size before and after")
def size(data: ModelData) -> Content:
    """Size of the checkpoint by budget, quality by size where there are further files, and peak memory."""
    table, memory = size_table(data.model), memory_words(data.model)
    if table is None:
        return [absent("No sizes are known.")]
    by_size, blocks = by_size_table(data.model), list[Block]()
    if by_size is not None:
        blocks.append(by_size)
    if verdicts := verdicts_of(data.model.by_size):
        blocks.append(Details("Files at about equal bytes, in a sentence each", [Bullets(verdicts, "verdicts")]))
    return [*blocks, table, *([Paragraph(memory, "note")] if memory else [])]


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


def _with_details(table: Table | None, summary: str, further: Table | None) -> list[Block]:
    """A table, and a further one folded away below it."""
    if table is None:
        return []
    return [table] if further is None else [table, Details(summary, [further])]


def _usage_pictures(data: ModelData) -> list[Picture]:
    from moecover.reporting.figures.by_budget import kept_weight_picture
    from moecover.reporting.figures.utility_and_use import correlation_picture, usage_by_layer_picture

    model, usage, add = data.model, data.usage, data.album.add
    chance = "; dashed: expected by chance" if usage.keep and usage.experts else ""
    return [
        *add(
            f"correlation-{data.anchor}",
            correlation_picture(model, usage),
            f"Rank correlation between the experts' utility on each corpus and their use by each task, {model.name}",
            "1: the same ranking of experts; 0: unrelated.",
        ),
        *add(
            f"shared-{data.anchor}",
            usage_by_layer_picture(model, usage),
            "Overlap between each corpus's best experts and those that the tasks use most, by decoder layer of "
            f"{model.name}",
            f"Line: mean over the tasks; band: range over the tasks{chance}.",
        ),
        *add(
            f"kept-weight-{data.anchor}",
            kept_weight_picture(model, usage),
            "Share of the tasks' routing weight that goes to kept experts against the share of experts kept, one line "
            f"per method, {model.name}; the numbers are in the table of kept routing weight",
            "The higher, the less the tasks' own routing is disturbed.",
        ),
        *add(
            f"kept-by-layer-{data.anchor}",
            _kept_by_layer(model, usage),
            f"Kept routing weight by task and decoder layer of {model.name} at one budget, one panel per task; the "
            "means over layers are in the table of kept routing weight",
            "Band: range over the runs.",
            wide=True,
        ),
    ]


def _kept_by_layer(model: ModelFindings, usage: Usage) -> Figure | None:
    """What each method keeps of the tasks' routing weight, layer by layer, at the middle budget."""
    from moecover.reporting.figures.kept_weight import kept_by_layer_picture

    budgets = model.budgets
    if not budgets or not usage.plans or usage.experts is None:
        return None
    points = {s.name: p for s in model.series for p in s.points if p.retain == budgets[len(budgets) // 2]}
    keep = next((p.keep for p in points.values() if any(c in usage.plans for c in p.cells)), None)
    if keep is None:
        return None
    alike = {name: [c for c in p.cells if c in usage.plans] for name, p in points.items() if p.keep == keep}
    methods = {name: cells for name, cells in alike.items() if cells}
    tasks = list(usage.plans[next(iter(methods.values()))[0]])
    return kept_by_layer_picture({**usage.model_dump(), "tasks": tasks}, methods, keep)
