"""The method under study against every other one: reads the scores of cells, gives tested differences and sentences.

Runs of a method (seeds, calibration samples) are averaged item by item, and their spread is added. All comparisons of a
model are one family of tests for Holm's correction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict, cast

import numpy as np

from moecover.comparison.bootstrap import ALPHA, Difference, paired_bootstrap
from moecover.comparison.by_size import alike, mean_bytes
from moecover.comparison.cells import FILE, FULL
from moecover.comparison.measures import Draws, Measure, MeasuredCell
from moecover.comparison.tests import holm, over_seeds, with_spread
from moecover.comparison.words import BETTER, NONE_FOUND, WORSE, Compared, Verdict, sentence
from moecover.errors import InputError
from moecover.planning.methods import default_method

if TYPE_CHECKING:
    from numpy.typing import NDArray


class OfTask(TypedDict):
    """The difference in one task."""

    value: float
    low: float | None
    high: float | None
    n: int


class Further(TypedDict):
    """What else is told of a comparison.

    Runs of both methods, labels of methods with a single random seed or a single calibration sample, and where there
    are enough of them the tests over runs and over tasks (fields of `Difference`) and the difference in every task.
    """

    runs_a: int
    runs_b: int
    one_seed: list[str]
    one_sample: list[str]
    over_runs: NotRequired[dict[str, object]]
    over_tasks: NotRequired[dict[str, object]]
    by_task: NotRequired[dict[str, OfTask]]


class ComparisonRecord(Further):
    """A comparison as results.json has it: the coordinates, the fields of `Difference`, a verdict and a sentence."""

    model: str
    retain: float
    calibration: list[str]
    kind: Literal["tasks", "perplexity"]
    name: str
    a: str
    b: str
    value: float
    stderr: float | None
    low: float | None
    high: float | None
    p: float | None
    effect: float | None
    n: int
    test: str
    p_holm: float | None
    verdict: Verdict
    words: str
    family: str
    sizes: NotRequired[list[int]]  # bytes of both, where a file is compared with what has about its size


@dataclass(frozen=True)
class _Pair:
    """Cells of two methods at one budget and calibration set, compared in one measure."""

    ours: Sequence[MeasuredCell]
    theirs: Sequence[MeasuredCell]
    measure: Measure
    difference: Difference
    further: Further
    sizes: tuple[int, int] | None = None


def studied(cells: Sequence[MeasuredCell], against: str | None = None) -> str | None:
    """Label of the method that the others are compared with: the given one, else the first of the default method.

    Returns:
        None if no cell has that method.

    Raises:
        InputError: no cell has the given label.
    """
    labels = list(dict.fromkeys(c.label for c in cells))
    if against is not None and against not in labels:
        raise InputError(f"no cell is labelled {against!r}. There are: {', '.join(labels)}")
    return against or next((c.label for c in cells if c.method == default_method().name), None)


def comparisons(
    cells: Sequence[MeasuredCell], *, against: str | None = None, resamples: int = 10_000, seed: int = 0
) -> list[ComparisonRecord]:
    """The method under study against every other label, for every model, calibration set and budget.

    Where experts are thinner, methods are compared in the same shape, and shapes of the studied method at equal bytes.
    Files are compared with each other and with the studied method where they take about the same bytes.

    Args:
        cells: of all methods. The full model and cells without scores are left out; a method that needs no calibration
            is compared in every calibration set.
        against: label of the method under study, see `studied`.
        resamples: number of bootstrap samples of every bootstrap.
        seed: of the random numbers.

    Returns:
        A record for each comparison, the studied method first: accuracy above 0 and log perplexity below 0 are better.

    Raises:
        InputError: no such label, items or windows that do not belong together, or a value that is not finite.
    """
    cells, draws = [c for c in cells if c.method != FULL and (c.items or c.windows)], Draws(resamples, seed)
    planned = [c for c in cells if c.method != FILE]
    label = studied(planned, against) if planned else None
    method = next((c.variant for c in planned if c.label == label), None)
    found: list[ComparisonRecord] = []
    for model in dict.fromkeys(c.model for c in cells):
        mine = [c for c in cells if c.model == model]
        of_method = [c for c in mine if c.method != FILE and c.variant == method]
        several = len({c.calibration for c in of_method}) > 1
        if method is not None:
            shapes = "shape, " if any(c.shape for c in of_method) else ""
            rest = f"of {method} on {model}: every other method, budget, {shapes}calibration set and measure"
            found += _records(_pairs([c for c in mine if c.method != FILE], method, draws), rest, several=several)
        rest = f"of files of {model} with what takes about their bytes"
        found += _records(_pairs_by_size(mine, method, draws), rest, several=several)
    return found


def _records(pairs: Sequence[_Pair], rest: str, *, several: bool) -> list[ComparisonRecord]:
    """Records of a family of comparisons, with p-values corrected together.

    Args:
        pairs: all of them.
        rest: the family's name, after their number.
        several: whether there are several calibration sets, so that sentences name theirs.
    """
    family = f"the {len(pairs)} comparison{'s' if len(pairs) != 1 else ''} {rest}"
    found = []
    for pair, p in zip(pairs, holm([pair.difference.p for pair in pairs]), strict=True):
        difference = replace(pair.difference, p_holm=p)
        ours, measure = pair.ours[0], pair.measure
        calibration = (ours if pair.sizes is None else pair.theirs[0]).calibration  # a file has none
        sign = difference.value * (1 if measure.kind == "tasks" else -1)
        verdict = NONE_FOUND if p is None or p >= ALPHA else BETTER if sign > 0 else WORSE
        compared = Compared(
            a=ours.label,
            b=pair.theirs[0].label,
            retain=ours.retain,
            thin=bool(ours.shape or pair.theirs[0].shape),
            calibration=calibration if several else (),
            kind=measure.kind,
            name=measure.name,
            runs_a=pair.further["runs_a"],
            runs_b=pair.further["runs_b"],
            one_seed=pair.further["one_seed"],
            one_sample=pair.further["one_sample"],
            family=len(pairs),
            sizes=pair.sizes,
        )
        record = {
            "model": ours.model,
            "retain": ours.retain,
            "calibration": list(calibration),
            "kind": measure.kind,
            "name": measure.name,
            "a": compared.a,
            "b": compared.b,
            **asdict(difference),
            "verdict": verdict,
            "words": sentence(compared, difference, verdict),
            "family": family,
            **pair.further,
            **({} if pair.sizes is None else {"sizes": list(pair.sizes)}),
        }
        found.append(cast("ComparisonRecord", record))
    return found


def _pairs(cells: Sequence[MeasuredCell], label: str, draws: Draws) -> list[_Pair]:
    """All comparisons of a variant on one model: with others in the same shape, and of its shapes at equal bytes."""
    found = []
    groups: dict[tuple[float, tuple[str, ...], str], list[MeasuredCell]] = {}
    for c in cells:
        if c.variant == label:
            groups.setdefault((c.retain, c.calibration, c.shape), []).append(c)
    order = list(dict.fromkeys(shape for _, _, shape in groups))
    for (retain, calibration, shape), ours in groups.items():
        later = order[order.index(shape) + 1 :]
        matching = [c for c in cells if c.retain == retain and c.calibration in ((), calibration)]
        rivals = [c for c in matching if (c.shape in later if c.variant == label else c.shape == shape)]
        for other in dict.fromkeys(c.label for c in cells if c.label != ours[0].label):
            theirs = [c for c in rivals if c.label == other]
            if theirs:
                found += [_compared(ours, theirs, measure, draws) for measure in _measures([*ours, *theirs])]
    return found


def _pairs_by_size(cells: Sequence[MeasuredCell], label: str | None, draws: Draws) -> list[_Pair]:
    """All comparisons of a model's files with rows of about equal bytes."""
    found = []
    for ours, theirs in alike(cells, label):
        sizes = round(mean_bytes(ours)), round(mean_bytes(theirs))
        pairs = (_compared(ours, theirs, measure, draws) for measure in _measures([*ours, *theirs]))
        found += [replace(pair, sizes=sizes) for pair in pairs]
    return found


def _measures(cells: Sequence[MeasuredCell]) -> list[Measure]:
    """What all of some cells were measured in: the mean of tasks first, then every text."""
    tasks = tuple(task for task in cells[0].items if all(task in c.items for c in cells))
    texts = [text for text in cells[0].windows if all(text in c.windows for c in cells)]
    return [*([Measure("tasks", tasks)] if tasks else []), *(Measure("perplexity", (text,)) for text in texts)]


def _averaged(cells: Sequence[MeasuredCell], measure: Measure, name: str) -> NDArray[np.float64]:
    """Items of a task, or windows of a text, averaged over runs.

    Raises:
        InputError: the runs have other items or windows.
    """
    found = [np.asarray(c.scores(measure)[name], dtype=np.float64) for c in cells]
    same = len({f.shape for f in found}) == 1
    if same and measure.kind == "perplexity":
        same = all(np.array_equal(f[:, 1], found[0][:, 1]) for f in found)
    if not same:
        units = "items" if measure.kind == "tasks" else "windows"
        raise InputError(
            f"{name}: the runs of {cells[0].label} have different {units}. Evaluate them again with the same settings"
        )
    averaged: NDArray[np.float64] = np.sum(found, axis=0) / len(found)  # sums of 0 and 1 are exact: equal stays equal
    return averaged


def _compared(ours: Sequence[MeasuredCell], theirs: Sequence[MeasuredCell], measure: Measure, draws: Draws) -> _Pair:
    """The difference of two methods in one measure."""
    a, b = ({(c.sample, c.seed): c for c in cells} for cells in (ours, theirs))
    common = [key for key in a if key in b]
    paired = all(seed is None for _, seed in (*a, *b)) and len(common) > 1
    runs_a, runs_b = ([x[k] for k in common] if paired else list(x.values()) for x in (a, b))
    one, two = ({n: _averaged(runs, measure, n) for n in measure.names} for runs in (runs_a, runs_b))
    numbers_a, numbers_b = (np.array([measure.value(c) for c in runs]) for runs in (runs_a, runs_b))
    if paired:
        spread = [_variance_of_mean(numbers_a - numbers_b)]
        sources = f"{len(runs_a)} calibration samples"
    else:
        sides = [(cells, x) for cells, x in ((ours, numbers_a), (theirs, numbers_b)) if len(x) > 1]
        spread = [_variance_of_mean(x) for _, x in sides]
        sources = " and ".join(f"{len(x)} runs of {cells[0].label}" for cells, x in sides)
    further: Further = {
        "runs_a": len(runs_a),
        "runs_b": len(runs_b),
        "one_seed": [c[0].label for c in (ours, theirs) if len(c) == 1 and c[0].seed is not None],
        "one_sample": [c[0].label for c in (runs_a, runs_b) if c[0].calibration and len({x.sample for x in c}) == 1],
    }
    if len(runs_a) > 1 or len(runs_b) > 1:
        units = "calibration samples" if paired else "runs"
        further["over_runs"] = asdict(over_seeds(numbers_a, numbers_b, paired=paired, units=units))
    if measure.kind == "tasks" and len(measure.names) > 1:
        _add_tasks(further, one, two, draws)
    found = measure.difference(one, two, draws)
    tasks = len(measure.names) if measure.kind == "tasks" else 1
    return _Pair(ours, theirs, measure, with_spread(found, found.n - tasks, spread, sources), further)


def _variance_of_mean(numbers: NDArray[np.float64]) -> tuple[float, int]:
    """Variance of the mean of some runs, and its degrees of freedom."""
    return float(numbers.var(ddof=1)) / len(numbers), len(numbers) - 1


def _add_tasks(
    further: Further, a: Mapping[str, NDArray[np.float64]], b: Mapping[str, NDArray[np.float64]], draws: Draws
) -> None:
    """Add the test over tasks and the difference in every task."""
    means_a, means_b = (np.array([items.mean() for items in x.values()]) for x in (a, b))
    further["over_tasks"] = asdict(over_seeds(means_a, means_b, test="wilcoxon", units="tasks"))
    each = {t: paired_bootstrap({t: a[t]}, {t: b[t]}, resamples=draws.resamples, seed=draws.seed) for t in a}
    further["by_task"] = {t: {"value": d.value, "low": d.low, "high": d.high, "n": d.n} for t, d in each.items()}
