"""The style of the figures: colours, fonts, pages, and text from files as it can be drawn. Reads and writes nothing."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150

Facts = Mapping[str, Any]  # JSON-ready facts: of `explain`, or an entry of usage.json

# Okabe and Ito's palette, which colour-blind readers can tell apart, without black and the yellow, too pale for lines.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
MARKERS, STROKES = "os^Dv", ("-", ":", "-.")  # used in turn when the colours run out
REFERENCE, COMMON, FAINT = "#000000", "#BBBBBB", "#555555"
COLOUR_MAP = "Blues"

FONT, GRID = "DejaVu Sans", "#E5E5E5"

STYLE: dict[str, str | float | bool] = {
    "font.family": FONT,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.parse_math": False,
    "svg.hashsalt": "moecover",
}
TITLE_SIZE = 12


class Look(TypedDict):
    """How a line is drawn, as keywords of matplotlib."""

    color: str
    marker: str
    linestyle: str


@functools.cache
def _drawable() -> frozenset[int]:
    """Code points that the font, which comes with matplotlib, can draw."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(FONT)).get_charmap())


def short(text: str, limit: int = 28) -> str:
    """Text as it can be drawn: on one line, characters that the font lacks as escapes, cut at ``limit`` characters."""
    plain = "".join(c if c.isprintable() and ord(c) in _drawable() else ascii(c)[1:-1] for c in text)
    return plain if len(plain) <= limit else f"{plain[: limit - 1]}…"


def percent(share: float) -> str:
    """A proportion as a percentage to three significant digits."""
    return f"{100 * share:.3g}%"


def plan_name(method: str, options: Mapping[str, object], shape: str) -> str:
    """Method, options and shape of a plan, cut to fit a legend."""
    given = "".join(f", {name} {value}" for name, value in options.items())
    return short(f"{method}{given}, keep {shape}", 70)


def page(width: float, height: float, title: str) -> Figure:
    """A figure of a size in inches, whose parts matplotlib lays out under the title."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    wrapped = textwrap.fill(title, int(width * 11))  # about eleven letters an inch
    figure.suptitle(wrapped, x=0.1 / width, ha="left", fontsize=TITLE_SIZE)
    return figure


def layer_axis(axes: Axes, layers: Sequence[int]) -> None:
    """Make the x axis one of decoder layers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    axes.set_xlabel("decoder layer (index)")
