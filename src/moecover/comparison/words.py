"""Sentences on differences: a difference that is not significant is stated in the same form as one that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moecover.comparison.bootstrap import Difference
from moecover.corpora.sources import set_name
from moecover.text import size_text

Verdict = Literal["better", "worse", "not resolved"]
BETTER: Verdict = "better"
WORSE: Verdict = "worse"
NONE_FOUND: Verdict = "not resolved"

BYTES = "' bytes"  # of the experts, where their number is another share
ONE_SAMPLE = "One calibration sample says nothing about the methods: plan on several (`samples`)"


@dataclass(frozen=True)
class Compared:
    """What a sentence is about.

    Attributes:
        a: label of the first method.
        b: label of the second.
        retain: share of the experts' bytes that both keep.
        thin: whether experts of either are thinner, so that the share is none of their number.
        calibration: corpora of the calibration set; empty if it goes without saying.
        kind: tasks or perplexity.
        name: of the task or text, or ``mean of N tasks``.
        runs_a: runs of the first method that were averaged.
        runs_b: of the second.
        one_seed: labels of methods that depend on a random seed and have only one.
        one_sample: labels of methods that depend on calibration text and have only one sample of it.
        family: comparisons that p-values are corrected for.
        sizes: bytes of both, where these are about equal and not what is kept; None otherwise.
    """

    a: str
    b: str
    retain: float
    thin: bool
    calibration: Sequence[str]
    kind: Literal["tasks", "perplexity"]
    name: str
    runs_a: int
    runs_b: int
    one_seed: Sequence[str]
    one_sample: Sequence[str]
    family: int
    sizes: tuple[int, int] | None = None

    @property
    def tasks(self) -> bool:
        return self.kind == "tasks"

    @property
    def where(self) -> str:
        """Budget and calibration set, or sizes."""
        calibrated = f", calibrated on {set_name(self.calibration, ' + ')}" if self.calibration else ""
        if self.sizes is not None:
            return f"With {size_text(self.sizes[0])} and {size_text(self.sizes[1])}{calibrated}, "
        return f"At {100 * self.retain:g} % of the experts{BYTES if self.thin else ''}{calibrated}, "

    @property
    def measure(self) -> str:
        """The task or text."""
        on = f"on the {self.name}" if self.name.startswith("mean of") else f"on {self.name}"
        return on if self.tasks else f"in perplexity {on}"

    def number(self, value: float) -> str:
        """A difference: of accuracies in percentage points, of log perplexities as per cent of the perplexity."""
        return f"{100 * (value if self.tasks else math.expm1(value)):+.2f}"

    def size(self, value: float) -> str:
        """A difference with its unit."""
        return f"{self.number(value)} {'points' if self.tasks else '%'}"


def sentence(compared: Compared, difference: Difference, verdict: Verdict) -> str:
    """One sentence on a comparison: which method is better, by how much, how sure that is."""
    where, on, a, b = compared.where, compared.measure, compared.a, compared.b
    size = compared.size(difference.value)
    if difference.p is None:
        why = difference.test.partition("no test: ")[2]
        return f"{where}the difference between {a} and {b} {on} is not resolved: {size}, too little for a test ({why})."
    if not difference.value and not difference.stderr:
        unit = "item" if compared.tasks else "window"
        return f"{where}{a} and {b} do not differ {on}: every {unit} gives the same."
    figures = f"{size} ({_interval(compared, difference)}), {_p_value(difference, compared.family)}"
    if verdict == NONE_FOUND:
        alone = difference.low is not None and difference.high is not None and difference.low * difference.high > 0
        why = ". The interval is of this comparison alone, p is corrected for all of them" if alone else ""
        return f"{where}the difference between {a} and {b} {on} is not resolved: {figures}{why}."
    if compared.one_sample and compared.sizes is not None:
        return f"{where}{a} is {verdict} than {b} {on}: {figures}. {ONE_SAMPLE}."
    if compared.one_sample:
        return f"{where}this plan of {a} is {verdict} than that of {b} {on}: {figures}. {ONE_SAMPLE}."
    return f"{where}{a} is {verdict} than {b} {on}: {figures}."


def _interval(compared: Compared, difference: Difference) -> str:
    assert difference.low is not None
    assert difference.high is not None
    found = f"95 % interval {compared.number(difference.low)} to {compared.number(difference.high)}"
    for runs, label in ((compared.runs_a, compared.a), (compared.runs_b, compared.b)):
        found += f", mean of {runs} runs of {label}" if runs > 1 else ""
    return found + "".join(f", one seed of {label}: another may give more or less" for label in compared.one_seed)


def _p_value(difference: Difference, family: int) -> str:
    if difference.p_holm is None:
        return ""
    p = "below 0.001" if difference.p_holm < 0.001 else f"= {difference.p_holm:.3f}"
    return f"p {p}{f' after correction for {family} comparisons' if family > 1 else ''}"
