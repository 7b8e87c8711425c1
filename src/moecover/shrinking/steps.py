"""The steps of `shrink`, with what each reads and about how long it takes: from headers and sizes, before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.corpora.own_text import PACE as WRITES
from moecover.evaluation.shape_search import MOST
from moecover.repairing.memory import PACE as REPAIRS
from moecover.runtime.cost import arithmetic_speed, cost
from moecover.runtime.devices import available_memory, check_device
from moecover.text import duration_text

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure
    from moecover.runtime.passes import Passes
    from moecover.shrinking.quality import Quality


WRITE = "write"  # name of the step that writes the checkpoint


@dataclass(frozen=True)
class Step:
    """One step: what it does, over how many tokens, and about how long (None where that is not known)."""

    name: str
    tokens: int
    seconds: float | None

    def line(self, number: int, of: int) -> str:
        """The step in words."""
        tokens = f", {self.tokens:,} tokens" if self.tokens else ""
        about = "" if self.seconds is None else f", about {duration_text(self.seconds)}"
        return f"step {number} of {of}: {self.name}{tokens}{about}"


def steps_of(
    structure: Structure,
    quality: Quality,
    how: Passes,
    *,
    corpora: int,
    kinds: int,
    length: int,
    measured: bool,
    repair: str | None,
) -> list[Step]:
    """The steps, in order.

    Args:
        structure: the model; headers are enough.
        quality: how much text.
        how: how the model runs.
        corpora: number of corpora beside what the model writes.
        kinds: number of kinds of text that the model writes; 0 for none.
        length: tokens of a block.
        measured: whether several shapes are measured.
        repair: kind of the repair, None for none.
    """
    device = check_device(how.dtype, how.device)
    limit = how.memory_limit if how.memory_limit is not None else int(0.9 * available_memory(device))
    one = cost(structure, tokens=10_000, batch_tokens=how.batch_size * length, dtype=how.dtype, limit=limit)
    a_token = one.flops / 10_000 / arithmetic_speed(how.dtype, device)
    own = quality.rows * length if kinds else 0
    text = corpora * quality.blocks * length + own
    held_out = (corpora + kinds) * quality.windows * length
    found = [Step("the model writes text", own, own * a_token * WRITES)] if own else []
    found.append(Step("profile", text, text * a_token))
    if measured:
        found.append(Step("measure shapes", held_out, held_out * a_token * (1 + MOST)))
    if repair is not None:
        fitted = min(quality.repair_tokens, text)
        found.append(Step(f"repair ({repair})", fitted, fitted * a_token * REPAIRS[repair]))
    found.append(Step("evaluate", held_out, 2 * held_out * a_token))
    found.append(Step(WRITE, 0, structure.checkpoint.num_bytes / 5e8))
    found.append(Step("verify", 1024, 2 * 1024 * a_token))
    return found


def total_line(steps: list[Step]) -> str:
    """The time of all steps in words."""
    known = [step.seconds for step in steps if step.seconds is not None]
    if len(known) < len(steps):
        return f"{len(steps)} steps; how long they take is not estimated"
    return f"{len(steps)} steps, {duration_text(sum(known))} in all, as estimated"
