"""Stage 3b, plan: reads a profile, writes which experts of every layer are kept, and why.

Pure arithmetic on the profile: no model and no forward pass, so one profile serves every method and every budget.
A new method is one decorated function from a profile, a count and options to a choice per layer. The same profile and
options give the same bytes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.errors import InputError
from moecover.plans import LayerPlan, Plan, resolve_keep
from moecover.profiles import Profile
from moecover.registry import Registry
from moecover.saliency import SALIENCIES

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEFAULT_METHOD, DEFAULT_SALIENCY, DEFAULT_PROTECT = "tb-coverage", "contribution", 0.5


Method = Callable[..., list[LayerPlan]]
METHODS: Registry[Callable[..., Any]] = Registry("method")


def ranked(utility: NDArray[Any]) -> NDArray[np.int64]:
    """Expert ids from the highest utility to the lowest, ties by the lower id; ``utility`` is ``[..., expert]``."""
    return np.argsort(-utility, axis=-1, kind="stable")


def _saliency_lists(saliency: Mapping[str, NDArray[Any]], layer: int) -> dict[str, list[float]]:
    return {corpus: values[layer].tolist() for corpus, values in saliency.items()}


def cover(utility: NDArray[np.float64], keep: int, protect: float) -> tuple[list[list[int]], list[int]]:
    """TB-Coverage in one layer.

    Every corpus's utilities are scaled to sum 1. Corpora take turns, in their order, each protecting its best expert
    that is not protected yet, until ``round(protect * keep)`` are; the rest is filled by the mean scaled utility.
    Ties go to the lower id. With C corpora each one's ``floor(P / C)`` best experts are kept.

    Args:
        utility: non-negative, ``[corpus, expert]``.
        keep: experts to keep.
        protect: share of ``keep`` that is protected, in [0, 1].

    Returns:
        The protected experts by corpus, in the order of the turns, and the filled ones, best first.
    """
    totals = utility.sum(axis=1, keepdims=True)
    scaled = np.divide(utility, totals, out=np.zeros_like(utility), where=totals > 0)
    orders = [iter(order.tolist()) for order in ranked(scaled)]
    protected: list[list[int]] = [[] for _ in orders]
    chosen: set[int] = set()
    turns = int(protect * keep + 0.5)
    for turn in range(turns):
        corpus = turn % len(orders)
        expert = next(e for e in orders[corpus] if e not in chosen)
        protected[corpus].append(expert)
        chosen.add(expert)
    rest = [e for e in ranked(scaled.mean(axis=0)).tolist() if e not in chosen]
    return protected, rest[: keep - turns]


@METHODS("tb-coverage", paper="arXiv 2607.01710")
def tb_coverage(
    profile: Profile, keep: int, *, saliency: str = DEFAULT_SALIENCY, protect: float = DEFAULT_PROTECT
) -> list[LayerPlan]:
    """Corpora take turns protecting their best experts, the mean utility fills the rest.

    Args:
        profile: statistics of every corpus.
        keep: experts to keep per layer.
        saliency: name in `SALIENCIES`, computed on every corpus by itself.
        protect: share of ``keep`` that is protected, in [0, 1].
    """
    utility = {corpus: SALIENCIES[saliency](s) for corpus, s in profile.statistics.items()}
    plans = []
    for layer, decoder_layer in enumerate(profile.topology.decoder_layers):
        protected, filled = cover(np.stack([u[layer] for u in utility.values()]), keep, protect)
        plans.append(
            LayerPlan(
                decoder_layer=decoder_layer,
                kept=sorted([*(e for row in protected for e in row), *filled]),
                protected=dict(zip(utility, protected, strict=True)),
                filled=filled,
                saliency=_saliency_lists(utility, layer),
            )
        )
    return plans


@METHODS("pooled", paper="arXiv 2510.13999 with --saliency reap")
def pooled(profile: Profile, keep: int, *, saliency: str = DEFAULT_SALIENCY) -> list[LayerPlan]:
    """The best of one saliency over all corpora taken as one text."""
    utility = {"pooled": SALIENCIES[saliency](profile.pooled())}
    best = ranked(utility["pooled"])[:, :keep].tolist()
    return [
        LayerPlan(decoder_layer=d, kept=sorted(best[i]), filled=best[i], saliency=_saliency_lists(utility, i))
        for i, d in enumerate(profile.topology.decoder_layers)
    ]


@METHODS("random", paper="baseline")
def random(profile: Profile, keep: int, *, seed: int = 0) -> list[LayerPlan]:
    """A seeded choice, other in every layer."""
    rng = np.random.default_rng(seed)
    return [
        LayerPlan(decoder_layer=d, kept=sorted(kept), filled=kept)
        for d in profile.topology.decoder_layers
        for kept in [rng.permutation(profile.topology.num_experts)[:keep].tolist()]
    ]


def check_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options with its defaults filled in.

    Raises:
        InputError: unknown method or saliency, an option that the method does not have, or one out of range.
    """
    parameters = inspect.signature(METHODS[method]).parameters
    known = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    if unknown := [name for name in options if name not in known]:
        raise InputError(f"--{unknown[0]} is no option of method {method}. It has: {', '.join(f'--{k}' for k in known) or 'none'}")  # fmt: skip
    complete = {**known, **options}
    if "saliency" in complete:
        SALIENCIES[complete["saliency"]]
    if "protect" in complete and not 0 <= complete["protect"] <= 1:
        raise InputError(f"--protect {complete['protect']} is out of range: a share of the kept experts, from 0 to 1")
    return complete


def plan(
    profile: Profile,
    *,
    method: str = DEFAULT_METHOD,
    keep: int | None = None,
    retain: float | None = None,
    **options: Any,
) -> Plan:
    """A plan from a profile.

    Args:
        profile: from `profile` or `Profile.load`.
        method: name in `METHODS`.
        keep: experts to keep per layer; give this or ``retain``.
        retain: fraction to keep, in (0, 1].
        **options: options of the method (``saliency``, ``protect``, ``seed``); the defaults are filled in.

    Raises:
        InputError: unknown method or saliency, an option that the method does not have, or a budget out of range.
    """
    complete = check_options(method, options)
    count = resolve_keep(profile.topology, keep=keep, retain=retain)
    return Plan(
        schema=1,
        method=method,
        options=complete,
        keep=count,
        layers=METHODS[method](profile, count, **complete),
        topology_fingerprint=profile.topology.fingerprint,
        model_fingerprint=profile.model["fingerprint"],
        profile_fingerprint=profile.fingerprint,
        model=profile.model["name"],
    )
