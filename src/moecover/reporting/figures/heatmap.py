"""The heat map of a plan: reads the facts of `explain`, gives a figure with a panel for every corpus.

It is laid out in pixels of the PNG, so that cells and outlines begin and end on a pixel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.reporting.figures.ranked import KEPT, REMOVED, SMALLEST, colours, ranked_handles, ranked_map
from moecover.reporting.figures.style import COLOUR_MAP, DPI, FAINT, TITLE_SIZE, VERMILION, Facts, percent, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

CELL, SMALL_CELL = 60, 8  # pixels: the widest cell, and the width that the cells of a wide panel shrink to
PANEL_WIDTH, WIDEST_PANEL = 1500, 2100  # target width of a panel, and its maximum
SLOT, LOWEST_PANEL = 420, 130  # minimum width for a panel's heading, and minimum height for its axis label
WIDEST, HIGHEST = 3000, 3600  # maximum width of all panels side by side, and height of all above each other
NARROWEST_PAGE = 1000
HEADER, HEADING, LEFT, BELOW, BETWEEN, RIGHT = 190, 64, 90, 44, 100, 30
DARKEST = 0.995  # quantile that gets the darkest colour: a few extreme experts would make all others pale
TICKS_APART = 0.12  # of the colour bar, as a fraction of its length
BAR = 18  # thickness of the colour bars together
LABEL = 34  # height of the axis label under the lowest panel


def arrangement(layers: int, experts: int, panels: int) -> tuple[int, int, int]:
    """Lay panels of ``[layer, expert]`` out on a page: number of columns, width and height of a cell in pixels."""
    width = max(3, min(CELL, max(PANEL_WIDTH // experts, min(SMALL_CELL, WIDEST_PANEL // experts))))
    height = max(width, math.ceil(LOWEST_PANEL / layers))
    slot = max(SLOT, experts * width)

    def unbalanced(columns: int) -> float:
        lines = math.ceil(panels / columns)
        return abs(math.log(columns * slot / (lines * (layers * height + HEADING + BELOW) * 1.3)))

    columns: int = min((c for c in range(1, panels + 1) if c == 1 or c * slot <= WIDEST), key=unbalanced)
    lines = math.ceil(panels / columns)
    return columns, width, max(4, min(height, HIGHEST // (lines * layers)))


def outlines(kept: Sequence[Sequence[int]], dx: float, dy: float) -> NDArray[np.float64]:
    """Corners of the kept cells' outlines, float64 ``[cell, corner, (expert, layer)]``; cells are 1 wide and high.

    Args:
        kept: ids of the kept experts by layer.
        dx: distance of the outline from the left and right edges, as a fraction of the cell.
        dy: the same for the upper and lower edges.
    """
    centres = np.array([(e, i) for i, ids in enumerate(kept) for e in ids], dtype=np.float64).reshape(-1, 1, 2)
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (0.5 - dx, 0.5 - dy)
    return centres + corners


def scale_ticks(top: float) -> list[float]:
    """Ticks for a square-root scale: 0, and 1, 2, 5 times powers of ten up to ``top``, thinned so that labels fit."""
    exponent = math.floor(math.log10(top))
    ticks: list[float] = []
    last = math.inf
    for value in (m * 10.0**e for e in range(exponent, exponent - 4, -1) for m in (5, 2, 1)):
        place = math.sqrt(value / top)
        if value <= top and place > TICKS_APART and last - place > TICKS_APART:
            ticks.append(value)
            last = place
    return [0.0, *reversed(ticks)]


def _step(pixels: int, needed: int) -> int:
    """The smallest step of 1, 2, 5, 10, ... cells at which labels of the needed pixels fit."""
    steps = (m * 10**e for e in itertools.count() for m in (1, 2, 5))
    fitting: int = next(step for step in steps if step * pixels >= needed)
    return fitting


def is_ranked(facts: Facts) -> bool:
    """Whether the cells are too small for outlines, so that a corpus's experts are sorted and told apart by colour."""
    _, cell, high = arrangement(len(facts["layers"]), facts["experts"], len(facts["corpora"]))
    return min(cell, high) < SMALLEST


def utility_picture(facts: Facts) -> Figure:
    """Each expert's share of its layer's utility, a panel per corpus, with the kept experts outlined.

    Where there are too many experts and layers for outlines, a corpus's experts are sorted from its best to its worst.

    Args:
        facts: of `explain`.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    corpora, rows, experts = facts["corpora"], facts["layers"], facts["experts"]
    values = {corpus: 100 * np.asarray(facts["utility"][corpus], dtype=np.float64) for corpus in corpora}
    top = float(np.quantile(list(values.values()), DARKEST)) or max(float(v.max()) for v in values.values()) or 1.0
    norm = PowerNorm(0.5, 0, top)  # most utilities are small: the square root shows them apart
    columns, cell, high = arrangement(len(rows), experts, len(corpora))
    panel, panel_high, slot = experts * cell, len(rows) * high, max(SLOT, experts * cell)
    lines = math.ceil(len(corpora) / columns)
    wide = max(NARROWEST_PAGE, LEFT + columns * slot + (columns - 1) * BETWEEN + RIGHT)
    tall = HEADER + lines * (HEADING + panel_high + BELOW) + LABEL
    figure = Figure(figsize=(wide / DPI, tall / DPI))
    ranked = is_ranked(facts)
    beyond = max(float(v.max()) for v in values.values()) > top
    _utility_header(figure, facts, _bars(norm, ranked, beyond), wide, tall, ranked=ranked)
    for i, corpus in enumerate(corpora):
        line, column = divmod(i, columns)
        left, top = LEFT + column * (slot + BETWEEN), HEADER + HEADING + line * (HEADING + panel_high + BELOW)
        axes = figure.add_axes((left / wide, 1 - (top + panel_high) / tall, panel / wide, panel_high / tall))
        if ranked:
            ranked_map(axes, facts, corpus, norm)
        else:
            axes.imshow(values[corpus], cmap=COLOUR_MAP, norm=norm, aspect="auto", interpolation="none")
            _mark(axes, rows, corpus, norm(values[corpus]), cell, high)
        axes.spines[:].set(visible=True, linewidth=0.5)
        axes.tick_params(length=2.5, width=0.5)
        _expert_ticks(axes, rows, experts, cell, high)
        if column == 0:
            axes.set_ylabel("decoder layer")
        if i + columns >= len(corpora):
            axes.set_xlabel("experts of the layer, from this corpus's best on" if ranked else "expert (id)", loc="left")
        _panel_heading(axes, facts, corpus, panel_high)
    return figure


def _bars(norm: Normalize, ranked: bool, beyond: bool) -> list[dict[str, Any]]:
    """What the colour bars show, one a colour map; ``beyond``: some utilities are above the scale."""
    from matplotlib.cm import ScalarMappable

    maps = (colours(REMOVED), colours(KEPT)) if ranked else (COLOUR_MAP,)
    return [{"mappable": ScalarMappable(norm, one), "extend": "max" if beyond else "neither"} for one in maps]


def _utility_header(
    figure: Figure, facts: Facts, bars: Sequence[dict[str, Any]], wide: int, tall: int, *, ranked: bool
) -> None:
    """Draw title, colour bars and legend above the panels."""
    several = len(facts["corpora"]) > 1
    title = f"Which experts {'each corpus' if several else 'the corpus'} uses, and which of them the plan keeps"
    figure.text(20 / wide, 1 - 16 / tall, title, fontsize=TITLE_SIZE, va="top")
    number = len(facts["layers"])
    where = f"each of {number} MoE layers" if number > 1 else "1 MoE layer"
    subtitle = f"{short(facts['method'], 30)} keeps {facts['keep']} of {facts['experts']} experts in {where}"
    figure.text(20 / wide, 1 - 50 / tall, subtitle, color=FAINT, va="top")
    figure.text(LEFT / wide, 1 - 90 / tall, f"utility ({short(facts['saliency'], 20)}), % of the layer", va="top")
    thick = BAR / len(bars)
    for above, shown in enumerate(reversed(bars)):  # the lowest has the ticks of all
        axes = figure.add_axes((LEFT / wide, 1 - (136 - above * thick) / tall, 330 / wide, thick / tall))
        bar = figure.colorbar(**shown, cax=axes, orientation="horizontal")
        ticks = [] if above else scale_ticks(float(bar.norm.vmax or 1.0))
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.outline.set(linewidth=0.5, edgecolor=FAINT)
        bar.minorticks_off()
    handles, names = ranked_handles(facts) if ranked else _outlined_handles(facts)
    place = ((LEFT + 410) / wide, 1 - 84 / tall)
    figure.legend(handles, names, loc="upper left", bbox_to_anchor=place, borderaxespad=0, borderpad=0)


def _outlined_handles(facts: Facts) -> tuple[list[Any], list[str]]:
    """Handles and names of the legend where kept cells are outlined."""
    from matplotlib.lines import Line2D

    several = len(facts["corpora"]) > 1
    shared: dict[str, Any] = {"linestyle": "none", "marker": "s", "markersize": 9, "markerfacecolor": "#C6DBEF"}
    square = Line2D([], [], markeredgecolor=VERMILION, markeredgewidth=1.4, **shared)
    dot = Line2D([], [], linestyle="none", marker="o", markersize=3, color="black")
    handles: list[Any] = [Line2D([], [], markeredgecolor="none", **shared), square]
    names = ["removed", "kept"]
    if any(row["protected"].get(corpus) for row in facts["layers"] for corpus in facts["corpora"]):
        handles.append((square, dot))
        names.append("kept, protected by this corpus" if several else "kept, protected by the corpus")
    return handles, names


def _mark(axes: Axes, rows: Sequence[Facts], corpus: str, dark: NDArray[np.float64], cell: int, high: int) -> None:
    """Outline the kept cells and dot those that this corpus protects.

    ``dark`` is the colour of every cell, ``[layer, expert]``, 0 (palest) to 1 (darkest) or above.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    smaller = min(cell, high)
    line = 3 if smaller >= 16 else 2 if smaller >= 10 else 1
    corners = outlines([row["kept"] for row in rows], line / 2 / cell, line / 2 / high)
    closed = np.concatenate([corners, corners[:, :1]], axis=1).reshape(-1, 2)
    codes = np.tile([Curve.MOVETO, *[Curve.LINETO] * 3, Curve.CLOSEPOLY], len(corners))
    outline = PathPatch(Curve(closed, codes), fill=False, edgecolor=VERMILION, linewidth=line * 72 / DPI, snap=False)
    axes.add_patch(outline)
    protected = [(e, i) for i, row in enumerate(rows) for e in row["protected"].get(corpus, ())]
    dots: dict[str, Any] = {"linestyle": "none", "marker": "o" if smaller >= 16 else "s", "markeredgewidth": 0}
    dots["markersize"] = max(2, round(0.3 * smaller)) * 72 / DPI
    for colour, under in (("black", False), ("white", True)):
        some = [(e, i) for e, i in protected if bool(dark[i, e] > 0.6) == under]
        axes.plot([e for e, _ in some], [i for _, i in some], color=colour, **dots)


def _expert_ticks(axes: Axes, rows: Sequence[Facts], experts: int, cell: int, high: int) -> None:
    layers = [row["decoder_layer"] for row in rows]
    step = _step(high, 24)
    first = next((i for i, layer in enumerate(layers[:step]) if layer % step == 0), 0)
    axes.set_yticks(range(first, len(layers), step), labels=[str(layer) for layer in layers[first::step]])
    axes.set_xticks(range(0, experts, _step(cell, 12 * len(str(experts)) + 12)))


def _panel_heading(axes: Axes, facts: Facts, corpus: str, panel_high: int) -> None:
    over = facts["overall"]
    kept = f"{percent(over['kept_utility'][corpus])} of its utility kept"
    if len(facts["layers"]) > 1:
        kept += f", in the worst layer {percent(over['least_kept_utility'][corpus])}"
    axes.text(0, 1 + 32 / panel_high, short(corpus), transform=axes.transAxes, fontsize=10, va="bottom")
    axes.text(0, 1 + 8 / panel_high, kept, transform=axes.transAxes, fontsize=8, color=FAINT, va="bottom")
