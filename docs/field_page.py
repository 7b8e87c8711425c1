"""Twenty ways to choose experts in one grid: the first part of docs/methods.md and its figure, from docs/field.json.

`python -m benchmarks.field RUN_DIR --data DIR --costs -o docs/field.json` writes it; `docs/generate.py`
calls `field_section` and `draw_field`.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("field.json")
CHANGES = re.compile(r" \+ ridge$|, \d+x\d+$")  # what `compare` adds to the name of a method
EXPERTS = {"qwen2-moe-tiny": 60, "deepseek-moe-tiny": 64}
SAYS = """What it says, of two small models, without a test. Whole experts: five calibration samples; ridge and thin
experts: the first of them.

- Near the calibration text EASY-EP, ExpertSparsity's search, contribution and MoNE's score lose least on both models:
  0.47 to 0.55 nats at a quarter of the experts. Counts and router scores lose 0.57 to 0.64, HOPE and REAP 0.59 to 0.72.
  HC-SMoE's centres (made for merging), MAN, MSAN, AIMER and C-Prune lose 0.9 to 2.0, random experts 0.87 and 1.37.
- Far from it no method is good: those that are good near lose 1.0 to 1.4 nats at a quarter. What chooses badly near can
  be better there: C-Prune and HC-SMoE's centres on deepseek-moe-tiny (0.72, random 0.97), not on qwen2-moe-tiny.
- A script that no corpus holds is a matter of the sample, with standard deviations of up to 1.8 nats at a quarter. Only
  REAP's scores on qwen2-moe-tiny (0.31 to 0.47, all others 1.4 or more) and HOPE on deepseek-moe-tiny (0.01) stand out,
  and not on both models. EASY-EP, which on the first sample alone seemed to keep it, loses 1.63 (± 0.78) and
  0.34 (± 0.59): less than contribution, the default (2.5 and 1.2), and far it loses as much or a little less. In
  `shrink`'s place at 75 % it made [no difference](log.md#2026-11-30-the-field-in-one-grid); at 25 and 50 % that was not
  measured.
- Turns of the corpora change little with these two: TB-Coverage and the pooled score of the same saliency are within a
  standard deviation of each other nearly everywhere.
- **The shape matters more than which of the good methods.** Half of the bytes as two thirds of the experts, three
  quarters as wide:
  the methods that are good near differ by 0.01 nats there, lose a quarter to two fifths less far, and on qwen2-moe-tiny
  at most 0.08 on Greek, where whole experts of the same sample lose 0.1 to 1.6. On deepseek-moe-tiny, which gains on
  Greek with whole experts, it is 0.15 to 0.31 worse there.
- **Ridge** on the same two corpora leaves a half of their loss near at a quarter of the experts, a quarter to a half of
  it at half, and two thirds to four fifths far. It does not mend a bad choice: random experts, MAN, MSAN, AIMER,
  C-Prune, HC-SMoE's centres, and HOPE on qwen2-moe-tiny, lose more far from the calibration text at half of the experts
  with it than without. [With more kinds of text it does more](shrink.md#judged).
"""
Gaps = dict[str, list[float]]


def loaded() -> dict[str, Any]:
    """The file."""
    found: dict[str, Any] = json.loads(SOURCE.read_text())
    return found


def whole(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of whole experts without repair, by model."""
    parts: dict[str, list[dict[str, Any]]] = data["parts"]
    return {part.removesuffix("-none"): rows for part, rows in parts.items() if part.endswith("-none")}


def of_group(gaps: Gaps, names: list[str]) -> list[float]:
    """The mean gap over some texts, one number for every sample or seed."""
    return [statistics.fmean(values) for values in zip(*(gaps[name] for name in names), strict=True)]


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def field_section() -> str:
    """Text, figure and tables."""
    data = loaded()
    groups: dict[str, list[str]] = data["groups"]
    samples = max(len(next(iter(row["gaps"].values()))) for rows in whole(data).values() for row in rows)
    of_groups = "; ".join(f"{name}: {', '.join(texts)}" for name, texts in groups.items())
    lines = [
        "## The field in one grid\n",
        f"`python -m benchmarks.field RUN_DIR --data DIR --samples {samples} --costs -o docs/field.json`: "
        f"a grid of `moecover compare`. Calibrated on WikiText2 and C4 ({data['blocks']} blocks of {data['length']} "
        f"tokens of each); gap in log perplexity to the full model, in nats, float32, {data['windows']} windows of "
        f"{data['length']} tokens a text, mean over the texts of a group, mean and standard deviation over {samples} "
        f"calibration samples (random: seeds; AIMER has no text). Groups: {of_groups}. No tests. MoNE's score, "
        "C-Prune, HC-SMoE's centres and ExpertSparsity see 8,192 tokens, ridge 16,384.\n",
        "![Gap to the full model at a quarter and at half of the experts, near and far from the calibration text, for "
        "every method](field.png)\n",
    ]
    lines.append(SAYS)
    for model, rows in whole(data).items():
        keeps = sorted({row["keep"] for row in rows})
        heads = [f"{keep / EXPERTS[model]:.0%} {group}" for keep in keeps[:2] for group in groups]
        lines += [f"### {model}, every method\n", f"| method | {' | '.join(heads)} | worst text at 50% |"]
        lines.append("|---|" + "---:|" * len(heads) + "---|")
        for label in dict.fromkeys(row["label"] for row in rows):
            of = {row["keep"]: row["gaps"] for row in rows if row["label"] == label}
            cells = [cell(of_group(of[keep], names)) for keep in keeps[:2] for names in groups.values()]
            worst = max(of[keeps[1]], key=lambda text, of=of: statistics.fmean(of[keeps[1]][text]))
            lines.append(f"| {label} | {' | '.join(cells)} | {worst} {statistics.fmean(of[keeps[1]][worst]):.2f} |")
        lines += ["", *other_parts(data, model)]
    if data["costs"]:
        lines += [
            "### What each method's own part takes\n",
            "Whole processes of `moecover plan` for half of the experts, one thread, from a profile that is there "
            "(start and imports included, about as long as `random` takes; another process beside):\n",
            f"| method | {' | '.join(f'{model}, s | MB' for model in data['costs'])} |",
            "|---|" + "---:|---:|" * len(data["costs"]),
        ]
        first = next(iter(data["costs"].values()))
        for label in first:
            cells = [f"{of[label]['seconds']:.1f} | {of[label]['megabytes']:,}" for of in data["costs"].values()]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def other_parts(data: dict[str, Any], model: str) -> list[str]:
    """Tables of what is beside whole experts at a quarter and a half: three quarters and thin experts, then ridge."""
    rows = whole(data)[model]
    most = max(row["keep"] for row in rows)
    ridge, thin = (data["parts"].get(f"{model}-{part}", []) for part in ("ridge", "thin"))
    first = {f"{most} experts": [row for row in rows if row["keep"] == most]}
    if thin:
        first[f"{thin[0]['keep']} experts x {data['thin'][model]}, first sample"] = thin
    second = {
        f"{keep} experts, ridge, first sample": [row for row in ridge if row["keep"] == keep]
        for keep in sorted({row["keep"] for row in ridge})
    }
    return [line for columns in (first, second) if columns for line in _columns(columns, data["groups"])]


def _method(row: dict[str, Any]) -> str:
    """The method of a row, without repair and shape."""
    return CHANGES.sub("", row["label"])


def _columns(columns: dict[str, list[dict[str, Any]]], groups: dict[str, list[str]]) -> list[str]:
    """A table with near, far, unseen and script of several columns."""
    groups = {name: texts for name, texts in groups.items() if name != "known"}
    heads = [f"{column}: {group}" if group == "near" else group for column in columns for group in groups]
    made = [f"| method | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for label in dict.fromkeys(_method(row) for rows in columns.values() for row in rows):
        of = {column: row["gaps"] for column, rows in columns.items() for row in rows if _method(row) == label}
        cells = [cell(of_group(of[column], names)) for column in columns for names in groups.values()]
        made.append(f"| {label} | {' | '.join(cells)} |")
    return [*made, ""]


def draw_field(path: Path) -> None:
    """A row for every method, best first; near and far from the calibration text, a quarter and half of the experts."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from moecover.reporting.figures.style import COLOURS, STYLE

    data = loaded()
    groups = data["groups"]
    shown = {"near": COLOURS[0], "far": COLOURS[1], "script": COLOURS[2]}
    names = {"near": "WikiText2 and C4", "far": "code, books, school mathematics", "script": "Greek"}
    rows = [(EXPERTS[model], row) for model, found in whole(data).items() for row in found]
    labels = list(dict.fromkeys(row["label"] for _, row in rows))

    def mean(label: str, share: float, group: str) -> float:
        found = [row for experts, row in rows if row["label"] == label and abs(row["keep"] / experts - share) < 0.01]
        return statistics.fmean(statistics.fmean(of_group(row["gaps"], groups[group])) for row in found)

    labels.sort(key=lambda label: statistics.fmean(mean(label, share, g) for share in (0.25, 0.5) for g in groups))
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 1.5 + 0.27 * len(labels)), layout="constrained")
        for axis, share in zip(figure.subplots(1, 2, sharey=True), (0.25, 0.5), strict=True):
            for group, colour in shown.items():
                marker = {"near": "o", "far": "D", "script": "^"}[group]
                values = [mean(label, share, group) for label in labels]
                axis.plot(values, range(len(labels)), color=colour, marker=marker, linestyle="", label=names[group])
            axis.set_yticks(range(len(labels)), labels)
            axis.set_ylim(len(labels) - 0.5, -0.5)
            axis.grid(color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.set_title(f"{share:.0%} of the experts kept")
            axis.set_xlabel("nats lost, mean of both models")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False)
        figure.savefig(path, dpi=110, metadata={"Software": None})
