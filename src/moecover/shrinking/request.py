"""What `shrink` is asked for, checked from headers (shapes in the budget, memory of a repair), and what it gives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.errors import InputError, arg
from moecover.evaluation.budgets import check_within, fits_budget, shapes_within, whole_experts
from moecover.planning.curve import EXPERTS, parse_shape
from moecover.planning.shapes import Shape
from moecover.repairing.job import memory_beside
from moecover.runtime.world import ALONE, World

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure
    from moecover.evaluation.artifact import Evaluation
    from moecover.pruning.request import Pruned
    from moecover.runtime.passes import Passes
    from moecover.shrinking.quality import Quality
    from moecover.verification.verify import Verification


@dataclass(frozen=True)
class Asked:
    """What `shrink` is asked for, checked.

    Attributes:
        output: folder of the checkpoint.
        work: folder for what is made on the way.
        budget: share of the experts' bytes, None with ``max_size``.
        max_size: of the checkpoint.
        shape: see `planning.curve.parse_shape`.
        repair: kind of the repair; None for none.
        quality: how much text.
        how: how the model runs.
        overwrite: whether an output of this program may be replaced.
        command: what the user typed.
        here: this process among those that share the work; the first one writes.
        multiple_of: what the number of experts is a multiple of; None for any.
    """

    output: Path
    work: Path
    budget: float | str | None
    max_size: int | str | None
    shape: str
    repair: str | None
    quality: Quality
    how: Passes
    overwrite: bool
    command: str
    here: World = ALONE
    multiple_of: int | None = None

    @property
    def of_budget(self) -> Path:
        """The folder within ``work`` for what depends on the budget and the shape."""
        size = self.max_size if self.budget is None else self.budget
        step = "" if self.multiple_of is None else f"-of{self.multiple_of}"
        name = f"{size}-{self.shape}{step}".replace("%", "pct")
        return self.work / re.sub(r"[^\w.-]", "", name)


def shapes_of(headers: Structure, asked: Asked) -> list[Shape]:
    """The shapes within the budget, by headers alone; one where it is not to be measured.

    Raises:
        InputError: none is, or a multiple is asked for beside a shape.
    """
    known = None if isinstance(headers.width, str) else headers.width.channels
    budget, size = asked.budget, asked.max_size
    shapes = shapes_within(
        headers.topology, known, structure=headers, budget=budget, max_size=size, multiple_of=asked.multiple_of
    )
    wanted = parse_shape(asked.shape, headers.topology, known)
    if isinstance(wanted, Shape):
        if asked.multiple_of is not None:
            raise InputError(
                f"{arg('multiple_of', asked.multiple_of)} says which shapes are looked for: "
                f"{arg('shape', asked.shape)} is one already"
            )
        check_within(wanted, known, fits_budget(headers.topology, known, headers, budget, size))
        return [wanted]
    return [whole_experts(shapes)] if wanted == EXPERTS else shapes


def memory_needed(headers: Structure, asked: Asked, shapes: list[Shape]) -> int:
    """Bytes that a repair needs beside the model; refuses a model that cannot be repaired."""
    if asked.repair is None:
        return 0
    kind, tokens, dtype = asked.repair, -(-asked.quality.repair_tokens // asked.here.size), asked.how.dtype
    return max(
        memory_beside(headers, kind=kind, keep=s.keep, width=s.width, tokens=tokens, dtype=dtype) for s in shapes
    )


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` made.

    Attributes:
        pruned: the checkpoint.
        evaluation: rows of the model itself and of the checkpoint, on held-out text.
        verification: the proof against the masked original.
        work: folder of plan and evaluation; own text and profile lie beside it.
    """

    pruned: Pruned
    evaluation: Evaluation
    verification: Verification
    work: Path
