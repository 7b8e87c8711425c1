"""Saliencies: read the statistics of a corpus, give one score per layer and expert; higher means keep.

Pure arithmetic: no model and no forward pass. A new saliency is one decorated function from the statistics of one
corpus (or of all corpora pooled) to a float64 array ``[layer, expert]``. Experts that were never routed score 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.errors import InputError
from moecover.registry import Registry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moecover.profiling.artifact import Profile
    from moecover.profiling.statistics import Statistics

    Saliency = Callable[[Statistics], NDArray[np.float64]]

SALIENCIES: Registry[Saliency] = Registry("saliency")
DEFAULT_SALIENCY = "contribution"
OF_LITTLE = (DEFAULT_SALIENCY, "ean", "frequency")  # by what they need, the most first


def default_saliency(profile: Profile) -> str:
    """The first of `OF_LITTLE` that a profile knows: importance matrices hold less than a profile of one's own."""
    every = list(profile.statistics.values())
    return next(name for name in OF_LITTLE if all(np.isfinite(SALIENCIES[name](s)).all() for s in every))


def utility_of(saliency: str, statistics: Statistics) -> NDArray[np.float64]:
    """A saliency by name, ``[layer, expert]``.

    Raises:
        InputError: unknown name, or a function that gives another shape or non-finite values.
    """
    function = SALIENCIES[saliency]
    shape = statistics["count"].shape
    values = np.asarray(function(statistics))
    if values.shape != shape or values.dtype.kind not in "iuf":
        raise InputError(
            f"saliency {saliency} gives shape {list(values.shape)} of {values.dtype}, numbers of shape {list(shape)} "
            "are needed (layer, expert)"
        )
    if np.isnan(values).any() and not all(np.isfinite(found).all() for found in statistics.values()):
        known = [name for name in SALIENCIES if np.isfinite(SALIENCIES[name](statistics)).all()]
        raise InputError(
            f"saliency {saliency} needs statistics that the profile does not have. Known from it: {', '.join(known)}"
        )
    if not np.isfinite(values).all():
        layer, expert = np.argwhere(~np.isfinite(values))[0]
        raise InputError(
            f"saliency {saliency} gives {values[layer, expert]} for MoE layer {layer}, expert {expert}: "
            "finite numbers are needed"
        )
    return values.astype(np.float64)


def _per_token(total: NDArray[Any], count: NDArray[Any]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.divide(total, count, out=np.zeros(total.shape), where=count > 0)
    return result


@SALIENCIES("contribution", paper="mean over all tokens of g ||f||; this project's reading of arXiv 2607.01710")
def contribution(s: Statistics) -> NDArray[np.float64]:
    """Weighted output norm per token of the corpus: sum of g ||f|| over routed tokens / all tokens."""
    return _per_token(s["weighted_norm_sum"], s["num_tokens"])


@SALIENCIES("reap", paper="arXiv 2510.13999, code since March 2026")
def reap(s: Statistics) -> NDArray[np.float64]:
    """Mean over routed tokens of g~ ||f||, the weights g~ renormalised over the selected slots."""
    return _per_token(s["renorm_weighted_norm_sum"], s["count"])


@SALIENCIES("reap-raw", paper="arXiv 2510.13999")
def reap_raw(s: Statistics) -> NDArray[np.float64]:
    """Mean over routed tokens of g ||f|| with the model's own routing weights."""
    return _per_token(s["weighted_norm_sum"], s["count"])


@SALIENCIES("frequency", paper="baseline in arXiv 2510.13999")
def frequency(s: Statistics) -> NDArray[np.float64]:
    """Tokens routed to the expert."""
    return s["count"].astype(np.float64)


@SALIENCIES("router-weight", paper="soft counting, arXiv 2404.05089")
def router_weight(s: Statistics) -> NDArray[np.float64]:
    """Sum of the routing weights."""
    return np.asarray(s["weight_sum"], dtype=np.float64)


@SALIENCIES("ean", paper="expert activation norm, baseline in arXiv 2510.13999")
def ean(s: Statistics) -> NDArray[np.float64]:
    """Sum of the output norms over routed tokens."""
    return np.asarray(s["norm_sum"], dtype=np.float64)


@SALIENCIES("ean-mean", paper="MAN, mean activation norm, arXiv 2606.15716")
def ean_mean(s: Statistics) -> NDArray[np.float64]:
    """Mean output norm over routed tokens."""
    return _per_token(s["norm_sum"], s["count"])


@SALIENCIES("msan", paper="mean squared activation norm, arXiv 2606.15716")
def msan(s: Statistics) -> NDArray[np.float64]:
    """Mean squared output norm over routed tokens."""
    return _per_token(s["norm_sq_sum"], s["count"])


@SALIENCIES("router-probability", paper="Expert Drop on Mixtral, arXiv 2406.02500")
def router_probability(s: Statistics) -> NDArray[np.float64]:
    """Mean over all tokens of the router's probability, whether it selects the expert or not."""
    return _per_token(s["prob_sum"], s["num_tokens"])


@SALIENCIES("easy-ep", paper="EASY-EP, arXiv 2504.06792")
def easy_ep(s: Statistics) -> NDArray[np.float64]:
    """Sum over routed tokens of g ||f|| times how far the routed experts turn the token."""
    return np.asarray(s["change_norm_sum"], dtype=np.float64)
