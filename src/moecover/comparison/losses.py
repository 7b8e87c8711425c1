"""What pruning loses against the full model, with intervals: reads the scores of cells, gives a record for every row.

No test and no verdict: that a pruned model is worse than the full one is no question. Intervals are Student's, from the
variance of items and windows and that of the runs; docs/statistics.md has the formulas.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

import numpy as np

from moecover.comparison.bootstrap import ALPHA, LEAST, degrees_of_freedom
from moecover.comparison.cells import FULL
from moecover.comparison.measures import Measure, MeasuredCell
from moecover.corpora.windows import split_by_kind

if TYPE_CHECKING:
    from numpy.typing import NDArray


class LossRecord(TypedDict):
    """What a method at a budget loses against the full model, as results.json has it.

    ``names`` are the tasks or texts whose mean it is, ``value`` is the difference to the full model: of accuracies
    (proportions), or of log perplexities (nats). ``low`` and ``high`` are its 95 % interval, None where there are fewer
    than `LEAST` items or windows. ``n`` is their number.
    """

    model: str
    label: str
    retain: float
    calibration: list[str]
    kind: Literal["tasks", "perplexity"]
    names: list[str]
    value: float
    low: float | None
    high: float | None
    n: int


class _Part(NamedTuple):
    """The difference in one task or text: mean over the runs, that of every run, and the mean's variance over units."""

    value: float
    runs: NDArray[np.float64]
    variance: float
    units: int


def losses(cells: Sequence[MeasuredCell]) -> list[LossRecord]:
    """The loss of every row against the full model of its name: in every task and text, and in their means.

    Means are over all tasks, all texts, the texts near to what was calibrated on and those far from it. Rows without a
    full model, other items or windows than it has, and values that are not finite are left out.
    """
    found: list[LossRecord] = []
    for model in dict.fromkeys(c.model for c in cells):
        mine = [c for c in cells if c.model == model]
        full = next((c for c in mine if c.method == FULL), None)
        corpora = {corpus for c in mine for corpus in c.calibration}
        groups: dict[tuple[object, ...], list[MeasuredCell]] = {}
        for c in mine if full else ():
            if c.method != FULL:
                groups.setdefault((c.label, c.retain, c.calibration), []).append(c)
        found += [record for runs in groups.values() if full for record in _of_row(runs, full, corpora)]
    return found


def _of_row(runs: Sequence[MeasuredCell], full: MeasuredCell, corpora: Iterable[str]) -> Iterator[LossRecord]:
    first, texts = runs[0], tuple(full.windows)
    sets = [(text,) for text in texts] + [texts, *split_by_kind(texts, corpora)]
    measures = [Measure("tasks", names) for names in [*((task,) for task in full.items), tuple(full.items)]]
    measures += [Measure("perplexity", names) for names in sets]
    for measure in dict.fromkeys(m for m in measures if m.names):
        parts = [_part(runs, full, measure.kind, name) for name in measure.names]
        known = [part for part in parts if part is not None]
        if len(known) == len(parts):
            low, high = _interval(known)
            yield {
                "model": first.model,
                "label": first.label,
                "retain": first.retain,
                "calibration": list(first.calibration),
                "kind": measure.kind,
                "names": list(measure.names),
                "value": statistics.fmean(part.value for part in known),
                "low": low,
                "high": high,
                "n": sum(part.units for part in known),
            }


def _part(runs: Sequence[MeasuredCell], full: MeasuredCell, kind: str, name: str) -> _Part | None:
    """The difference in one task or text; None where the runs and the full model have no finite values of the same."""
    of = [(c.items if kind == "tasks" else c.windows).get(name) for c in (full, *runs)]
    there = [np.asarray(scores, dtype=np.float64) for scores in of if scores is not None and len(scores)]
    if len(there) < len(of) or len({s.shape for s in there}) > 1 or not all(np.isfinite(s).all() for s in there):
        return None
    before, after = there[0], np.stack(there[1:])
    if kind == "tasks":
        differences, tokens = after - before, np.ones(len(before))
    elif (after[:, :, 1] == before[:, 1]).all():
        differences, tokens = after[:, :, 0] - before[:, 0], before[:, 1]
    else:
        return None
    total, mean, n = float(tokens.sum()), differences.mean(axis=0), len(tokens)
    value = float(mean.sum()) / total
    rest = mean - value * tokens  # of the linearised ratio
    variance = float((rest**2).sum()) / total**2 * n / (n - 1) if n > 1 else math.inf
    return _Part(value, differences.sum(axis=1) / total, variance, n)


def _interval(parts: Sequence[_Part]) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean of some parts: the variances of their units and of the runs' means add up."""
    from scipy.stats import t

    if min(part.units for part in parts) < LEAST:
        return None, None
    variances = [part.variance / len(parts) ** 2 for part in parts]
    degrees = [part.units - 1 for part in parts]
    runs = np.mean([part.runs for part in parts], axis=0)
    if len(runs) > 1:
        variances.append(float(runs.var(ddof=1)) / len(runs))
        degrees.append(len(runs) - 1)
    value = statistics.fmean(part.value for part in parts)
    reach = float(t.ppf(1 - ALPHA / 2, degrees_of_freedom(variances, degrees))) * math.sqrt(sum(variances))
    return value - reach, value + reach
