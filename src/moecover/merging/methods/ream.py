"""REAM: large groups around the most salient experts, the others stay alone (arXiv 2604.04356)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moecover.merging.method import GATED, MERGES, ROUTER, SALIENCY, Pair

if TYPE_CHECKING:
    import torch

    from moecover.merging.facts import Floats, Groups, LayerFacts

GROUP = 16  # experts of a group at most, its kept one among them: C of the paper


def unlike_channels(pair: Pair) -> torch.Tensor:
    """Euclidean distances of the channels' activations, and of their weights, each scaled to norm 1, added up.

    The authors reduce the weights to 64 principal components first, for speed, and draw other tokens for every expert
    whose activations they compare; here weights are whole and tokens the same.
    """
    import torch

    assert pair.activations is not None
    one, other = (torch.nn.functional.normalize(part, dim=1) for part in (pair.centre, pair.member))
    apart = torch.stack([one @ other.T, pair.activations.to(one.dtype)])
    return (2 - 2 * apart).clamp(min=0).sqrt().sum(0)


def _cosines(vectors: Floats) -> Floats:
    import numpy as np

    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    found: Floats = unit @ unit.T
    return found


@MERGES(
    "ream",
    label="REAM",
    paper="arXiv 2604.04356",
    needs=(SALIENCY, ROUTER, GATED),
    sequential=True,
    cost=unlike_channels,
    by_activations=True,
)
def ream(facts: LayerFacts) -> Groups:
    """Up to 15 similar experts into the most salient kept one, then the next; weighted by REAP, channels matched.

    As the authors' code (SamsungSAILMontreal/ream): similar is the mean of (1 + the cosine of the mean outputs, each
    times the router's softmax) / 2 and of 1 - the distance of the router logits over the largest such distance, logits
    scaled to norm 1 over the tokens. Kept experts take turns from the most salient on, each takes the most similar
    ones that are left until its group has 16, so most stay as they are. An expert without tokens has the least weight
    of the others, at most 0.5. There the kept experts are the most salient ones, here those of the plan; groups are
    larger where the kept experts could not take all others. The paper's saliency is REAP's; the code multiplies by the
    router's softmax once more. Ties go to the lowest id.
    """
    import numpy as np

    from moecover.merging.facts import Groups

    kept, count = np.array(facts.kept), len(facts.counts)
    apart = np.sqrt(np.clip(2 - 2 * facts.router, 0, None))
    widest = apart.max()
    alike = ((1 + _cosines(facts.gated)) / 2 + 1 - (apart / widest if widest > 0 else apart)) / 2
    weights = facts.saliency.copy()
    if (weights > 0).any():
        weights[weights == 0] = min(0.5, weights[weights > 0].min())
    most = max(GROUP, -(-count // len(kept))) - 1
    centre_of = np.full(count, -1)
    centre_of[kept] = kept
    for centre in kept[np.argsort(-facts.saliency[kept], kind="stable")].tolist():
        left = np.flatnonzero(centre_of < 0)
        centre_of[left[np.argsort(-alike[centre, left], kind="stable")[:most]]] = centre
    return Groups(centre_of, weights)
