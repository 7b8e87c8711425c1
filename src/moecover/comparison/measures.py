"""What methods are compared in: the scores of a cell, and the measures that its methods are compared in.

A measure is the mean of tasks, or the perplexity of a text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from moecover.comparison.bootstrap import Difference, finite, mean_of_tasks, paired_bootstrap, perplexity_difference

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class MeasuredCell:
    """A cell with the scores of its items and windows.

    Attributes:
        model: name of the model.
        method: name of the method.
        label: what a reader calls it.
        retain: share of the experts' bytes that is kept.
        calibration: names of the corpora; empty if it needs none.
        sample: seed of the calibration sample.
        seed: of the plan; None for a deterministic method.
        num_bytes: of the weights.
        shape: with which the label ends where experts are thinner, such as ``30x32``; empty for whole experts.
        items: by task, float64 ``[item]`` of the task's main metric.
        windows: by text, float64 ``[window, 2]``: summed negative log-likelihood, scored tokens.
    """

    model: str
    method: str
    label: str
    retain: float
    calibration: tuple[str, ...] = ()
    sample: int = 0
    seed: int | None = None
    num_bytes: int = 0
    shape: str = ""
    items: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    windows: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        """The label without the shape."""
        return self.label.removesuffix(f", {self.shape}") if self.shape else self.label

    def scores(self, measure: Measure) -> Mapping[str, NDArray[np.float64]]:
        """Items by task, or windows by text."""
        return self.items if measure.kind == "tasks" else self.windows


@dataclass(frozen=True)
class Measure:
    """What methods are compared in: the mean of tasks, or the perplexity of a text.

    Attributes:
        kind: tasks or perplexity.
        names: of the tasks, or of the one text.
    """

    kind: Literal["tasks", "perplexity"]
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"mean of {len(self.names)} tasks" if len(self.names) > 1 else self.names[0]

    def difference(
        self, a: Mapping[str, NDArray[np.float64]], b: Mapping[str, NDArray[np.float64]], draws: Draws
    ) -> Difference:
        """The difference over items, or windows, of two methods."""
        if self.kind == "tasks":
            return paired_bootstrap(a, b, resamples=draws.resamples, seed=draws.seed)
        (text,) = self.names
        return perplexity_difference(a[text], b[text], resamples=draws.resamples, seed=draws.seed)

    def value(self, cell: MeasuredCell) -> float:
        """The number of a cell: the mean of tasks, or the log perplexity (nats)."""
        if self.kind == "tasks":
            return mean_of_tasks({task: cell.items[task] for task in self.names})[0]
        (text,) = self.names
        windows = finite(cell.windows[text], f"perplexity windows of {text}")
        return math.fsum(windows[:, 0]) / math.fsum(windows[:, 1])


@dataclass(frozen=True)
class Draws:
    """Number and seed of the bootstrap samples."""

    resamples: int
    seed: int
