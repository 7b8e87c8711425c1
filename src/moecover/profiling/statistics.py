"""The statistics of one number an expert: their names, and how those of two token sets add up; see `Profile`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PARTS = 8  # of a corpus, whose running sums are kept
COUNTS = ("count", "num_tokens")
# NaN where an older version made the profile, or the model does not show them.
LATER = ("norm_sq_sum", "change_norm_sum")
SUMS = (
    "weight_sum",
    "norm_sum",
    "weighted_norm_sum",
    "weighted_sq_sum",
    "renorm_weighted_norm_sum",
    *LATER,
    "prob_sum",
)
MAXIMA = ("max_abs",)
STATISTICS = (*COUNTS, *SUMS, *MAXIMA)

OF_MTP = "multi-token-prediction layers"  # in messages, and in what a state depends on

Statistics = dict[str, "NDArray[Any]"]


def added(one: Statistics, two: Statistics) -> Statistics:
    """The statistics of two token sets together; shapes broadcast."""
    return {n: np.maximum(one[n], two[n]) if n in MAXIMA else one[n] + two[n] for n in STATISTICS}


def known(name: str, statistics: Statistics) -> bool:
    """Whether a statistic was recorded; those of `LATER` may lack."""
    return name not in LATER or not bool(np.isnan(statistics[name]).all())
