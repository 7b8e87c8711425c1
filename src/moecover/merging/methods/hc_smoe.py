"""HC-SMoE: clusters of experts by their mean outputs, average linkage, averaged by frequency (arXiv 2410.08589)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moecover.merging.method import MERGES, OUTPUTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from moecover.merging.facts import Floats, Groups, LayerFacts


@MERGES("hc-smoe", label="HC-SMoE", paper="arXiv 2410.08589", needs=(OUTPUTS,))
def hc_smoe(facts: LayerFacts) -> Groups:
    """Hierarchical clusters by mean outputs, each around one kept expert; weighted by frequency, no channels matched.

    As the authors' code (wazenmai/HC-SMoE): features are the experts' mean outputs over all tokens, routed or not; the
    two clusters with the least mean Euclidean distance join until as many are left as experts are kept; averages are
    weighted by the share of tokens. There the kept experts follow from the clusters; here two clusters that both hold
    an expert of the plan never join. Where the plan has one expert of each of the authors' clusters, the clusters are
    theirs.
    """
    from moecover.merging.facts import Groups

    return Groups(clusters(facts.outputs, facts.kept), facts.counts)


def clusters(features: Floats, kept: Sequence[int]) -> npt.NDArray[np.int64]:
    """Average linkage in which clusters of two kept experts never join; the kept expert of every expert's cluster.

    Ties: the pair with the lowest ids, a cluster's being the lowest of its experts'.

    Args:
        features: float64 ``[expert, number]``.
        kept: one expert of every cluster.

    Returns:
        int64 ``[expert]``.
    """
    import numpy as np
    from scipy.spatial.distance import cdist

    count = len(features)
    distances = cdist(features, features)
    distances[np.tril_indices(count)] = np.inf
    distances[np.ix_(list(kept), list(kept))] = np.inf  # and so are the means that hold one of them
    sizes, cluster_of = np.ones(count), np.arange(count)
    for _ in range(count - len(kept)):
        one, other = divmod(int(np.argmin(distances)), count)  # one < other
        both = np.minimum(distances, distances.T)
        mean = (sizes[one] * both[one] + sizes[other] * both[other]) / (sizes[one] + sizes[other])
        distances[one, one + 1 :], distances[:one, one] = mean[one + 1 :], mean[:one]
        distances[other], distances[:, other] = np.inf, np.inf
        sizes[one] += sizes[other]
        cluster_of[cluster_of == other] = one
    expert_of = {int(cluster_of[expert]): expert for expert in kept}
    return np.array([expert_of[cluster] for cluster in cluster_of.tolist()])
