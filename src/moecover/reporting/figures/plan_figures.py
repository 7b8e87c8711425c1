"""The figures of an explained plan: reads the facts of `explain`, writes PNG and SVG files into a folder.

Matplotlib is loaded when the first figure is drawn, and is used without pyplot or a display. The same facts give the
same bytes with the same version of matplotlib.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moecover.errors import InputError, arg
from moecover.files.atomic import explained, write_bytes
from moecover.planning.shapes import shape_name
from moecover.reporting.figures.channels import channels_picture
from moecover.reporting.figures.heatmap import utility_picture
from moecover.reporting.figures.overlap import overlap_picture
from moecover.reporting.figures.style import (
    BLUE,
    COMMON,
    DPI,
    GREEN,
    ORANGE,
    REFERENCE,
    STYLE,
    VERMILION,
    Facts,
    layer_axis,
    page,
    percent,
    plan_name,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = ("utility", "channels", "overlap", "stability", "changes")
METADATA: dict[str, dict[str, str | None]] = {"png": {"Software": None}, "svg": {"Date": None}}


def draw(facts: Facts, folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Draw what the facts hold: utilities, channels of thinner experts, overlap, stability and changes.

    Args:
        facts: of `explain`.
        folder: for the figures; created if it does not exist.
        overwrite: replace existing figures, and remove those that these facts do not give.

    Returns:
        The files, each figure as PNG and as SVG.

    Raises:
        InputError: the folder is a file, or holds figures and ``overwrite`` is not given.
        MoecoverError: the disk is full or the folder cannot be written; no figure of this run is left behind.
    """
    check_folder(folder, NAMES, overwrite=overwrite)
    contents = {folder / name: content for name, content in _rendered(facts).items()}
    written: list[Path] = []
    try:
        for path, content in contents.items():
            write_bytes(path, content)
            written.append(path)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    with explained(f"removing earlier figures from {folder}"):
        for path in _paths(folder, NAMES):
            if path not in contents:
                path.unlink(missing_ok=True)
    return written


def _paths(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / f"{name}.{kind}" for name in names for kind in METADATA]


def check_folder(folder: Path, names: Iterable[str], *, overwrite: bool) -> None:
    """Refuse a folder that holds a figure of one of these names.

    Raises:
        InputError: it is a file, or holds such a figure and may not be overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, but the figures need a folder. Choose another one")
    for path in _paths(folder, names):
        if path.is_dir():
            raise InputError(f"{path} is a folder, but a figure needs that name. Choose another folder")
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists. Choose another folder, or give {arg('overwrite')}")


def _rendered(facts: Facts) -> dict[str, bytes]:
    """The figures by file name."""
    from matplotlib import style

    contents = {}
    with style.context(STYLE, after_reset=True):
        for name, figure_of in _wanted(facts).items():
            figure = figure_of(facts)
            for kind, metadata in METADATA.items():
                buffer = io.BytesIO()
                figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
                contents[f"{name}.{kind}"] = buffer.getvalue()
    return contents


# ------------------------------------------------------------------------------------------------ stability and changes
def stability_picture(facts: Facts) -> Figure:
    """Proportion of the kept experts that still change, by calibration tokens.

    Args:
        facts: of `explain`, with ``stability``.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

    stable = facts["stability"]
    tokens, shares = [p["tokens"] for p in stable["curve"]], [p["changed"] for p in stable["curve"]]
    enough, allowed = stable["enough_tokens"], percent(stable["change"])
    title = f"{tokens[-1]:,} calibration tokens may not be enough: more than {allowed} of the kept experts still change"
    if enough is not None:
        needed = "were needed at most" if enough == tokens[0] else "are enough"
        title = f"{enough:,} calibration tokens {needed}: at most {allowed} of the kept experts still change"
    figure = page(7.5, 5, title)
    axes = figure.subplots()
    axes.axhline(stable["change"], color=REFERENCE, linestyle="--", linewidth=1, label=f"limit: {allowed} may change")
    if enough is not None:
        axes.axvline(enough, color=GREEN, linewidth=1.5, label=f"settled from {enough:,} tokens on")
    axes.plot(
        tokens,
        shares,
        color=BLUE,
        marker="o",
        markersize=5,
        clip_on=False,
        zorder=3,
        label="kept experts that the full text would still replace (0 at its end by definition)",
    )
    axes.plot(
        [stable["half_tokens"]],
        [stable["halves"]],
        color=VERMILION,
        marker="D",
        markersize=7,
        linestyle="none",
        clip_on=False,
        zorder=4,
        label=f"first against second half of the text: {percent(stable['halves'])} of the kept experts differ",
    )
    axes.set_xlim(0, tokens[-1] * 1.03)
    axes.set_ylim(0, max(*shares, stable["halves"], stable["change"]) * 1.12)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("calibration tokens, all corpora together")
    axes.set_ylabel("kept experts that change, %")
    axes.grid(axis="y")
    figure.legend(loc="outside lower left")
    return figure


def changes_picture(facts: Facts) -> Figure:
    """Number of kept experts that two plans share, by decoder layer.

    Args:
        facts: of `explain`, with ``changes``.
    """
    from matplotlib.ticker import MaxNLocator

    other = facts["changes"]
    rows, kept = other["layers"], facts["keep"] * len(other["layers"])
    layers = [row["decoder_layer"] for row in rows]
    title = f"{other['only_here']} of {kept} kept experts are not in the other plan"
    if not other["only_here"] and not other["only_there"]:
        title = "Both plans keep the same experts"
    figure = page(min(14.0, max(7.5, 2 + 0.16 * len(rows))), 4.5, title)
    axes = figure.subplots()
    here = plan_name(
        facts["method"], facts["options"], shape_name(facts["keep"], facts.get("channels", {}).get("width"))
    )
    there = plan_name(other["method"], other["options"], shape_name(other["keep"], other["width"]))
    parts = [
        (COMMON, "in both plans", [row["common"] for row in rows]),
        (BLUE, f"only here: {here}", [len(row["only_here"]) for row in rows]),
        (ORANGE, f"only there: {there}", [len(row["only_there"]) for row in rows]),
    ]
    below, width = np.zeros(len(rows), dtype=np.int64), min(0.8, 0.2 + 0.1 * len(rows))  # few bars do not fill the page
    for colour, label, numbers in parts:
        axes.bar(layers, numbers, bottom=below, width=width, color=colour, label=label)
        below += numbers
    layer_axis(axes, layers)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_ylabel("number of experts")
    axes.grid(axis="y")
    figure.legend(loc="outside lower left")
    return figure


def _wanted(facts: Facts) -> dict[str, Callable[[Facts], Figure]]:
    """The functions that draw what these facts hold, by the name of the figure."""
    thin = facts.get("channels", {}).get("channels") is not None
    there = (True, thin, len(facts["corpora"]) > 1, facts.get("stability") is not None, "changes" in facts)
    makers = (utility_picture, channels_picture, overlap_picture, stability_picture, changes_picture)
    return {name: make for name, make, wanted in zip(NAMES, makers, there, strict=True) if wanted}
