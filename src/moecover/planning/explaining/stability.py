"""Whether a plan would change: with more calibration text, or against another plan of the same model."""

from __future__ import annotations

import itertools
import statistics

from moecover.errors import InputError
from moecover.planning.artifact import Plan, kept_sets
from moecover.planning.explaining.channels import channel_changes
from moecover.planning.explaining.records import Changes, LayerChange, Point, Stability
from moecover.planning.methods import METHODS
from moecover.planning.run import plan_budgets
from moecover.profiling.artifact import Profile
from moecover.profiling.statistics import MAXIMA

CHANGE = 0.02  # share of the kept experts that may still change in a stable plan


def changed_share(one: Plan, two: Plan) -> float:
    """Share of the kept experts of ``one`` that ``two`` does not keep, mean over the layers."""
    return statistics.fmean(
        len(set(a.kept) - set(b.kept)) / len(a.kept) for a, b in zip(one.layers, two.layers, strict=True)
    )


def stability(plan: Plan, profile: Profile, *, change: float = CHANGE) -> Stability | None:
    """How the plan changes with the number of calibration tokens; None if that cannot be told.

    The plan is made again from the profile as it stood after each part of the text, with the same method and options.

    Args:
        plan: made from the profile.
        profile: with the running sums of its parts.
        change: share of the kept experts that may still change in a stable plan.
    """
    stages = profile.stages()
    method = METHODS[plan.method]
    if len(stages) < 2 or method.together or method.pairs or not method.from_profile:
        return None

    def again(stage: Profile) -> Plan:
        options = {k: v for k, v in plan.options.items() if k not in ("protect_channels", "channel_groups")}
        return plan_budgets(stage, method=plan.method, keeps=[plan.keep], **options)[0]

    curve: list[Point] = [
        {
            "tokens": sum(int(s["num_tokens"][0, 0]) for s in stage.statistics.values()),
            "changed": changed_share(plan, again(stage)),
        }
        for stage in stages
    ]
    middle = (len(stages) - 1) // 2
    half = stages[middle]
    rest = {
        corpus: {n: v if n in MAXIMA else v - half.statistics[corpus][n] for n, v in whole.items()}
        for corpus, whole in profile.statistics.items()
    }
    second = Profile(profile.topology, rest, profile.corpora, profile.model, profile.settings)
    settled = list(itertools.takewhile(lambda point: point["changed"] <= change, reversed(curve[:-1])))
    return {
        "change": change,
        "curve": curve,
        "halves": changed_share(again(half), again(second)),
        "half_tokens": curve[middle]["tokens"],
        "enough_tokens": settled[-1]["tokens"] if settled else None,
    }


def settled_text(stable: Stability) -> str:
    """How many tokens the plan needed, as far as the running sums of the profile tell."""
    curve, enough = stable["curve"], stable["enough_tokens"]
    still = f"{stable['change']:.0%} of the kept experts still change up to {curve[-1]['tokens']:,}"
    if enough is None:
        last = curve[-2]
        return (
            f"{curve[-1]['tokens']:,} tokens may not be enough: from {last['tokens']:,} to all of them, "
            f"{last['changed']:.1%} of the kept experts changed"
        )
    if enough == curve[0]["tokens"]:
        return f"at most {enough:,} tokens were needed, the first that were looked at: at most {still}"
    return f"{enough:,} tokens are enough: at most {still}"


def changes(plan: Plan, other: Plan) -> Changes:
    """What another plan keeps instead.

    Raises:
        InputError: they are plans of different models.
    """
    if [a.decoder_layer for a in plan.layers] != [b.decoder_layer for b in other.layers] or (
        None not in (plan.topology_fingerprint, other.topology_fingerprint)
        and plan.topology_fingerprint != other.topology_fingerprint
    ):
        raise InputError(
            f"the plans are of different models ({plan.model} and {other.model}), so they are not compared"
        )
    layers: list[LayerChange] = []
    for a, b in zip(plan.layers, other.layers, strict=True):
        mine, theirs = set(a.kept), set(b.kept)
        layers.append(
            {
                "decoder_layer": a.decoder_layer,
                "only_here": sorted(mine - theirs),
                "only_there": sorted(theirs - mine),
                "common": len(mine & theirs),
                "jaccard": len(mine & theirs) / len(mine | theirs),
            }
        )
    return {
        "method": other.method,
        "options": other.options,
        "keep": other.keep,
        "width": other.width,
        "same": kept_sets(plan) == kept_sets(other),
        "only_here": sum(len(row["only_here"]) for row in layers),
        "only_there": sum(len(row["only_there"]) for row in layers),
        "jaccard": statistics.fmean(row["jaccard"] for row in layers),
        "channels": channel_changes(plan, other),
        "layers": layers,
    }
