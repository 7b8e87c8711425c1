"""The figures of how the tasks use the experts, and of what plans keep of that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moecover.reporting.blocks import Picture
from moecover.reporting.context import ModelData
from moecover.reporting.data import Usage
from moecover.reporting.findings import ModelFindings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def usage_pictures(data: ModelData) -> list[Picture]:
    """Agreement of utility and use, by task and by layer, and the routing weight that plans keep."""
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
    points = {s.name: p for s in model.series for p in reversed(s.points) if p.retain == budgets[len(budgets) // 2]}
    keep = next((p.keep for p in points.values() if any(c in usage.plans for c in p.cells)), None)
    if keep is None:
        return None
    alike = {name: [c for c in p.cells if c in usage.plans] for name, p in points.items() if p.keep == keep}
    methods = {name: cells for name, cells in alike.items() if cells}
    tasks = list(usage.plans[next(iter(methods.values()))[0]])
    return kept_by_layer_picture({**usage.model_dump(), "tasks": tasks}, methods, keep)
