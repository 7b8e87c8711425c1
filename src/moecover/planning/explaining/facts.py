"""Why a plan keeps what it keeps: reads a plan and its profile, gives facts by layer and over all layers.

Utilities are a saliency of each corpus, scaled to sum 1 in the layer. All facts are JSON-ready.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.errors import InputError, arg
from moecover.planning.artifact import LayerPlan, Plan
from moecover.planning.explaining.channels import channel_facts
from moecover.planning.explaining.records import Agreement, LayerFacts, MtpFacts, Overall
from moecover.planning.explaining.stability import CHANGE, changes, stability
from moecover.planning.explaining.text import text_of
from moecover.planning.saliency import DEFAULT_SALIENCY, SALIENCIES, utility_of
from moecover.planning.selection import ranked, scaled
from moecover.planning.shapes import shape_name
from moecover.planning.super_experts import super_experts
from moecover.profiling.artifact import Profile
from moecover.text import Cell, Shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Utility = dict[str, NDArray[np.float64]]


class Explanation(Shown, dict[str, Any]):
    """The facts of a plan by key, see `explain`."""

    def summary(self) -> str:
        """The plan, and how much of its utility each corpus keeps."""
        overall: Overall = self["overall"]
        kept = ", ".join(f"{corpus} {share:.1%}" for corpus, share in overall["kept_utility"].items())
        shape = shape_name(self["keep"], self["channels"]["width"] if "channels" in self else None)
        return f"{self['method']}, keep {shape} of {self['experts']}: utility kept {kept}"

    def rows_shown(self) -> list[dict[str, Cell]]:
        """One row per MoE layer: the utility that each corpus keeps, the worst served corpus, the guarantee."""
        layers: list[LayerFacts] = self["layers"]
        return [
            {
                "decoder layer": row["decoder_layer"],
                **row["kept_utility"],
                "worst served": row["worst_corpus"],
                "guarantee": row["guarantee"],
            }
            for row in layers
        ]

    def text(self, *, layers: bool = False) -> str:
        """The facts in words and tables; ``layers`` adds a line for every layer."""
        return text_of(self, layers=layers)


def utility_by_corpus(plan: Plan, profile: Profile | None, saliency: str | None) -> tuple[str, Utility]:
    """Name of the saliency, and its values by corpus, each ``[layer, expert]``, scaled to sum 1 in the layer.

    Raises:
        InputError: the plan holds none and there is no profile, or the profile is of another model.
    """
    name = saliency or plan.options.get("saliency", DEFAULT_SALIENCY)
    if profile is not None:
        SALIENCIES[name]
        layers = tuple(layer.decoder_layer for layer in plan.layers)
        if layers != profile.topology.decoder_layers or plan.topology_fingerprint not in (
            None,
            profile.topology.fingerprint,
        ):
            raise InputError(f"the profile is of another model ({profile.model['name']}) than the plan ({plan.model})")
        return name, {c: scaled(np.maximum(utility_of(name, s), 0)) for c, s in profile.statistics.items()}
    rows = [layer.saliency for layer in plan.layers]
    if not plan.by_corpus:
        raise InputError(
            f"the plan ({plan.method}) holds no utilities by corpus, so {arg('profile')} is needed: the profile that "
            "it was made from"
        )
    if saliency is not None and saliency != plan.options.get("saliency"):
        raise InputError(
            f"the plan holds utilities by {plan.options.get('saliency')}. For {saliency}, {arg('profile')} is needed: "
            "the profile that it was made from"
        )
    return name, {corpus: scaled(np.maximum(np.array([row[corpus] for row in rows]), 0)) for corpus in rows[0]}


def covered_rank(utility: NDArray[np.float64], kept: Sequence[int]) -> int:
    """How many of a corpus's best experts are kept without a gap; ``utility`` is ``[expert]``."""
    members = set(kept)
    return sum(1 for _ in itertools.takewhile(lambda e: e in members, ranked(utility).tolist()))


def correlations(one: NDArray[np.float64], two: NDArray[np.float64]) -> dict[str, float | None]:
    """Spearman's and Kendall's rank correlation of two utilities ``[expert]``; None where one is constant."""
    from scipy.stats import kendalltau, spearmanr

    if np.ptp(one) == 0 or np.ptp(two) == 0:
        return {"spearman": None, "kendall": None}
    return {"spearman": float(spearmanr(one, two).statistic), "kendall": float(kendalltau(one, two).statistic)}


def agreement(one: NDArray[np.float64], two: NDArray[np.float64], keep: int) -> Agreement:
    """How far two utilities ``[expert]`` want the same experts: overlap of the best ``keep``, rank correlations."""
    best, other = set(ranked(one)[:keep].tolist()), set(ranked(two)[:keep].tolist())
    found = correlations(one, two)
    return {
        "jaccard": len(best & other) / len(best | other),
        "spearman": found["spearman"],
        "kendall": found["kendall"],
    }


def explain_layer(layer: LayerPlan, utility: Mapping[str, NDArray[np.float64]]) -> LayerFacts:
    """Facts about one layer; ``utility`` is ``[expert]`` by corpus."""
    kept, keep = layer.kept, len(layer.kept)
    best = {corpus: set(ranked(u)[:keep].tolist()) for corpus, u in utility.items()}
    shares = {corpus: float(u[kept].sum()) if u.any() else 1.0 for corpus, u in utility.items()}
    wanted = {
        corpus: sorted(mine.difference(*(other for c, other in best.items() if c != corpus)))
        for corpus, mine in best.items()
    }
    ranks = {corpus: covered_rank(u, kept) for corpus, u in utility.items()}
    return {
        "decoder_layer": layer.decoder_layer,
        "kept": kept,
        "kept_utility": shares,
        "worst_corpus": min(shares, key=lambda c: shares[c]),
        "covered_rank": ranks,
        "guarantee": min(ranks.values()),
        "protected": layer.protected,
        "filled": layer.filled,
        "required": layer.required,
        "wanted_by_one": wanted if len(best) > 1 else {},
        "agreement": {
            f"{a} | {b}": agreement(utility[a], utility[b], keep) for a, b in itertools.combinations(utility, 2)
        },
        "search": layer.search,
        "loss": layer.loss,
    }


def over_layers(layers: Sequence[LayerFacts], corpora: Sequence[str]) -> Overall:
    """Facts over all layers, from those of each."""
    wanted = {c: [set(row["wanted_by_one"].get(c, ())) for row in layers] for c in corpora}
    shares = {c: [row["kept_utility"][c] for row in layers] for c in corpora}
    means = {c: statistics.fmean(values) for c, values in shares.items()}
    return {
        "kept_utility": means,
        "least_kept_utility": {c: min(values) for c, values in shares.items()},
        "covered_rank": {c: min(row["covered_rank"][c] for row in layers) for c in corpora},
        "guarantee": min(row["guarantee"] for row in layers),
        "wanted_by_one": {c: sum(map(len, sets)) for c, sets in wanted.items()},
        "wanted_by_one_kept": {
            c: sum(len(ids & set(row["kept"])) for ids, row in zip(sets, layers, strict=True))
            for c, sets in wanted.items()
        },
        "worst_corpus": min(means, key=lambda c: means[c]),
        "agreement": {
            pair: {
                "jaccard": statistics.fmean(row["agreement"][pair]["jaccard"] for row in layers),
                "spearman": _mean([row["agreement"][pair]["spearman"] for row in layers]),
                "kendall": _mean([row["agreement"][pair]["kendall"] for row in layers]),
            }
            for pair in layers[0]["agreement"]
        },
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def mtp_facts(plan: Plan, profile: Profile | None, saliency: str | None) -> list[MtpFacts]:
    """Facts about the multi-token-prediction layers that a plan has ids of their own for; none without statistics."""
    if not plan.mtp or (profile is not None and profile.mtp is None):
        return []
    own = plan.model_copy(update={"layers": plan.mtp, "topology_fingerprint": None})
    _, utility = utility_by_corpus(own, profile.mtp if profile is not None else None, saliency)
    last, found = set(plan.layers[-1].kept), list[MtpFacts]()
    for layer, row in enumerate(plan.mtp):
        facts = explain_layer(row, {c: u[layer] for c, u in utility.items()})
        found.append({**facts, "as_last": len(last & set(row.kept))})
    return found


def add_routing(layers: Sequence[LayerFacts], overall: Overall, profile: Profile) -> None:
    """Add what only a profile tells: experts that were never routed, and super experts."""
    count = np.sum([s["count"] for s in profile.statistics.values()], axis=0)
    for row, counts, extreme in zip(layers, count, super_experts(profile), strict=True):
        row["never_routed"] = np.flatnonzero(counts == 0).tolist()
        row["super_experts"] = sorted(extreme)
    overall["never_routed"] = sum(len(row["never_routed"]) for row in layers)
    overall["never_routed_kept"] = sum(len(set(row["never_routed"]) & set(row["kept"])) for row in layers)
    overall["super_experts"] = sum(len(row["super_experts"]) for row in layers)
    overall["super_experts_dropped"] = sum(len(set(row["super_experts"]) - set(row["kept"])) for row in layers)


def explain(
    plan: Plan | str | Path,
    *,
    profile: Profile | str | Path | None = None,
    against: Plan | str | Path | None = None,
    saliency: str | None = None,
    change: float | None = CHANGE,
) -> Explanation:
    """Facts about a plan, JSON-ready.

    Args:
        plan: to be explained, or its file.
        profile: that it was made from (or its folder), or another one of the same model (then without stability).
        against: another plan of the same model, to compare with.
        saliency: what utility means; the plan's own by default.
        change: share of the kept experts that may still change in a stable plan; None leaves stability out.

    Returns:
        ``method``, ``options``, ``keep``, ``experts``, ``saliency``, ``corpora``; ``utility`` by corpus
        ``[layer][expert]``; ``overall`` and ``layers`` (see `Overall` and `LayerFacts`); with thinner experts
        ``channels`` (see `ChannelFacts`), with ids for multi-token-prediction layers ``mtp`` (see `MtpFacts`), with the
        plan's own profile ``stability``, with another plan ``changes``.

    Raises:
        InputError: no utilities by corpus, or plan, profile and other plan are of different models.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    if isinstance(profile, (str, Path)):
        profile = Profile.load(Path(profile))
    if isinstance(against, (str, Path)):
        against = Plan.load(against)
    name, utility = utility_by_corpus(plan, profile, saliency)
    experts = next(iter(utility.values())).shape[1]
    if any(layer.kept[-1] >= experts for layer in plan.with_mtp.layers):
        raise InputError(f"the plan keeps experts above the {experts - 1} of the profile: they do not belong together")
    layers = [explain_layer(row, {c: u[i] for c, u in utility.items()}) for i, row in enumerate(plan.layers)]
    overall = over_layers(layers, list(utility))
    own = profile is not None and plan.profile_fingerprint == profile.fingerprint
    facts = Explanation(
        method=plan.method,
        options=plan.options,
        model=plan.model,
        keep=plan.keep,
        experts=experts,
        saliency=name,
        corpora=list(utility),
        own_profile=own,
        overall=overall,
        layers=layers,
        utility={c: u.tolist() for c, u in utility.items()},
    )
    if (thin := channel_facts(plan, profile)) is not None:
        facts["channels"] = thin
    if of_mtp := mtp_facts(plan, profile, saliency):
        facts["mtp"] = of_mtp
    if profile is not None:
        add_routing(layers, overall, profile)
        if own and change is not None:
            facts["stability"] = stability(plan, profile, change=change)
    if against is not None:
        facts["changes"] = changes(plan, against)
    return facts
