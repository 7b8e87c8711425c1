"""Stage 3d, budget: reads a bound, gives the number of experts per layer that meets it, and every point that was looked at.

A bound on size is arithmetic on the headers. A bound on perplexity is met by the smallest number whose plan, emulated in the
model, keeps it on every held-out text. Perplexity need not rise with every expert that goes, so nothing is concluded for a
number that was not measured: a few numbers share each pass over the texts (and one read of the weights), the gap between
the smallest that holds and the next one below that does not is narrowed until they are neighbours, and the neighbours
below are measured too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.corpora.sources import CORPORA, HubCorpus
from moecover.errors import InputError, MoecoverError
from moecover.evaluation.artifact import FULL
from moecover.planning.artifact import Plan
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
BLOCKS = 64  # held-out blocks of every corpus


def parse_percent(text: str, flag: str) -> float:
    """The share that a percentage such as ``10%`` is.

    Raises:
        InputError: it is none, or below 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match is None:
        raise InputError(f"{flag} {text}: give a percentage with its sign, 0% or more, such as 10%")
    return float(match[1]) / 100


# ---------------------------------------------------------------------------------------------------------------- size
def largest_within(structure: Structure, num_bytes: int, *, multiple_of: int | None = None) -> int:
    """The most experts per layer whose checkpoint's tensors take at most so many bytes.

    Args:
        structure: the checkpoint; its headers are enough.
        num_bytes: allowed.
        multiple_of: only multiples of this number.

    Raises:
        InputError: not even the fewest fit, or the whole model does.
    """
    keeps, own = allowed_keeps(structure.topology, multiple_of), structure.checkpoint.num_bytes
    if own <= num_bytes:
        raise InputError(f"--max-size {num_bytes:,} bytes: {structure.checkpoint.name} has {own:,} itself, so nothing is to be removed")  # fmt: skip
    fitting = [keep for keep in keeps if structure.num_bytes(keep) <= num_bytes]
    if not fitting:
        raise InputError(f"--max-size {num_bytes:,} bytes: {keeps[0]} experts per layer, the fewest allowed, leave {structure.num_bytes(keeps[0]):,}. Give as many or more")  # fmt: skip
    return fitting[-1]


# ---------------------------------------------------------------------------------------------------------- held-out text
def check_held_out(
    corpora: Mapping[str, list[dict[str, Any]]], files: Mapping[str, str | None]
) -> dict[str, str | None]:
    """Where the calibration corpora of a profile can be read again for the blocks that it did not use.

    Args:
        corpora: records by name, see `Profile.corpora`.
        files: by name, the files that the user gave.

    Returns:
        The file of every corpus, None for a named one.

    Raises:
        InputError: a corpus of several samples, one that was used up, or a file that was not given.
    """
    if unknown := [name for name in files if name not in corpora]:
        raise InputError(f"--corpus {unknown[0]} is none of the profile's: {', '.join(corpora)}")
    found = dict[str, str | None]()
    for name, records in corpora.items():
        record, remedy = records[0], "Give held-out text as --perplexity NAME[=PATH]"
        if len(records) > 1 or "rows" in record or "seed" not in record:
            raise InputError(f"the profile's corpus {name} is not one sample of one text, so it is not known which blocks of it are left. {remedy}")  # fmt: skip
        if record.get("blocks_available", 0) <= record["sequences"]:
            raise InputError(f"the profile took all {record['sequences']} blocks of {name}, none is left to measure on. {remedy}, or make the profile with fewer --sequences")  # fmt: skip
        row = CORPORA.get(name)
        source = f"{row.path}@{row.revision}" if isinstance(row, HubCorpus) else name
        named = row is not None and record["source"] == source
        if not named and not files.get(name):
            raise InputError(f"the profile read {name} from the file {record['source']}: give it as --corpus {name}=PATH, for the blocks that it did not use, or held-out text as --perplexity NAME[=PATH]")  # fmt: skip
        found[name] = None if named else files[name]
    return found


def held_out(profile: Profile, files: Mapping[str, str | None], structure: Structure, *, blocks: int = BLOCKS) -> list[Corpus]:  # fmt: skip
    """Blocks of every calibration corpus that the profile did not use, see `load_unused`.

    Args:
        profile: says what it used.
        files: from `check_held_out`.
        structure: the model.
        blocks: of each corpus at most.
    """
    from moecover.corpora.packing import load_unused

    return [
        load_unused(name, path and Path(path), profile.corpora[name][0], structure=structure, blocks=blocks)
        for name, path in files.items()
    ]


# ---------------------------------------------------------------------------------------------------------- perplexity
@dataclass(frozen=True)
class Point:
    """A number of experts that was measured.

    Attributes:
        keep: experts per layer.
        num_bytes: of the checkpoint's tensors.
        perplexity: by text.
        increase: by text, perplexity over the full model's, less 1.
        holds: whether no increase is above the bound.
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
        raise InputError(f"no number below the {topology.num_experts} experts of a layer is allowed here: nothing to search for")  # fmt: skip
    return found


def _fit(topology: Topology, keep: int, required: tuple[frozenset[int], ...]) -> bool:
    """Whether the required experts of every layer have places."""
    budget = Budget(keep, topology.num_experts, topology.num_groups, required)
    with contextlib.suppress(InputError):
        for layer in range(len(required)):
            budget.room(layer)
        return True
    return False


def _evenly(positions: Sequence[int], number: int) -> list[int]:
    """So many of the positions, evenly between their ends; all where there are no more."""
    if len(positions) <= number:
        return list(positions)
    return [positions[(i + 1) * len(positions) // (number + 1)] for i in range(number)]


def smallest(keeps: Sequence[int], measure: Callable[[list[int]], Iterable[bool]]) -> int | None:
    """The smallest number that holds as far as it was looked, see the module; None where none held.

    Args:
        keeps: numbers to choose from, ascending.
        measure: says of several numbers at once whether they hold; never asked twice for one.
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
    """The plan with the smallest number of experts whose perplexity stays within a bound on every text.

    Args:
        profile: what the plans are made from.
        structure: the checkpoint.
        make: gives plans from numbers of experts.
        keeps: numbers to choose from, ascending, the model's own not among them, see `possible_keeps`.
        most: largest increase of perplexity over the model's own, as a share.
        model: the same, from `load_model` or `streamed`.
        texts: held-out text.
        batch_size: sequences per forward pass.
        bar: shows how far a pass is.
        say: takes a line after every pass.

    Returns:
        The plan; ``found`` says the bound, the texts, the model's own perplexities, and every point that was measured.

    Raises:
        InputError: another model than the profile's.
        MoecoverError: no number holds; says the nearest one.
    """
    from moecover.evaluation.run import evaluate

    if structure.model_fingerprint != profile.model["fingerprint"]:
        raise InputError(f"the profile is of another model ({profile.model['name']}), not of {structure.checkpoint.name}: topology or routers differ. Give the --model that was profiled")  # fmt: skip
    full, plans, points = dict[str, float](), dict[int, Plan](), dict[int, Point]()

    def measure(asked: list[int]) -> list[bool]:
        made = {str(plan.keep): plan for plan in make(asked)}
        found = evaluate(structure, made, model=model, texts=texts, full=not full, batch_size=batch_size, bar=bar)
        for row in found.rows:
            values = {name: result.perplexity for name, result in row.perplexity.items()}
            if row.name == FULL:
                full.update(values)
                continue
            increase = {name: value / full[name] - 1 for name, value in values.items()}
            plans[row.keep] = made[row.name]
            points[row.keep] = Point(row.keep, row.num_bytes, values, increase, max(increase.values()) <= most)
        line = (f"{k} ({'holds' if points[k].holds else 'does not'}, {max(points[k].increase.values()):+.1%})" for k in asked)  # fmt: skip
        say(f"experts per layer: {', '.join(line)}")
        return [points[keep].holds for keep in asked]

    keep = smallest(keeps, measure)
    if keep is None:
        best = min(points.values(), key=lambda point: max(point.increase.values()))
        worst = max(best.increase, key=lambda name: best.increase[name])
        raise MoecoverError(f"no number of experts below {structure.topology.num_experts} keeps every perplexity within {100 * most:.4g}% of the model's own: the nearest of the {len(points)} measured, {best.keep}, raises that of {worst} by {best.increase[worst]:.1%}. Allow more")  # fmt: skip
    plans[keep].found = {
        "max_perplexity_increase": most,
        "texts": {text.name: {k: v for k, v in text.record.items() if k != "sketch"} for text in texts},
        "full": full,
        "curve": [vars(points[k]) for k in sorted(points)],
    }
    return plans[keep]
