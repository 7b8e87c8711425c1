"""Pictures of a plan: reads the facts that `explaining.explain` gives, writes PNG and SVG files.

The same facts give the same bytes. Nothing here needs a display.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.errors import InputError
from moecover.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

NAMES = ("utility", "overlap", "stability", "changes")
FORMATS = ("png", "svg")
# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "moecover",
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "axes.titlesize": 10, "axes.titlelocation": "left",
}  # fmt: skip


def outline(mask: NDArray[np.bool_]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Border of the True cells of ``[row, column]`` as lines ``(x, y)`` to ``(x, y)``; cell (r, c) spans c to c + 1, r to r + 1."""
    padded = np.pad(mask, 1)
    lines: list[Any] = [((c, r), (c, r + 1)) for r, c in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]).tolist()]
    lines += [((c, r), (c + 1, r)) for r, c in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]).tolist()]
    return lines


def expected_overlap(keep: int, experts: int) -> float:
    """Mean Jaccard overlap of two random sets of ``keep`` of ``experts`` (hypergeometric intersection)."""
    total = math.comb(experts, keep)
    sizes = range(max(0, 2 * keep - experts), keep + 1)
    return sum(math.comb(keep, i) * math.comb(experts - keep, keep - i) / total * i / (2 * keep - i) for i in sizes)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def _layer_ticks(axis: Any, layers: Sequence[int], positions: Sequence[float], most: int) -> None:
    step = max(1, math.ceil(len(layers) / most))
    axis.set_ticks(positions[::step], [str(layer) for layer in layers[::step]])


def utility_picture(facts: Mapping[str, Any]) -> Figure:
    """Heat map of utility, layer by expert, a panel for every corpus; kept experts outlined, protected ones dotted."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import PowerNorm
    from matplotlib.lines import Line2D

    rows, corpora, experts = facts["layers"], facts["corpora"], facts["experts"]
    layers = [row["decoder_layer"] for row in rows]
    mask = np.zeros((len(rows), experts), dtype=bool)
    for line, row in zip(mask, rows, strict=True):
        line[row["kept"]] = True
    values = {corpus: np.array(facts["utility"][corpus]) * experts for corpus in corpora}
    top = float(np.quantile(list(values.values()), 0.995)) or 1.0  # a few extreme experts would darken all others
    cell = min(0.24, 12.0 / experts)
    width, height = max(6.0, cell * experts + 1.8), max(0.9, min(0.26, 9.0 / len(rows)) * len(rows)) + 0.55
    figure, axes = _figure(width, height * len(corpora) + 0.9, len(corpora))
    norm = PowerNorm(0.5, 0, top)  # most utilities are small: the square root shows them apart
    thin = 1.6 if experts <= 80 else 0.7
    for axis, corpus in zip(axes, corpora, strict=True):
        axis.pcolormesh(values[corpus], cmap="cividis", norm=norm, rasterized=True)
        for colour, extra in (("black", 1.4), ("white", 0.0)):  # a light line on a dark one is seen on any ground
            axis.add_collection(LineCollection(outline(mask), colors=colour, linewidths=thin + extra * thin / 1.6))
        own = [(e + 0.5, i + 0.5) for i, row in enumerate(rows) for e in row["protected"].get(corpus, ())]
        if own:
            axis.scatter(*zip(*own, strict=True), s=max(2.0, 60 * cell), c="white", edgecolors="black", linewidths=0.5, zorder=3)  # fmt: skip
        axis.set(xlim=(-0.1, experts + 0.1), ylim=(len(rows) + 0.08, -0.08), ylabel="decoder layer", title=f"{corpus}: {facts['overall']['kept_utility'][corpus]:.1%} of the utility kept")  # fmt: skip
        step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if s * 26 >= experts)
        axis.set_xticks([e + 0.5 for e in range(0, experts, step)], [str(e) for e in range(0, experts, step)])
        _layer_ticks(axis.yaxis, layers, [i + 0.5 for i in range(len(layers))], 20)
        axis.tick_params(length=0)
        for side in ("left", "bottom"):
            axis.spines[side].set_visible(False)
    axes[-1].set_xlabel("expert")
    bar = figure.colorbar(ScalarMappable(norm, "cividis"), ax=axes, fraction=0.03, pad=0.01, aspect=25, extend="max")
    bar.set_label(f"{facts['saliency']}, mean expert = 1")
    key = [Line2D([], [], color="black", marker="s", markerfacecolor="none", linestyle="", markersize=8, markeredgewidth=1.6, label=f"kept ({facts['keep']} of {experts})")]  # fmt: skip
    if any(row["protected"] for row in rows):
        key.append(Line2D([], [], color="black", marker="o", markerfacecolor="white", linestyle="", markersize=5, label="protected by this corpus"))  # fmt: skip
    figure.legend(handles=key, loc="outside lower left", ncols=2, frameon=False)
    figure.suptitle(f"What every expert is worth to every corpus, and what {facts['method']} keeps", x=0.01, ha="left", fontsize=11)  # fmt: skip
    return figure


def overlap_picture(facts: Mapping[str, Any]) -> Figure:
    """By layer, how much the corpora agree: overlap of their best experts, and rank correlation."""
    rows = facts["layers"]
    layers = [row["decoder_layer"] for row in rows]
    figure, axes = _figure(max(6.0, min(13.0, 2.5 + 0.16 * len(rows))), 5.2, 2)
    keep, experts = facts["keep"], facts["experts"]
    for axis, name, label in (
        (axes[0], "jaccard", f"Jaccard overlap\nof the best {keep}"),
        (axes[1], "spearman", "Spearman's rank\ncorrelation"),
    ):
        for i, pair in enumerate(rows[0]["agreement"]):
            points = [row["agreement"][pair][name] for row in rows]
            values = [math.nan if p is None else p for p in points]
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i % len(MARKS)]}
            axis.plot(layers, values, markersize=4, linewidth=1.5, label=pair.replace(" | ", " and "), **look)
        axis.set(ylabel=label, ylim=(min(0.0, *(p for row in rows for p in [v[name] or 0 for v in row["agreement"].values()])) - 0.02, 1.03))  # fmt: skip
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        _layer_ticks(axis.xaxis, layers, layers, 30)
    chance = expected_overlap(keep, experts)
    axes[0].axhline(chance, color="#555555", linestyle="--", linewidth=1)
    axes[0].annotate(f"two random choices: {chance:.2f}", (0.995, chance), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", ha="right", va="bottom", color="#555555", fontsize=8)  # fmt: skip
    axes[0].set_title("Do the corpora want the same experts?")
    axes[1].set_xlabel("decoder layer")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def stability_picture(facts: Mapping[str, Any]) -> Figure:
    """How many kept experts the whole text still exchanges, by tokens seen."""
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    stable = facts["stability"]
    tokens = [point["tokens"] for point in stable["curve"]]
    changed = [point["changed"] for point in stable["curve"]]
    figure, (axis,) = _figure(6.4, 3.8)
    axis.plot(tokens, changed, color=COLOURS[0], marker="o", markersize=4, label="the whole text still exchanges")
    axis.plot([stable["half_tokens"]], [stable["halves"]], color=COLOURS[1], marker="D", linestyle="", label="plans of the two halves differ in")  # fmt: skip
    axis.axhline(stable["change"], color="#555555", linestyle="--", linewidth=1, label=f"limit, {stable['change']:.0%}")
    if (enough := stable["enough_tokens"]) is not None:
        axis.axvline(enough, color=COLOURS[2], linewidth=1.2, label=f"enough: {enough:,} tokens")
    title = f"{enough:,} tokens are enough for this plan" if enough else f"{tokens[-1]:,} tokens may not be enough for this plan"  # fmt: skip
    axis.set(xlabel="calibration tokens, all corpora together", ylabel="share of the kept experts", title=title)
    highest = max([*changed, stable["halves"], stable["change"]])
    axis.set(xlim=(0, tokens[-1] * 1.03), ylim=(-0.03 * highest, 1.15 * highest))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.get_major_locator().set_params(nbins=6)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.legend(frameon=False, fontsize=8)
    return figure


def changes_picture(facts: Mapping[str, Any]) -> Figure:
    """By layer, the experts that two plans share and those that only one keeps."""
    from matplotlib.ticker import MaxNLocator

    change = facts["changes"]
    rows = change["layers"]
    layers, place = [row["decoder_layer"] for row in rows], np.arange(len(rows))
    figure, (axis,) = _figure(max(6.0, min(13.0, 2.5 + 0.2 * len(rows))), 3.8)
    bottom = np.zeros(len(rows))
    parts = (
        ("in both", [row["common"] for row in rows], "#BBBBBB", None),
        (f"only in this plan ({facts['method']}, keep {facts['keep']})", [len(row["only_here"]) for row in rows], COLOURS[0], "//"),
        (f"only in the other ({change['method']}, keep {change['keep']})", [len(row["only_there"]) for row in rows], COLOURS[1], "\\\\"),
    )  # fmt: skip
    for label, heights, colour, hatch in parts:
        axis.bar(place, heights, 0.8, bottom, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4, label=label)
        bottom = bottom + np.array(heights)
    _layer_ticks(axis.xaxis, layers, place.tolist(), 30)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="decoder layer", ylabel="experts", title=f"What two plans keep: overlap {change['jaccard']:.2f}")
    figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    return figure


def _wanted(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The pictures that these facts have, by name."""
    pictures: dict[str, Any] = {"utility": utility_picture}
    if facts["layers"][0]["agreement"]:
        pictures["overlap"] = overlap_picture
    if facts.get("stability") is not None:
        pictures["stability"] = stability_picture
    if "changes" in facts:
        pictures["changes"] = changes_picture
    return pictures


def check_folder(folder: Path, names: Iterable[str], *, overwrite: bool) -> None:
    """Refuse a folder where a picture of one of these names is.

    Raises:
        InputError: it is a file, or holds such a picture and may not be overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, a folder for pictures is to be written there")
    there = next((folder / f"{n}.{kind}" for n in names for kind in FORMATS if (folder / f"{n}.{kind}").exists()), None)
    if there is not None and not overwrite:
        raise InputError(f"{there} exists. Choose another folder, or give --overwrite")


def draw(facts: Mapping[str, Any], folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Draw the pictures of a plan: utility, and overlap, stability and changes where the facts have them.

    Args:
        facts: from `explaining.explain`.
        folder: for the files, ``NAME.png`` and ``NAME.svg``.
        overwrite: replace pictures of these names; those that are not drawn this time go.

    Raises:
        InputError: the folder is a file, or holds pictures and may not be overwritten.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    folder, wanted = Path(folder), _wanted(facts)
    check_folder(folder, NAMES, overwrite=overwrite)
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, make in wanted.items():
            figure = make(facts)
            FigureCanvasAgg(figure)
            for kind in FORMATS:
                out = io.BytesIO()
                figure.savefig(out, format=kind, dpi=150, metadata={"Software": None} if kind == "png" else {"Date": None})  # fmt: skip
                paths.append(folder / f"{name}.{kind}")
                write_bytes(paths[-1], out.getvalue())
    for name in NAMES:
        for kind in FORMATS:
            if name not in wanted:
                (folder / f"{name}.{kind}").unlink(missing_ok=True)
    return paths
