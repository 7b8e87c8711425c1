"""Super experts (arXiv 2507.23279): the few with extreme outputs, which a plan can keep whatever its method says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moecover.errors import InputError, arg

if TYPE_CHECKING:
    from moecover.profiling.artifact import Profile

QUANTILE = 0.995  # of the peaks of all experts
SHARE = 0.1  # of the largest peak


def super_experts(profile: Profile) -> tuple[frozenset[int], ...]:
    """By MoE layer, the ids of the experts with extreme outputs (arXiv 2507.23279).

    The largest absolute component of an expert's output over all corpora is above the 99.5 % quantile over all experts
    of all layers, and above a tenth of the global maximum. Layers are MoE layers: dense ones do not count.

    Raises:
        InputError: the profile has no largest outputs, see `imatrix_profile`.
    """
    peaks = np.max([s["max_abs"] for s in profile.statistics.values()], axis=0)
    if not np.isfinite(peaks).all():
        raise InputError(
            f"{arg('protect_super_experts')}: the profile does not know the largest outputs of the experts"
        )
    threshold = max(float(np.quantile(peaks, QUANTILE)), SHARE * float(peaks.max()))
    return tuple(frozenset(np.flatnonzero(row > threshold).tolist()) for row in peaks)
