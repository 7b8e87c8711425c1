"""C-Prune: experts near the centre of clusters of like outputs stay (arXiv 2504.07807, its authors' code)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moecover.planning.method import METHODS
from moecover.planning.options import Option

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


def _number(value: object) -> str | None:
    return None if type(value) is int and value >= 1 else "is out of range: 1 or more"


# Tokens of a sentence, and sentences that are clustered together, as the authors have them.
SENTENCE, TOGETHER = 128, 32
CLUSTERS = Option("clusters", help="clusters of experts a layer", metavar="N", parse=int, default=12, check=_number)


@METHODS("c-prune", label="C-Prune, in layers", paper="arXiv 2504.07807", options=(CLUSTERS,), together=True, rank=9)
def c_prune(
    profile: Profile,
    budgets: Sequence[Budget],
    *,
    clusters: int = 12,
    model: torch.nn.Module | Running,
    structure: Structure,
    sample: Sequence[Corpus] | None = None,
    advance: Callable[[int], None] = lambda layers: None,
) -> list[list[LayerPlan]]:
    """The experts nearest to the centres of clusters of like outputs, by votes over pieces of the calibration text.

    All experts run on the mean hidden state of every 128 tokens; of 32 such means at a time the outputs are clustered
    (Ward on the rows of their distance matrix, as the authors' code does), and the experts nearest to the mean of their
    cluster get a vote: all of them in clusters of one or two, a smaller share the larger the cluster. The experts with
    the fewest votes go, ties by the lower id. The paper's second stage, over all layers, would leave unequal counts and
    is left out.

    Args:
        profile: of the model.
        budgets: experts to keep.
        clusters: of a layer; the authors have 12.
        model: the live model, from `load_model`, or a `Running` one.
        structure: its checkpoint.
        sample: token ids to run on instead of the sample that the profile keeps.
        advance: called with 1 after every layer.

    Raises:
        InputError: the model is not the profile's, or there is no sample.
    """
    import numpy as np

    from moecover.planning.search.walk import over_layers
    from moecover.planning.selection import layer_plan

    keeps = [budget.keep for budget in budgets]

    def votes_of(live: LiveLayer, hidden: Sequence[torch.Tensor]) -> list[NDArray[np.int64]]:
        outputs = outputs_on_means(live, hidden)
        return [votes(outputs, keep, clusters) for keep in keeps]

    counted = over_layers(votes_of, profile, model, structure, sample=sample, advance=advance)
    plans = []
    for at, budget in enumerate(budgets):
        rooms = [budget.room(layer) for layer in range(len(counted))]
        orders = [np.argsort(layer[at], kind="stable")[::-1].tolist() for layer in counted]
        chosen = [room.fill(order) for room, order in zip(rooms, orders, strict=True)]
        plans.append([layer_plan(profile, layer, rooms[layer], ids) for layer, ids in enumerate(chosen)])
    return plans


def outputs_on_means(live: LiveLayer, hidden: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """Outputs of all experts on the mean hidden states of every `SENTENCE` tokens, ``[expert, sentence, hidden]``."""
    import numpy as np
    import torch

    means = torch.cat([torch.stack([piece.mean(0) for piece in torch.split(batch, SENTENCE)]) for batch in hidden])
    ones, found = means.new_ones(len(means), 1), []
    for expert in range(live.structure.topology.num_experts):
        index = torch.full((len(means), 1), expert, device=means.device)
        found.append(live.experts(means, index, ones).double().cpu().numpy())
    return np.stack(found)


def votes(outputs: NDArray[np.float64], keep: int, clusters: int) -> NDArray[np.int64]:
    """Votes for every expert, ``[expert]``.

    Args:
        outputs: ``[expert, sentence, hidden]``.
        keep: experts to keep.
        clusters: of experts.
    """
    import numpy as np

    counted = np.zeros(len(outputs), dtype=np.int64)
    for start in range(0, outputs.shape[1], TOGETHER):
        features = outputs[:, start : start + TOGETHER].reshape(len(outputs), -1)
        label = _clustered(features, clusters)
        for cluster in np.unique(label):
            members = np.flatnonzero(label == cluster)
            near = np.linalg.norm(features[members] - features[members].mean(0), axis=1)
            share = _share(len(members) / len(outputs)) * keep / len(outputs)
            number = len(members) if len(members) < 3 else int(share * len(members))
            counted[members[np.argsort(near, kind="stable")[:number]]] += 1
    return counted


def _clustered(features: NDArray[np.float64], clusters: int) -> NDArray[np.int64]:
    """The cluster of every row of ``[expert, feature]``."""
    import warnings

    import numpy as np
    from scipy.cluster.hierarchy import ClusterWarning, fcluster, linkage
    from scipy.spatial.distance import pdist, squareform

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClusterWarning)  # rows of distances are clustered as points, on purpose
        tree = linkage(squareform(pdist(features)), method="ward")
    return np.asarray(fcluster(tree, clusters, "maxclust"), dtype=np.int64)


def _share(part: float) -> float:
    """Share of a cluster that gets a vote, before the budget's; ``part`` is the cluster's share of all experts."""
    up, down = math.exp(part - 0.5), math.exp(0.5 - part)
    return 0.5 + 0.6 * (down - up / (up + down))
