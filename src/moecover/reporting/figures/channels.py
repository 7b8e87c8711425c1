"""The share of channel energy that thinner experts keep, by layer: reads the facts of `explain`, gives a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moecover.reporting.figures.lines import look_of
from moecover.reporting.figures.style import REFERENCE, Facts, layer_axis, page, percent, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def channels_picture(facts: Facts) -> Figure:
    """Share of the kept experts' channel energy that stays, by decoder layer, a line per corpus.

    Args:
        facts: of `explain`, with ``channels`` from a profile.
    """
    from matplotlib.ticker import PercentFormatter

    thin, layers = facts["channels"], [row["decoder_layer"] for row in facts["layers"]]
    corpus = min(thin["least"], key=lambda name: thin["least"][name])
    part = thin["width"] / thin["channels"]
    kept = f"{thin['width']} of {thin['channels']} channels hold at least {percent(thin['least'][corpus])}"
    title = f"{kept} of the kept experts' energy: {short(corpus)} in decoder layer {thin['least_layer'][corpus]}"
    figure = page(min(14.0, max(7.5, 2 + 0.16 * len(layers))), 4.5, title)
    axes = figure.subplots()
    size = 5 if len(layers) <= 12 else 3
    for turn, name in enumerate(thin["of_experts"]):
        shares = [row["of_experts"][name] for row in thin["layers"]]
        mean = percent(thin["of_experts"][name])
        axes.plot(layers, shares, **look_of(turn), markersize=size, linewidth=1.5, label=f"{short(name)}, mean {mean}")
    axes.axhline(part, color=REFERENCE, linestyle="--", linewidth=1, label=f"share of channels kept, {percent(part)}")
    layer_axis(axes, layers)
    axes.set_ylim(max(0.0, min(part, thin["least"][corpus]) - 0.05), 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("channel energy that stays")
    axes.grid(axis="y")
    figure.legend(loc="outside lower left", ncols=2)
    return figure
