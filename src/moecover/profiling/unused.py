"""Experts that the calibration text never used: reads a profile, gives their ids and a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from moecover.profiling.artifact import Profile


def unused_experts(profile: Profile) -> list[list[int]]:
    """By MoE layer, ids of the experts that the router selected for no token of any corpus."""
    return [np.flatnonzero(row == 0).tolist() for row in profile.pooled()["count"]]


def unused_text(profile: Profile) -> str:
    """How many experts were never used, as a line of log; empty where every one was."""
    layers, experts = unused_experts(profile), profile.topology.num_experts
    if not any(layers):
        return ""
    tokens = sum(int(s["num_tokens"].max(initial=0)) for s in profile.statistics.values())
    return (
        f"note: {share_text(layers, experts)} were never selected in the {tokens:,} tokens of calibration text: "
        "nothing is known of them"
    )


def share_text(layers: Sequence[Sequence[int]], experts: int) -> str:
    """So many experts of all, and from which to which share of a layer."""
    shares = sorted(len(row) / experts for row in layers)
    span = f"{shares[0]:.0%}" + (f" to {shares[-1]:.0%}" if shares[-1] > shares[0] else "")
    return f"{sum(map(len, layers)):,} of {experts * len(layers):,} experts ({span} of a layer)"
