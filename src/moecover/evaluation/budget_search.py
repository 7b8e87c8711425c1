"""Stage 3d, budget: reads a bound, gives the number of experts per layer that meets it, and every measured point.

A bound on size is arithmetic on the headers. For a bound on perplexity, the smallest number is searched whose plan,
emulated in the model, meets the bound on every held-out text. Perplexity need not rise with every removed expert, so
nothing is concluded for a number that was not measured: a few numbers share each pass over the texts (and one read of
the weights), the gap between the smallest number that holds and the next one below that does not is narrowed until they
are neighbours, and the neighbours below are measured too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moecover.errors import InputError, MoecoverError, arg
from moecover.evaluation.artifact import FULL, Evaluation
from moecover.evaluation.run import evaluate
from moecover.planning.artifact import Plan
from moecover.planning.fitting import check_model
from moecover.planning.keep import allowed_keeps
from moecover.planning.selection import Budget
from moecover.planning.super_experts import super_experts

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.structure import Structure
    from moecover.checkpoints.topology import Topology
    from moecover.corpora.packing import Corpus
    from moecover.profiling.artifact import Profile
    from moecover.progress import Bar
    from moecover.runtime.running import Running

TOGETHER = 4  # numbers of experts that share a pass
BELOW = 2  # neighbours below the smallest that holds, which are measured too


def parse_percent(text: str, flag: str) -> float:
    """A percentage such as ``10%`` as a share.

    Args:
        text: what the user wrote.
        flag: the option it was given to, for the message.

    Raises:
        InputError: it is no percentage, or below 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match is None:
        raise InputError(f"{flag} {text}: give a percentage with its sign, 0% or more, such as 10%")
    return float(match[1]) / 100


def largest_within(structure: Structure, num_bytes: int, *, multiple_of: int | None = None) -> int:
    """The most experts per layer whose checkpoint's tensors take at most a number of bytes.

    Args:
        structure: the checkpoint; its headers are enough.
        num_bytes: bytes allowed.
        multiple_of: only multiples of this number.

    Raises:
        InputError: not even the fewest fit, or the whole model does.
    """
    keeps, own = allowed_keeps(structure.topology, multiple_of), structure.checkpoint.num_bytes
    bound = arg("max_size", f"{num_bytes:,} bytes")
    if own <= num_bytes:
        raise InputError(f"{bound}: {structure.checkpoint.name} itself has {own:,}, so nothing is to be removed")
    fitting = [keep for keep in keeps if structure.num_bytes(keep) <= num_bytes]
    if not fitting:
        raise InputError(
            f"{bound}: {keeps[0]} experts per layer, the fewest allowed, leave {structure.num_bytes(keeps[0]):,}. "
            "Give as many or more"
        )
    return fitting[-1]


@dataclass(frozen=True)
class Point:
    """A measured number of experts.

    Attributes:
        keep: experts per layer.
        num_bytes: of the checkpoint's tensors.
        perplexity: by text.
        increase: by text, perplexity relative to the full model's, minus 1.
        holds: whether no increase exceeds the bound.
    """

    keep: int
    num_bytes: int
    perplexity: dict[str, float]
    increase: dict[str, float]
    holds: bool


def possible_keeps(
    profile: Profile, *, multiple_of: int | None = None, protect_super_experts: bool = False
) -> list[int]:
    """Numbers of experts below the model's own that a plan may keep, ascending.

    Raises:
        InputError: there is none.
    """
    topology = profile.topology
    required = super_experts(profile) if protect_super_experts else ()
    found = [
        k for k in allowed_keeps(topology, multiple_of) if k < topology.num_experts and _fit(topology, k, required)
    ]
    if not found:
        raise InputError(
            f"no number below the {topology.num_experts} experts of a layer is allowed here: nothing to search for"
        )
    return found


def _fit(topology: Topology, keep: int, required: tuple[frozenset[int], ...]) -> bool:
    """Whether the required experts of every layer fit into the budget."""
    budget = Budget(keep, topology.num_experts, topology.num_groups, required)
    with contextlib.suppress(InputError):
        for layer in range(len(required)):
            budget.room(layer)
        return True
    return False


def _evenly(positions: Sequence[int], number: int) -> list[int]:
    """``number`` of the positions, evenly spaced; all of them where there are no more."""
    if len(positions) <= number:
        return list(positions)
    return [positions[(i + 1) * len(positions) // (number + 1)] for i in range(number)]


def smallest(keeps: Sequence[int], measure: Callable[[list[int]], Iterable[bool]]) -> int | None:
    """The smallest measured number that holds, see the module; None where none holds.

    Args:
        keeps: candidate numbers, ascending.
        measure: whether each of several numbers holds; never called twice for one number.
    """
    known: dict[int, bool] = {}  # by position
    below, above = -1, len(keeps)  # nearest below that fails, smallest that holds
    while True:
        asked = _evenly(range(below + 1, above), TOGETHER)
        asked = asked or [i for i in range(max(0, above - 1 - BELOW), above) if i not in known]
        if not asked:
            return keeps[above] if above < len(keeps) else None
        known |= zip(asked, measure([keeps[i] for i in asked]), strict=True)
        above = min((i for i, held in known.items() if held), default=len(keeps))
        below = max((i for i, held in known.items() if not held and i < above), default=-1)


@dataclass
class _Measured:
    """What was measured so far: the full model's perplexities by text, plans and points by number of experts."""

    full: dict[str, float] = field(default_factory=dict)
    plans: dict[int, Plan] = field(default_factory=dict)
    points: dict[int, Point] = field(default_factory=dict)

    def add(self, found: Evaluation, plans: dict[str, Plan], most: float) -> None:
        """Take the rows of an evaluation of plans; ``most`` is the bound."""
        for row in found.rows:
            values = {name: result.perplexity for name, result in row.perplexity.items()}
            if row.name == FULL:
                self.full.update(values)
                continue
            increase = {name: value / self.full[name] - 1 for name, value in values.items()}
            self.plans[row.keep] = plans[row.name]
            self.points[row.keep] = Point(row.keep, row.num_bytes, values, increase, max(increase.values()) <= most)

    def line(self, keeps: Sequence[int]) -> str:
        """The outcome for some numbers, in words."""
        points = [self.points[keep] for keep in keeps]
        words = (f"{p.keep} ({'holds' if p.holds else 'does not'}, {max(p.increase.values()):+.1%})" for p in points)
        return f"experts per layer: {', '.join(words)}"

    def none_holds(self, experts: int, most: float) -> MoecoverError:
        """The error for a bound that no number meets."""
        best = min(self.points.values(), key=lambda point: max(point.increase.values()))
        worst = max(best.increase, key=lambda name: best.increase[name])
        return MoecoverError(
            f"no number of experts below {experts} keeps every perplexity within {100 * most:.4g}% of the model's own: "
            f"the nearest of the {len(self.points)} measured, {best.keep}, raises that of {worst} by "
            f"{best.increase[worst]:.1%}. Allow more"
        )


def find(
    profile: Profile,
    structure: Structure,
    make: Callable[[list[int]], list[Plan]],
    *,
    keeps: Sequence[int],
    most: float,
    model: torch.nn.Module | Running,
    texts: Sequence[Corpus],
    batch_size: int = 1,
    bar: Bar | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """The plan with the fewest experts whose perplexity stays within a bound on every text.

    Args:
        profile: what the plans are made from.
        structure: the checkpoint.
        make: makes plans for numbers of experts.
        keeps: candidate numbers, ascending, without the model's own, see `possible_keeps`.
        most: largest increase of perplexity over the model's own, as a share.
        model: the model of the checkpoint, from `load_model`, `opened` or `streamed`.
        texts: held-out text.
        batch_size: sequences per forward pass.
        bar: makes a progress bar for each pass.
        say: called with a line of text after every pass.

    Returns:
        The plan; its ``found`` holds the bound, the texts, the model's own perplexities, and every measured point.

    Raises:
        InputError: the profile is of another model.
        MoecoverError: no number meets the bound; names the nearest one.
    """
    check_model(profile, structure)
    measured = _Measured()

    def measure(asked: list[int]) -> list[bool]:
        made, full = {str(plan.keep): plan for plan in make(asked)}, not measured.full
        rows = evaluate(structure, made, model=model, texts=texts, full=full, batch_size=batch_size, bar=bar)
        measured.add(rows, made, most)
        say(measured.line(asked))
        return [measured.points[keep].holds for keep in asked]

    keep = smallest(keeps, measure)
    if keep is None:
        raise measured.none_holds(structure.topology.num_experts, most)
    measured.plans[keep].found = _found(measured, texts, most)
    return measured.plans[keep]


def _found(measured: _Measured, texts: Sequence[Corpus], most: float) -> dict[str, object]:
    """The record of the search, for the plan."""
    return {
        "max_perplexity_increase": most,
        "texts": {text.name: {k: v for k, v in text.record.items() if k != "sketch"} for text in texts},
        "full": measured.full,
        "curve": [vars(measured.points[k]) for k in sorted(measured.points)],
    }
