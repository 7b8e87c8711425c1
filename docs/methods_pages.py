"""The comparison of methods on the shipped models: docs/methods.md and its figures, from docs/methods-NAME.json.

`python -m benchmarks.methods --model NAME` writes the JSON files; `python docs/generate.py` calls `methods_page` and
`draw_methods`.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

from field_page import field_section

DOCS = Path(__file__).parent
MODELS = ("qwen2-moe-tiny", "deepseek-moe-tiny")
PLACES = {"calibrated": "the calibrated domains", "never": "domains that were never calibrated on"}


def geometric(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(statistics.fmean(map(math.log, values)))


class Methods:
    """The comparison on one shipped model.

    Attributes:
        data: the whole JSON file.
        cells: its measurements, one dict a plan.
        domains: held-out texts by place (a key of `PLACES`) and calibration set.
        full: perplexity of the full model by text.
        labels: of the methods, in the order of the file.
    """

    def __init__(self, model: str) -> None:
        self.data = json.loads((DOCS / f"methods-{model}.json").read_text())
        self.cells = self.data["cells"]
        self.domains = {"calibrated": self.data["near"], "never": dict.fromkeys(self.data["near"], self.data["far"])}
        self.full = next(cell["perplexity"] for cell in self.cells if cell["label"] == "full model")
        self.labels = list(dict.fromkeys(c["label"] for c in self.cells if c["label"] != "full model"))

    def values(self, calibration: str, label: str, keep: int, where: str) -> list[float]:
        """Geometric mean of the perplexity over the domains, one value per calibration sample or seed."""
        names = self.domains[where][calibration]
        found = [
            c
            for c in self.cells
            if c["label"] == label and c["keep"] == keep and c["calibration"] in (calibration, "none")
        ]
        return [geometric([c["perplexity"][n] for n in names]) for c in found]

    def whole(self, calibration: str, where: str) -> float:
        """Geometric mean of the full model's perplexity over the same domains."""
        return geometric([self.full[n] for n in self.domains[where][calibration]])

    def ratios(self, calibration: str, label: str, keep: int, where: str) -> list[float]:
        """`values` over the full model's."""
        whole = self.whole(calibration, where)
        return [value / whole for value in self.values(calibration, label, keep, where)]

    def without(self, *parts: str) -> list[str]:
        """Labels that contain none of these parts."""
        return [label for label in self.labels if not any(part in label for part in parts)]


def methods_page() -> str:
    """The comparisons as tables: docs/methods.md without its first line."""
    contents = "- [The field in one grid](#the-field-in-one-grid)\n"
    contents += "".join(f"- [{model}](#{model})\n" for model in MODELS)
    head = f"# Methods compared\n\nWhat the figures say, and where coverage does not help: [log](log.md).\n\n{contents}"
    return "\n".join([head, field_section(), *(methods_of(model) for model in MODELS)])


def methods_of(model: str) -> str:
    """The comparison on one model."""
    made = Methods(model)
    parts = [heading(model, made)]
    parts += [by_budget(model, made, calibration) for calibration in made.data["near"]]
    parts += [by_saliency(model, made, where) for where in PLACES]
    return "\n".join(parts)


def heading(model: str, made: Methods) -> str:
    """How the comparison was made, and its figure."""
    data = made.data
    calibrated = ", ".join(f"{c}: {n:,} tokens" for c, n in data["calibration_tokens"].items())
    held_out = ", ".join(f"{n} ({t:,} tokens)" for n, t in data["held_out_tokens"].items())
    return (
        f"## {model}\n\n"
        f"`python -m benchmarks.methods --model {model} --data DIR` ({data['experts']} experts a layer), "
        f"{data['wall_s'] / 60:.0f} minutes. "
        "Perplexity on held-out text, geometric mean over the domains; the spread is the standard deviation over "
        f"{data['samples']} samples of calibration text ({calibrated}) or over the seeds of random plans. "
        f"expert-sparsity searches on {data['search_tokens']:,} tokens. Held out: {held_out}."
        f"\n\n![Perplexity over the full model's on {model}, by method](methods-{model}.png)\n"
    )


def by_budget(model: str, made: Methods, calibration: str) -> str:
    """Every method at every budget, calibrated on one set of corpora."""

    def cell(found: list[float]) -> str:
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        return f"{geometric(found):.1f}{spread}"

    keeps, experts = made.data["keeps"], made.data["experts"]
    near, far = (made.domains[where][calibration] for where in PLACES)
    heads = [f"{keep / experts:.0%}, {where}" for keep in keeps for where in PLACES]
    lines = [
        f"### {model}, calibrated on {calibration}\n\n"
        f"Calibrated domains: {', '.join(near)}. Never calibrated on: {', '.join(far)}. Full model: "
        f"{made.whole(calibration, 'calibrated'):.1f} and {made.whole(calibration, 'never'):.1f}.\n",
        "| method | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for label in made.without("protect 0.25", "protect 0.75"):
        row = [cell(made.values(calibration, label, keep, where)) for keep in keeps for where in PLACES]
        lines.append(f"| {label} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def by_saliency(model: str, made: Methods, where: str) -> str:
    """Every saliency with every protected share, as a mean ratio to the full model: what the defaults rest on."""
    plain = made.without("super")
    protects = sorted({label.rpartition("protect ")[2] for label in plain if "protect" in label})
    saliencies = dict.fromkeys(label.split(", ")[1] for label in plain if label.startswith("pooled"))
    lines = [
        f"### {model}, the defaults: perplexity over the full model's, on {PLACES[where]}\n\n"
        "Geometric mean over calibrations, budgets and samples.\n",
        "| saliency | " + " | ".join(["pooled", *(f"protect {share}" for share in protects)]) + " |",
        "|---|" + "---:|" * (1 + len(protects)),
    ]
    for saliency in saliencies:
        row = []
        for label in (f"pooled, {saliency}", *(f"tb-coverage, {saliency}, protect {share}" for share in protects)):
            means = [
                geometric(made.values(calibration, label, keep, where)) / made.whole(calibration, where)
                for calibration in made.data["near"]
                for keep in made.data["keeps"]
            ]
            row.append(f"{geometric(means):.3f}")
        lines.append(f"| {saliency} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def draw_methods(model: str, path: Path) -> None:
    """Draw the comparison on one model: one row per method, one panel per calibration set and budget."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from moecover.reporting.figures.style import COLOURS, STYLE

    made = Methods(model)
    keeps, experts = made.data["keeps"][:2], made.data["experts"]
    shown = made.without("super", "protect 0.25", "protect 0.75", "protect 1.0")
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 1.6 + 0.23 * len(shown) * len(made.data["near"])), layout="constrained")
        panels = figure.subplots(len(made.data["near"]), len(keeps), squeeze=False, sharey=True)
        for line, calibration in zip(panels, made.data["near"], strict=True):
            for axis, keep in zip(line, keeps, strict=True):
                for where, colour, mark in (("calibrated", COLOURS[0], "o"), ("never", COLOURS[1], "D")):
                    for row, label in enumerate(shown):
                        ratios = made.ratios(calibration, label, keep, where)
                        axis.plot([min(ratios), max(ratios)], [row, row], color=colour, linewidth=1.5)
                        axis.plot([geometric(ratios)], [row], color=colour, marker=mark, markersize=5)
                axis.set(xscale="log", xlim=(0.97, 8.3))
                ticks = [1, 1.5, 2, 3, 4, 5, 6, 8]
                axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
                axis.set_xticks([], minor=True)
                axis.set_yticks(range(len(shown)), shown)
                axis.grid(color="#dddddd", linewidth=0.6)
                axis.set_axisbelow(True)
                axis.set_title(f"calibrated on {calibration}, {keep / experts:.0%} of the experts kept")
            line[0].set_ylim(len(shown) - 0.5, -0.5)
        for axis in panels[-1]:
            axis.set_xlabel("perplexity over the full model's (1 = nothing lost)")
        marks = [
            figure.axes[0].plot([], [], color=c, marker=m, label=label)[0]
            for c, m, label in (
                (COLOURS[0], "o", "text like the calibration text"),
                (COLOURS[1], "D", "domains never calibrated on"),
            )
        ]
        figure.legend(handles=marks, loc="outside lower left", ncols=2, frameon=False)
        figure.savefig(path, dpi=110, metadata={"Software": None})
