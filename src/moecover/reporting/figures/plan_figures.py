"""The pictures of an explained plan: reads the facts of `explaining.explain`, writes PNG and SVG files into a folder.

Matplotlib is loaded by the first picture that is drawn, and is used without pyplot or a display. The same facts give
the same bytes with the same version of matplotlib.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.errors import InputError
from moecover.files.atomic import explained, write_bytes
from moecover.planning.explaining.text import MOST_PAIRS
from moecover.reporting.figures.heatmap import utility_picture
from moecover.reporting.figures.style import (
    BLUE,
    COLOURS,
    COMMON,
    DPI,
    GREEN,
    MARKERS,
    ORANGE,
    REFERENCE,
    STROKES,
    STYLE,
    VERMILION,
    layer_axis,
    page,
    percent,
    plan_name,
    short,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = ("utility", "overlap", "stability", "changes")
METADATA: dict[str, dict[str, str | None]] = {"png": {"Software": None}, "svg": {"Date": None}}


def draw(facts: Mapping[str, Any], folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Draw what the facts hold: utilities, the corpora's overlap, stability and changes.

    Args:
        facts: of `explaining.explain`.
        folder: where the pictures go; is made if it is not there.
        overwrite: replace pictures that are there, and remove those that these facts do not give.

    Returns:
        The files, each picture as PNG and as SVG.

    Raises:
        InputError: the folder is a file, or holds pictures and ``overwrite`` is not given.
        MoecoverError: the disk is full or the folder cannot be written; no picture of this run is left behind.
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
    with explained(f"removing earlier pictures from {folder}"):
        for path in _paths(folder, NAMES):
            if path not in contents:
                path.unlink(missing_ok=True)
    return written


def _paths(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / f"{name}.{kind}" for name in names for kind in METADATA]


def check_folder(folder: Path, names: Iterable[str], *, overwrite: bool) -> None:
    """Refuse a folder where a picture of one of these names is.

    Raises:
        InputError: it is a file, or holds such a picture and may not be overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, a folder for pictures is to be written there. Choose another one")
    for path in _paths(folder, names):
        if path.is_dir():
            raise InputError(f"{path} is a folder, a picture is to be written there. Choose another folder")
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists. Choose another folder, or give --overwrite")


def _rendered(facts: Mapping[str, Any]) -> dict[str, bytes]:
    """The pictures by file name."""
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


# -------------------------------------------------------------------------------------------------------------- overlap
def expected_overlap(keep: int, experts: int) -> float:
    """Mean Jaccard overlap of two sets of ``keep`` of ``experts`` that are drawn at random, all alike likely."""
    ways = {
        common: math.comb(keep, common) * math.comb(experts - keep, keep - common)
        for common in range(max(0, 2 * keep - experts), keep + 1)
    }
    total = math.comb(experts, keep)
    return math.fsum(number / total * (common / (2 * keep - common)) for common, number in ways.items())


def overlap_picture(facts: Mapping[str, Any]) -> Figure:
    """By decoder layer, how far the corpora agree: on their best experts, and on the order of all; of many, mean over layers."""
    rows, keep = facts["layers"], facts["keep"]
    layers = [row["decoder_layer"] for row in rows]
    pairs = list(itertools.combinations(facts["corpora"], 2))
    if len(pairs) > MOST_PAIRS:
        return _agreement_of_all(facts)
    names = [f"{short(a)} and {short(b)}" for a, b in pairs]
    legend = 0.9 + 0.085 * max(len(name) for name in names)
    width = min(12.0, max(5.5, 4 + 0.12 * len(rows))) + legend
    figure = page(width, max(5.5, 1 + 0.22 * len(pairs)), f"How far the corpora agree on their best {keep} of {facts['experts']} experts")  # fmt: skip
    upper, lower = figure.subplots(2, 1, sharex=True)
    parts = {
        "jaccard": (upper, expected_overlap(keep, facts["experts"]), f"overlap of the best {keep}\n(Jaccard index)"),
        "spearman": (lower, 0.0, "agreement on the order of all\n(Spearman's rank correlation)"),
    }
    size = 4 if len(rows) <= 30 else 2.5
    for measure, (axes, chance, label) in parts.items():
        for i, (a, b) in enumerate(pairs):
            values = np.array([row["agreement"][f"{a} | {b}"][measure] for row in rows], dtype=np.float64)
            turn = i // len(COLOURS)
            look = {"marker": MARKERS[turn % len(MARKERS)], "linestyle": STROKES[turn % len(STROKES)]}
            axes.plot(layers, values, color=COLOURS[i % len(COLOURS)], markersize=size, linewidth=1.2, **look)
        lines = axes.get_lines()
        reference = axes.axhline(chance, color=REFERENCE, linestyle="--", linewidth=1)
        lowest = min(
            (v for row in rows for pair in row["agreement"].values() if (v := pair[measure]) is not None), default=0.0
        )
        axes.set_ylim(min(0.0, lowest) - 0.04, 1.04)
        axes.set_ylabel(label)
        axes.grid(axis="y")
    layer_axis(lower, layers)
    figure.legend([*lines, reference], [*names, "expected of random choice"], loc="outside right upper")
    return figure


def _agreement_of_all(facts: Mapping[str, Any]) -> Figure:
    """Two matrices of corpora against corpora, mean over the layers: overlap of the best experts, agreement on the order of all."""
    corpora, keep = facts["corpora"], facts["keep"]
    side = max(3.2, 0.42 * len(corpora) + 0.07 * max(map(len, corpora)))
    title = f"How far the corpora agree on their best {keep} of {facts['experts']} experts, mean over {len(facts['layers'])} layers"  # fmt: skip
    figure = page(2 * side + 1.0, side + 1.3, title)
    chance = f"{expected_overlap(keep, facts['experts']):.2f}"
    parts = {"jaccard": f"overlap of the best {keep} (Jaccard index), of random choice {chance}", "spearman": "agreement on the order of all\n(Spearman's rank correlation), of random order 0"}  # fmt: skip
    for axes, (measure, label) in zip(figure.subplots(1, 2, sharey=True), parts.items(), strict=True):
        table = np.full((len(corpora), len(corpora)), np.nan)
        for (i, one), (j, two) in itertools.combinations(enumerate(corpora), 2):
            value = facts["overall"]["agreement"][f"{one} | {two}"][measure]
            table[i, j] = table[j, i] = np.nan if value is None else value
        axes.imshow(table, cmap="cividis", vmin=min(0.0, np.nanmin(table, initial=0.0)), vmax=1.0)
        for i, j in np.ndindex(table.shape):
            if i != j:
                known = not np.isnan(table[i, j])
                axes.text(j, i, f"{table[i, j]:.2f}"[1 if 0 <= table[i, j] < 0.995 else 0 :] if known else "-", ha="center", va="center", fontsize=8, color="black" if known and table[i, j] > 0.5 else "white" if known else REFERENCE)  # fmt: skip
        axes.set_xticks(range(len(corpora)), list(map(short, corpora)), rotation=90)
        axes.set_yticks(range(len(corpora)), list(map(short, corpora)))
        axes.set_title("\n".join(textwrap.wrap(label, 44)), fontsize=9)
    return figure


# ------------------------------------------------------------------------------------------------ stability and changes
def stability_picture(facts: Mapping[str, Any]) -> Figure:
    """Share of the kept experts that still change, by calibration tokens."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

    stable = facts["stability"]
    tokens, shares = [p["tokens"] for p in stable["curve"]], [p["changed"] for p in stable["curve"]]
    enough, allowed = stable["enough_tokens"], percent(stable["change"])
    title = f"{tokens[-1]:,} calibration tokens may not be enough: more than {allowed} of the kept experts still change"
    if enough is not None:
        title = f"{enough:,} calibration tokens are enough: at most {allowed} of the kept experts still change"
    figure = page(7.5, 5, title)
    axes = figure.subplots()
    axes.axhline(stable["change"], color=REFERENCE, linestyle="--", linewidth=1, label=f"limit: {allowed} may change")
    if enough is not None:
        axes.axvline(enough, color=GREEN, linewidth=1.5, label=f"enough: {enough:,} tokens")
    axes.plot(tokens, shares, color=BLUE, marker="o", markersize=5, clip_on=False, zorder=3, label="kept experts that the whole text still exchanges (at its end 0 by definition)")  # fmt: skip
    axes.plot([stable["half_tokens"]], [stable["halves"]], color=VERMILION, marker="D", markersize=7, linestyle="none", clip_on=False, zorder=4, label=f"first and second half of the text, {percent(stable['halves'])} of their kept experts differ")  # fmt: skip
    axes.set_xlim(0, tokens[-1] * 1.03)
    axes.set_ylim(0, max(*shares, stable["halves"], stable["change"]) * 1.12)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("calibration tokens seen, all corpora together")
    axes.set_ylabel("kept experts that change, %")
    axes.grid(axis="y")
    figure.legend(loc="outside lower left")
    return figure


def changes_picture(facts: Mapping[str, Any]) -> Figure:
    """By decoder layer, how many kept experts two plans share."""
    from matplotlib.ticker import MaxNLocator

    other = facts["changes"]
    rows, kept = other["layers"], facts["keep"] * len(other["layers"])
    layers = [row["decoder_layer"] for row in rows]
    title = f"{other['only_here']} of {kept} kept experts are not in the other plan"
    figure = page(min(14.0, max(7.5, 2 + 0.16 * len(rows))), 4.5, "Both plans keep the same experts" if other["same"] else title)  # fmt: skip
    axes = figure.subplots()
    parts = [
        (COMMON, "in both plans", [row["common"] for row in rows]),
        (BLUE, f"only here: {plan_name(facts['method'], facts['options'], facts['keep'])}", [len(row["only_here"]) for row in rows]),
        (ORANGE, f"only there: {plan_name(other['method'], other['options'], other['keep'])}", [len(row["only_there"]) for row in rows]),
    ]  # fmt: skip
    below, width = np.zeros(len(rows), dtype=np.int64), min(0.8, 0.2 + 0.1 * len(rows))  # few bars do not fill the page
    for colour, label, numbers in parts:
        axes.bar(layers, numbers, bottom=below, width=width, color=colour, label=label)
        below += numbers
    layer_axis(axes, layers)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_ylabel("experts (number)")
    axes.grid(axis="y")
    figure.legend(loc="outside lower left")
    return figure


def _wanted(facts: Mapping[str, Any]) -> dict[str, Callable[[Mapping[str, Any]], Figure]]:
    """The pictures that these facts have, by name."""
    there = (True, len(facts["corpora"]) > 1, facts.get("stability") is not None, "changes" in facts)
    makers = (utility_picture, overlap_picture, stability_picture, changes_picture)
    return {name: make for name, make, wanted in zip(NAMES, makers, there, strict=True) if wanted}
