"""TB-Coverage: corpora take turns protecting the experts that matter most to them (arXiv 2607.01710)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moecover.errors import InputError, arg
from moecover.planning.method import METHODS
from moecover.planning.options import PROTECT, RESERVE, SALIENCY, WEIGHTS

if TYPE_CHECKING:
    from moecover.planning.artifact import LayerPlan
    from moecover.planning.selection import Budget
    from moecover.profiling.artifact import Profile


@METHODS(
    "tb-coverage",
    label="TB-Coverage",
    paper="arXiv 2607.01710",
    options=(SALIENCY, PROTECT, RESERVE, WEIGHTS),
    default=True,
    compared=True,
    rank=0,
)
def tb_coverage(
    profile: Profile,
    budget: Budget,
    *,
    saliency: str = "contribution",
    protect: float = 0.5,
    reserve: float | None = None,
    weights: Mapping[str, int] | None = None,
) -> list[LayerPlan]:
    """Corpora take turns protecting their best experts; the mean utility fills the rest.

    Args:
        profile: statistics of every corpus.
        budget: experts to keep.
        saliency: name in `SALIENCIES`, computed for each corpus separately.
        protect: share of the kept experts that is protected, in [0, 1].
        reserve: share of them that goes first to the experts of the highest ``reap`` over all corpora together: a
            saliency by how often an expert is used never keeps those that few tokens need.
        weights: by corpus, turns per round and weight in the mean; 1 by default, 0 leaves a corpus out.

    Raises:
        InputError: every weight is 0, or the saliency is negative somewhere.
    """
    import numpy as np

    from moecover.planning.saliency import utility_of
    from moecover.planning.selection import cover, layer_plan, ranked

    turns, places = int(protect * budget.keep + 0.5), int((reserve or 0) * budget.keep + 0.5)
    corpora = {name: (weights or {}).get(name, 1) for name in profile.statistics}
    if not any(corpora.values()):
        raise InputError("every corpus has weight 0. Give at least one of them 1 or more")
    utility = {name: utility_of(saliency, s) for name, s in profile.statistics.items()}
    if any((values < 0).any() for values in utility.values()):
        raise InputError(
            f"saliency {saliency} gives negative values, which cannot be scaled to shares. Use another saliency, or "
            f"{arg('method', 'pooled')}"
        )
    rare = ranked(utility_of("reap", profile.pooled())).tolist() if places else None
    plans = []
    for layer in range(len(profile.topology.decoder_layers)):
        room, rows = budget.room(layer), np.stack([u[layer] for u in utility.values()])
        reserved = room.fill(rare[layer][:places] if rare is not None else [])
        protected, filled = cover(rows, room, turns, list(corpora.values()))
        by_corpus = dict(zip(utility, protected, strict=True))
        plans.append(layer_plan(profile, layer, room, [*reserved, *filled], protected=by_corpus, utility=utility))
    return plans
