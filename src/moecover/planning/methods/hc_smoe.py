"""HC-SMoE's choice of experts: one of each cluster of like mean outputs stays (arXiv 2410.08589)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moecover.planning.method import METHODS

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from moecover.checkpoints.structure import Structure
    from moecover.corpora.packing import Corpus
    from moecover.planning.artifact import LayerPlan
    from moecover.planning.search.live_layer import LiveLayer
    from moecover.planning.selection import Budget
    from moecover.profiling.artifact import Profile
    from moecover.runtime.running import Running


@METHODS("hc-smoe", label="HC-SMoE's centres", paper="arXiv 2410.08589", together=True, rank=10)
def hc_smoe(
    profile: Profile,
    budgets: Sequence[Budget],
    *,
    model: torch.nn.Module | Running,
    structure: Structure,
    sample: Sequence[Corpus] | None = None,
    advance: Callable[[int], None] = lambda layers: None,
) -> list[list[LayerPlan]]:
    """The expert nearest to the middle of each cluster of like mean outputs; for `prune --merge hc-smoe`.

    All experts run on all tokens; their mean outputs are clustered by average linkage of Euclidean distances, as in the
    authors' code (wazenmai/HC-SMoE), into as many clusters as experts are kept. Where a budget's room has other places
    (router groups, required experts), those nearest to the middle of their cluster come next. Ties, and the nearest of
    two clusters for the last place of a router group, by the lower id.

    Args:
        profile: of the model.
        budgets: experts to keep.
        model: the live model, from `load_model`, or a `Running` one.
        structure: its checkpoint.
        sample: token ids to run on instead of the sample that the profile keeps.
        advance: called with 1 after every layer.

    Raises:
        InputError: the model is not the profile's, or there is no sample.
    """
    from moecover.planning.search.walk import over_layers
    from moecover.planning.selection import layer_plan

    means = over_layers(mean_outputs, profile, model, structure, sample=sample, advance=advance)
    plans = []
    for budget in budgets:
        rooms = [budget.room(layer) for layer in range(len(means))]
        chosen = [room.fill(order(outputs, budget.keep)) for room, outputs in zip(rooms, means, strict=True)]
        plans.append([layer_plan(profile, layer, rooms[layer], ids) for layer, ids in enumerate(chosen)])
    return plans


def mean_outputs(live: LiveLayer, hidden: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """Mean output of every expert over all tokens, routed or not, ``[expert, hidden]``."""
    import numpy as np
    import torch

    number, found = sum(map(len, hidden)), []
    for expert in range(live.structure.topology.num_experts):
        sums: list[NDArray[np.float64]] = []
        for batch in hidden:
            index = torch.full((len(batch), 1), expert, device=batch.device)
            outputs = live.experts(batch, index, batch.new_ones(len(batch), 1))
            sums.append(outputs.cpu().double().sum(0).numpy())
        found.append(np.sum(sums, axis=0) / number)
    return np.stack(found)


def order(means: NDArray[np.float64], clusters: int) -> list[int]:
    """The experts in the order in which they get a place: one of every cluster, then the others.

    Args:
        means: mean outputs, ``[expert, hidden]``.
        clusters: their number.
    """
    import numpy as np
    from scipy.cluster.hierarchy import cut_tree, linkage

    label = cut_tree(linkage(means, "average"), n_clusters=clusters)[:, 0]
    middles = {one: means[label == one].mean(0) for one in np.unique(label)}
    away = np.array([np.linalg.norm(mean - middles[one]) for mean, one in zip(means, label, strict=True)])
    ranked = np.argsort(away, kind="stable").tolist()
    first = {label[expert]: expert for expert in reversed(ranked)}
    return [*sorted(first.values()), *(expert for expert in ranked if expert not in first.values())]
