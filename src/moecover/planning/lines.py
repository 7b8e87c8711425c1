"""A plan, and whether its calibration text is enough, each in one line: reads a plan and its profile, gives text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from moecover.planning.explaining.stability import settled_text, stability
from moecover.planning.keep import allowed_keeps
from moecover.planning.methods import METHODS, default_method
from moecover.planning.run import plan_budgets
from moecover.planning.saliency import DEFAULT_SALIENCY
from moecover.profiling.coverage import more_text, rarely_used, share_text

if TYPE_CHECKING:
    from moecover.planning.artifact import Plan
    from moecover.planning.explaining.records import Stability
    from moecover.profiling.artifact import Profile

MOST_CORPORA = 6  # that have a share each in a line


def calibration_notes(plan: Plan, profile: Profile, *, remedy: str | None = None) -> list[str]:
    """What a user should know of the calibration of a plan: unused weights, and text that is thin; a line for each.

    Args:
        plan: made from the profile.
        profile: with the running sums of its parts.
        remedy: where text is thin; None for the options of `profile`.
    """
    return [line for line in (_weights_line(plan, profile), thin_line(plan, profile, remedy=remedy)) if line]


def _weights_line(plan: Plan, profile: Profile) -> str:
    """See `unused_weights`, of the corpora of a profile."""
    weights = {name: records[0].get("weight", 1) for name, records in profile.corpora.items()}
    return unused_weights(weights, [plan.method])


def unused_weights(weights: Mapping[str, int], methods: Sequence[str]) -> str:
    """That methods have no use for the weights of a mix; empty where all have, or no corpus has another weight than 1.

    Args:
        weights: by corpus.
        methods: names in `METHODS`.
    """
    weighted = [name for name, weight in weights.items() if weight != 1]
    equal = [name for name in methods if not METHODS[name].has("weights")]
    if not weighted or not equal:
        return ""
    rate = f"method {equal[0]} rates" if len(equal) == 1 else f"methods {', '.join(equal)} rate"
    return f"note: the weights of the mix ({', '.join(weighted)}) are not used: {rate} every corpus alike"


def thin_line(plan: Plan, profile: Profile, *, remedy: str | None = None) -> str:
    """What says that the calibration text of a plan is thin, and what to do; empty where nothing does.

    It is thin if experts were selected for none or few of its tokens, or if the last part of it still changed the plan.

    Args:
        plan: made from the profile.
        profile: with the running sums of its parts.
        remedy: what to do; None for the options of `profile`.
    """
    if METHODS[plan.method].blind:
        return ""
    settled = stability(plan, profile)
    facts = rarely_used(profile)
    if not facts and (settled is None or settled["enough_tokens"] is not None):
        return ""
    facts += [] if settled is None else [settled_text(settled)]
    return f"note: calibration text is thin: {'; '.join(facts)}. {remedy or more_text(profile)}"


def stability_at_half(profile: Profile) -> Stability | None:
    """How a plan of the default method for half of the experts changes with the text; None if that cannot be told."""
    experts = profile.topology.num_experts
    keep = min(allowed_keeps(profile.topology), key=lambda count: abs(count - experts / 2))
    (half,) = plan_budgets(profile, method=default_method().name, keeps=[keep])
    return stability(half, profile)


def unused_line(plan: Plan, experts: int) -> str:
    """How many experts the calibration text of a plan never used, and how many of these stay; empty where none."""
    layers = [row.unused for row in plan.layers]
    if not any(layers):
        return ""
    kept = sum(len(set(row.unused) & set(row.kept)) for row in plan.layers)
    return f"note: {share_text(layers, experts)} were never selected in the calibration text; {kept} of them stay"


def _protecting(plan: Plan) -> list[str]:
    """The corpora that protect experts in some layer."""
    return list(dict.fromkeys(name for row in plan.layers for name in row.protected))


def plan_line(plan: Plan, experts: int) -> str:
    """A plan in one line: method, budget, who protected how many, what a search cost."""
    thin = "" if plan.width is None else f", {plan.width} channels of each,"
    counts = sorted(map(len, plan.kept))
    mean = f" on average ({counts[0]} to {counts[-1]}; for evaluation only)" if plan.unequal else ""
    text = f"{plan.method} keeps {plan.keep} of {experts} experts{mean}{thin} in {len(plan.layers)} layers"
    if any(layer.protected for layer in plan.layers):
        by_corpus = {
            name: sorted(len(row.protected.get(name, ())) for row in plan.layers) for name in _protecting(plan)
        }
        spans = (f"{n[0]}{f' to {n[-1]}' if n[-1] > n[0] else ''} by {name}" for name, n in by_corpus.items())
        text += f"; protected per layer: {', '.join(spans)}"
    if plan.mtp:
        text += f"; in {len(plan.mtp)} of multi-token prediction by their own statistics"
    if required := sum(len(layer.required) for layer in plan.layers):
        text += f"; {required} super experts kept"
    if losses := [layer.loss for layer in plan.layers if layer.loss is not None]:
        searches = " and ".join(sorted({str(layer.search) for layer in plan.layers}))
        text += f"; {searches} search on {plan.layers[0].tokens:,} tokens, loss {sum(losses):.4g}"
    return text


def kept_line(plan: Plan) -> str:
    """What share of each corpus's utility the kept experts have, mean over the layers.

    Of many corpora the least and the most are named. Empty where the plan does not hold utilities by corpus.
    """
    if not plan.by_corpus:
        return ""
    corpora = list(plan.layers[0].saliency)
    shares = {name: fmean(_share(layer.saliency[name], layer.kept) for layer in plan.layers) for name in corpora}
    told = [f"{name} {share:.1%}" for name, share in sorted(shares.items(), key=lambda one: one[1])]
    if len(told) > MOST_CORPORA:
        told = [f"{told[0]} (the least)", f"{told[-1]} (the most)", f"mean of {len(told)} {fmean(shares.values()):.1%}"]
    saliency = plan.options.get("saliency", DEFAULT_SALIENCY)
    return f"kept of each corpus's utility ({saliency}): {', '.join(told)}"


def _share(saliency: Sequence[float], kept: Sequence[int]) -> float:
    """The share of a layer's utility that some experts have; all of it where there is none."""
    utility = np.maximum(np.asarray(saliency, dtype=np.float64), 0)
    return float(utility[list(kept)].sum() / utility.sum()) if utility.any() else 1.0
