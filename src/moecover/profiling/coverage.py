"""Experts that the calibration text hardly used: reads a profile, gives their ids and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moecover.errors import flag

if TYPE_CHECKING:
    from moecover.profiling.artifact import Profile

FEW = 100  # tokens of an expert below which its statistics are called thin


def unused_experts(profile: Profile) -> list[list[int]]:
    """By MoE layer, ids of the experts that the router selected for no token of any corpus."""
    return [np.flatnonzero(row == 0).tolist() for row in profile.pooled()["count"]]


def rarely_used(profile: Profile) -> list[str]:
    """How many experts were selected for no token of any corpus, and how many for fewer than `FEW`, in words."""
    count, experts = profile.pooled()["count"], profile.topology.num_experts
    tokens = sum(int(s["num_tokens"].max(initial=0)) for s in profile.statistics.values())
    facts = []
    if (count == 0).any():
        facts.append(f"{share_text(unused_experts(profile), experts)} were never selected in its {tokens:,} tokens")
    if ((count > 0) & (count < FEW)).any():
        few = [np.flatnonzero((row > 0) & (row < FEW)).tolist() for row in count]
        facts.append(f"{share_text(few, experts)} were selected for fewer than {FEW} tokens")
    return facts


def more_text(profile: Profile) -> str:
    """How to calibrate on more: the flag, with a number, where a corpus has more blocks than were taken."""
    records = [record for found in profile.corpora.values() for record in found]
    more = [r for r in records if r.get("blocks_available", 0) > r.get("sequences", 0)]
    if not more:
        return f"All text of the corpora was read: give more of them, or longer ones ({flag('corpora')})"
    most = max(record["sequences"] for record in more)
    return f"Calibrate on more: {flag('sequences')} {2 * most}"


def coverage_line(profile: Profile) -> str:
    """What a profile alone says of text that is too little, and what to do; empty where it says nothing."""
    facts = rarely_used(profile)
    return f"note: calibration text is thin: {'; '.join(facts)}. {more_text(profile)}" if facts else ""


def share_text(layers: Sequence[Sequence[int]], experts: int) -> str:
    """So many experts of all, and from which to which share of a layer."""
    shares = sorted(len(row) / experts for row in layers)
    span = f"{shares[0]:.0%}" + (f" to {shares[-1]:.0%}" if shares[-1] > shares[0] else "")
    return f"{sum(map(len, layers)):,} of {experts * len(layers):,} experts ({span} of a layer)"
