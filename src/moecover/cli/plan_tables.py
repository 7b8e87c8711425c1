"""Tables of plans that were found for a bound: every measured point, the chosen one marked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moecover.terminal import aligned

if TYPE_CHECKING:
    from moecover.planning.artifact import Plan


def _sizes(points: Sequence[Mapping[str, Any]]) -> tuple[str, Callable[[Mapping[str, Any]], str]]:
    """The unit in which some sizes are shown, and the function that shows one."""
    large = max(point["num_bytes"] for point in points) >= 1e9
    unit, scale, digits = ("GB", 1e9, 2) if large else ("MB", 1e6, 1)
    return unit, lambda point: f"{point['num_bytes'] / scale:.{digits}f}"


def curve_table(plan: Plan) -> str:
    """The curve of a found plan as aligned text, the chosen number marked."""
    found = plan.found
    unit, size_of = _sizes(found["curve"])
    rows = []
    for point in found["curve"]:
        cells = [f"{point['perplexity'][text]:.2f} ({point['increase'][text]:+.1%})" for text in found["full"]]
        mark = "chosen" if point["keep"] == plan.keep else "holds" if point["holds"] else ""
        rows.append([str(point["keep"]), size_of(point), *cells, f"{max(point['increase'].values()):+.1%}", mark])
    rows.append(["all", "", *(f"{value:.2f}" for value in found["full"].values()), "", ""])
    headings = ["experts", unit, *found["full"], "worst", ""]
    return aligned(headings, rows)


def shapes_table(plan: Plan) -> str:
    """The measured shapes of a plan that was found for a budget, as aligned text, the chosen one marked."""
    found = plan.found
    unit, size_of = _sizes(found["shapes"])
    rows = []
    for point in found["shapes"]:
        chosen = point["keep"] == plan.keep and plan.width in (point["width"], None)
        cells = [f"{value:+.3f}" for value in point["gap"].values()]
        mark = "chosen" if chosen else ""
        rows.append([str(point["keep"]), str(point["width"]), size_of(point), *cells, f"{point['loss']:.4f}", mark])
    headings = ["experts", "channels", unit, *found["full"], "worst twice", ""]
    return aligned(headings, rows)
