"""What a merge may look at in one MoE layer: statistics of its experts on calibration text. Arrays only."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerFacts:
    """Statistics of all experts of one MoE layer; those that a merge does not ask for (`Merge.needs`) are empty.

    Attributes:
        kept: ids of the experts that stay, ascending.
        counts: tokens that are routed to each expert, ``[expert]``.
        saliency: mean over these of the routing weight times the norm of the output (REAP), 0 without any;
            ``[expert]``.
        router: cosine between the router logits of two experts over all tokens, ``[expert, expert]``.
        outputs: mean output over all tokens, routed or not, ``[expert, hidden]``.
        gated: mean over all tokens of the output times the softmax of the router logits, ``[expert, hidden]``.
    """

    kept: tuple[int, ...]
    counts: Floats
    saliency: Floats
    router: Floats
    outputs: Floats
    gated: Floats

    def finite(self) -> bool:
        """Whether all numbers are."""
        return all(np.isfinite(getattr(self, one.name)).all() for one in fields(self))


@dataclass(frozen=True)
class Groups:
    """Which experts become one.

    Attributes:
        centre_of: the kept expert that each expert joins, a kept one itself, -1 for one that joins none; int64
            ``[expert]``.
        weights: of every expert in the average of its group, not negative, ``[expert]``; a group whose weights are all
            0 keeps its centre's values.
    """

    centre_of: npt.NDArray[np.int64]
    weights: Floats

    def members(self) -> dict[int, list[int]]:
        """By kept expert, the others that have a weight in its average, both ascending; none where they all weigh 0."""
        found: dict[int, list[int]] = {}
        for expert, centre in enumerate(self.centre_of.tolist()):
            if centre not in (expert, -1) and self.weights[expert] > 0:
                found.setdefault(centre, []).append(expert)
        return dict(sorted(found.items()))
