"""Which shape loses least for its bytes: reads a curve of shapes, a model and held-out text, gives the best one's plan.

The shapes of a curve take equal bytes: few experts of full width at one end, all experts at the other, thin ones. Their
plans come from one profile and are emulated in the model, several in one pass over the text: first some that are spread
over the curve, then the neighbours of the best, until those are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moecover.evaluation.artifact import FULL, Evaluation
from moecover.planning.artifact import Plan
from moecover.planning.curve import spread

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moecover.checkpoints.structure import Structure
    from moecover.corpora.packing import Corpus
    from moecover.planning.shapes import Shape

Measure = Callable[[dict[str, Plan], bool], Evaluation]
FIRST, MOST = 5, 9  # shapes that are measured at first, and in all
LIKED = (128, 64)  # servers' kernels are fastest at multiples of these, the first best
NOISE = 1.0  # standard errors by which a shape that servers like may be worse than the best


@dataclass(frozen=True)
class ShapePoint:
    """A measured shape.

    Attributes:
        keep: experts per layer.
        width: channels of each.
        num_bytes: of the checkpoint's tensors.
        gap: by text, mean negative log-likelihood over the full model's, in nats.
        loss: mean of the gaps, the worst counted twice.
    """

    keep: int
    width: int
    num_bytes: int
    gap: dict[str, float]
    loss: float


def loss_of(gaps: Sequence[float]) -> float:
    """The mean of some gaps in which the largest counts twice."""
    return (sum(gaps) + max(gaps)) / (len(gaps) + 1)


@dataclass
class _Measured:
    """What was measured so far, by position on the curve."""

    channels: int
    plans: dict[int, Plan] = field(default_factory=dict)
    points: dict[int, ShapePoint] = field(default_factory=dict)
    windows: dict[int, NDArray[np.float64]] = field(default_factory=dict)  # loss of every window of every text
    full: dict[str, float] = field(default_factory=dict)

    def add(self, found: Evaluation, plans: dict[str, tuple[int, Plan]]) -> None:
        """Take the rows of an evaluation of plans, which come with their positions."""
        for row in found.rows:
            losses = {name: result.nll for name, result in row.perplexity.items()}
            if row.name == FULL:
                self.full = losses
                continue
            at, plan = plans[row.name]
            gap = {name: loss - self.full[name] for name, loss in losses.items()}
            width = self.channels if plan.width is None else plan.width
            self.plans[at] = plan
            self.points[at] = ShapePoint(row.keep, width, row.num_bytes, gap, loss_of(list(gap.values())))
            parts = [sums[:, 0] / sums[:, 1] for sums in found.windows[row.name].values()]
            self.windows[at] = np.concatenate(parts)

    def best(self) -> int:
        """The position of the lowest loss."""
        return min(self.points, key=lambda at: self.points[at].loss)

    def noise(self, at: int) -> float:
        """Standard error of the mean difference of a shape from the best, over windows."""
        differences = self.windows[at] - self.windows[self.best()]
        return float(differences.std(ddof=1) / np.sqrt(len(differences))) if len(differences) > 1 else 0.0

    def chosen(self) -> int:
        """The best; or where it is within noise of it, the best of those whose width servers like."""
        best = self.best()
        for liked in LIKED:
            if self.points[best].width % liked == 0:
                return best
            near = [
                at
                for at, point in self.points.items()
                if point.width % liked == 0 and point.loss <= self.points[best].loss + NOISE * self.noise(at)
            ]
            if near:
                return min(near, key=lambda at: self.points[at].loss)
        return best


def _wanted(measured: _Measured, shapes: Sequence[Shape]) -> list[int]:
    """The positions to be measured next; none where the search is over."""
    if not measured.points:
        return spread(shapes, measured.channels, FIRST)
    known, best = sorted(measured.points), measured.best()
    around = [
        max((at for at in known if at < best), default=best),
        min((at for at in known if at > best), default=best),
    ]
    wanted = [(best + other) // 2 for other in around if abs(best - other) > 1]
    return wanted[: max(0, MOST - len(known))]


def best_shape(
    structure: Structure,
    shapes: Sequence[Shape],
    make: Callable[[list[Shape]], list[Plan]],
    measure: Measure,
    *,
    texts: Sequence[Corpus],
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """The plan of the shape with the lowest loss on held-out text.

    Args:
        structure: the checkpoint.
        shapes: of a curve of equal bytes, widest first, see `planning.curve`.
        make: makes plans of shapes.
        measure: gives the rows of plans by name on the texts, and that of the full model where it is asked for.
        texts: held-out text, the worst of which counts twice.
        say: called with a line of text after every pass.

    Returns:
        The plan; its ``found`` holds the texts, the model's own losses and every measured point.
    """
    assert not isinstance(structure.width, str)
    measured = _Measured(structure.width.channels)
    while wanted := _wanted(measured, shapes):
        plans = dict(zip(wanted, make([shapes[at] for at in wanted]), strict=True))
        named = {f"{plan.keep}x{plan.width or measured.channels}": (at, plan) for at, plan in plans.items()}
        rows = {name: plan for name, (_, plan) in named.items()}
        full = not measured.full
        measured.add(measure(rows, full), named)
        points = ", ".join(f"{name} {measured.points[at].loss:.4f}" for name, (at, _) in named.items())
        say(f"experts x channels, loss on held-out text: {points}")
    chosen = measured.plans[measured.chosen()]
    chosen.found = {
        "texts": {text.name: {k: v for k, v in text.record.items() if k != "sketch"} for text in texts},
        "full": measured.full,
        "shapes": [vars(measured.points[at]) for at in sorted(measured.points)],
    }
    return chosen
