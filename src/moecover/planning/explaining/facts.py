"""Why a plan keeps what it keeps: reads a plan and its profile, gives facts by layer and over all, and their text.

Utilities are a saliency of every corpus by itself, scaled to sum 1 in the layer. All facts are JSON-ready.
"""

from __future__ import annotations

import io
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.errors import InputError
from moecover.planning.artifact import LayerPlan, Plan
from moecover.planning.methods import METHODS
from moecover.planning.run import plan_budgets
from moecover.planning.saliency import DEFAULT_SALIENCY, SALIENCIES, utility_of
from moecover.planning.selection import ranked, scaled
from moecover.planning.super_experts import super_experts
from moecover.profiling.artifact import MAXIMA, Profile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Utility = dict[str, NDArray[np.float64]]

CHANGE = 0.02  # share of the kept experts that may still change in a stable plan
MOST_PAIRS = 10  # of corpora, that have a line each; more are a matrix


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
    if not all(rows) or any("pooled" in row for row in rows):
        raise InputError(f"the plan ({plan.method}) holds no utilities by corpus. Give its profile: --profile PROFILE_DIR")  # fmt: skip
    if saliency is not None and saliency != plan.options.get("saliency"):
        raise InputError(f"the plan holds utilities by {plan.options.get('saliency')}. For {saliency} give its profile: --profile PROFILE_DIR")  # fmt: skip
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


def explain_layer(layer: LayerPlan, utility: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
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
            f"{a} | {b}": {"jaccard": len(best[a] & best[b]) / len(best[a] | best[b]), **correlations(utility[a], utility[b])}
            for a, b in itertools.combinations(utility, 2)
        },
        "search": layer.search,
        "loss": layer.loss,
    }  # fmt: skip


def changed_share(one: Plan, two: Plan) -> float:
    """Share of the kept experts of ``one`` that ``two`` does not keep, mean over the layers."""
    return statistics.fmean(
        len(set(a.kept) - set(b.kept)) / len(a.kept) for a, b in zip(one.layers, two.layers, strict=True)
    )


def stability(plan: Plan, profile: Profile, *, change: float = CHANGE) -> dict[str, Any] | None:
    """How the plan changes with the number of calibration tokens; None where that cannot be told.

    The plan is made again from the profile as it stood after each part of the text, with the same method and options.

    Returns:
        ``curve``: tokens and share of the kept experts that the whole text would still exchange; ``halves``: that share
        between the plans of the first and of the second half of the text; ``enough_tokens``: from where on the curve stays
        at or below ``change``, None if it does not before the last part.
    """
    stages = profile.stages()
    if len(stages) < 2 or METHODS[plan.method].together:
        return None

    def again(stage: Profile) -> Plan:
        return plan_budgets(stage, method=plan.method, keeps=[plan.keep], **plan.options)[0]

    curve: list[dict[str, Any]] = [
        {"tokens": sum(int(s["num_tokens"][0, 0]) for s in stage.statistics.values()), "changed": changed_share(plan, again(stage))}
        for stage in stages
    ]  # fmt: skip
    half = stages[(len(stages) - 1) // 2]
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
        "half_tokens": curve[(len(stages) - 1) // 2]["tokens"],
        "enough_tokens": settled[-1]["tokens"] if settled else None,
    }


def changes(plan: Plan, other: Plan) -> dict[str, Any]:
    """What another plan keeps instead.

    Raises:
        InputError: they are plans of different models.
    """
    if [a.decoder_layer for a in plan.layers] != [b.decoder_layer for b in other.layers] or (
        None not in (plan.topology_fingerprint, other.topology_fingerprint)
        and plan.topology_fingerprint != other.topology_fingerprint
    ):
        raise InputError(f"the plans are of different models ({plan.model} and {other.model}), so they are not compared")  # fmt: skip
    layers: list[dict[str, Any]] = []
    for a, b in zip(plan.layers, other.layers, strict=True):
        mine, theirs = set(a.kept), set(b.kept)
        layers.append({
            "decoder_layer": a.decoder_layer, "only_here": sorted(mine - theirs), "only_there": sorted(theirs - mine),
            "common": len(mine & theirs), "jaccard": len(mine & theirs) / len(mine | theirs),
        })  # fmt: skip
    return {
        "method": other.method,
        "options": other.options,
        "keep": other.keep,
        "same": all(not row["only_here"] and not row["only_there"] for row in layers),
        "only_here": sum(len(row["only_here"]) for row in layers),
        "only_there": sum(len(row["only_there"]) for row in layers),
        "jaccard": statistics.fmean(row["jaccard"] for row in layers),
        "layers": layers,
    }


def explain(
    plan: Plan,
    *,
    profile: Profile | None = None,
    against: Plan | None = None,
    saliency: str | None = None,
    change: float = CHANGE,
) -> dict[str, Any]:
    """Facts about a plan, JSON-ready.

    Args:
        plan: to be explained.
        profile: that it was made from, or another one of the same model (then without stability).
        against: another plan of the same model, to compare with.
        saliency: what utility means; default the plan's own.
        change: share of the kept experts that may still change in a stable plan.

    Returns:
        ``method``, ``options``, ``keep``, ``experts``, ``saliency``, ``corpora``; ``utility`` by corpus ``[layer][expert]``;
        ``overall``; ``layers`` (see `explain_layer`); with a profile ``never_routed``, ``super_experts`` and ``stability``;
        with another plan ``changes``.

    Raises:
        InputError: no utilities by corpus, or plan, profile and other plan are of different models.
    """
    name, utility = utility_by_corpus(plan, profile, saliency)
    experts = next(iter(utility.values())).shape[1]
    if any(layer.kept[-1] >= experts for layer in plan.layers):
        raise InputError(f"the plan keeps experts above the {experts - 1} of the profile: they do not belong together")
    layers = [explain_layer(row, {c: u[i] for c, u in utility.items()}) for i, row in enumerate(plan.layers)]
    overall: dict[str, Any] = {
        "kept_utility": {c: statistics.fmean(row["kept_utility"][c] for row in layers) for c in utility},
        "least_kept_utility": {c: min(row["kept_utility"][c] for row in layers) for c in utility},
        "covered_rank": {c: min(row["covered_rank"][c] for row in layers) for c in utility},
        "guarantee": min(row["guarantee"] for row in layers),
        "wanted_by_one": {c: sum(len(row["wanted_by_one"].get(c, ())) for row in layers) for c in utility},
        "wanted_by_one_kept": {
            c: sum(len(set(row["wanted_by_one"].get(c, ())) & set(row["kept"])) for row in layers) for c in utility
        },
    }
    overall["worst_corpus"] = min(overall["kept_utility"], key=lambda c: overall["kept_utility"][c])
    overall["agreement"] = {
        pair: {k: _mean([row["agreement"][pair][k] for row in layers]) for k in ("jaccard", "spearman", "kendall")}
        for pair in layers[0]["agreement"]
    }
    facts: dict[str, Any] = {
        "method": plan.method,
        "options": plan.options,
        "model": plan.model,
        "keep": plan.keep,
        "experts": experts,
        "saliency": name,
        "corpora": list(utility),
        "own_profile": profile is not None and plan.profile_fingerprint == profile.fingerprint,
        "overall": overall,
        "layers": layers,
        "utility": {c: u.tolist() for c, u in utility.items()},
    }
    if profile is not None:
        count = np.sum([s["count"] for s in profile.statistics.values()], axis=0)
        for row, counts, extreme in zip(layers, count, super_experts(profile), strict=True):
            row["never_routed"] = np.flatnonzero(counts == 0).tolist()
            row["super_experts"] = sorted(extreme)
        overall["never_routed"] = sum(len(row["never_routed"]) for row in layers)
        overall["never_routed_kept"] = sum(len(set(row["never_routed"]) & set(row["kept"])) for row in layers)
        overall["super_experts"] = sum(len(row["super_experts"]) for row in layers)
        overall["super_experts_dropped"] = sum(len(set(row["super_experts"]) - set(row["kept"])) for row in layers)
        if facts["own_profile"]:
            facts["stability"] = stability(plan, profile, change=change)
    if against is not None:
        facts["changes"] = changes(plan, against)
    return facts


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


# ---------------------------------------------------------------------------------------------------------------- text
def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        drawn.add_column(heading, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=160).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def pair_of(facts: Mapping[str, Any], one: str, two: str) -> str:
    """The key of two corpora in ``agreement``."""
    first, second = sorted((one, two), key=facts["corpora"].index)
    return f"{first} | {second}"


def _span(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def text_of(facts: Mapping[str, Any], *, layers: bool = False) -> str:
    """The facts in words and tables; ``layers`` adds a line for every layer."""
    overall, rows, corpora = facts["overall"], facts["layers"], facts["corpora"]
    options = ", ".join(f"{k} {v}" for k, v in facts["options"].items())
    parts = [f"{facts['method']}{f' ({options})' if options else ''} keeps {facts['keep']} of {facts['experts']} experts in {len(rows)} layers of {facts['model'] or 'a model'}."]  # fmt: skip
    table = []
    for c in corpora:
        protected = [len(row["protected"].get(c, ())) for row in rows]
        wanted = f"{overall['wanted_by_one_kept'][c]} of {overall['wanted_by_one'][c]}" if len(corpora) > 1 else "-"
        table.append([c, f"{overall['kept_utility'][c]:.1%}", f"{overall['least_kept_utility'][c]:.1%}", str(overall["covered_rank"][c]), _span(protected), wanted])  # fmt: skip
    parts.append(_table(["corpus", "utility kept", "least in a layer", "best experts all kept", "protected a layer", "wanted by it alone, kept"], table))  # fmt: skip
    worst = overall["worst_corpus"]
    parts.append(f"Utility is {facts['saliency']}, scaled to sum 1 in every layer and corpus. Worst served: {worst}, {overall['kept_utility'][worst]:.1%}.")  # fmt: skip
    best = overall["guarantee"]
    holds = f"every corpus keeps its best {best} experts" if best > 1 else "every corpus keeps its best expert" if best else "nothing: somewhere a corpus loses its best expert"  # fmt: skip
    parts.append(f"Guarantee in every layer: {holds}. Places filled by the method's own order, a layer: {_span([len(row['filled']) for row in rows])}.")  # fmt: skip
    if len(overall["agreement"]) > MOST_PAIRS:
        overlap = {pair: v["jaccard"] for pair, v in overall["agreement"].items()}
        table = [[c, *("" if c == other else _number(overlap[pair_of(facts, c, other)]) for other in corpora)] for c in corpora]  # fmt: skip
        parts.append(f"Overlap of the best {facts['keep']} experts of two corpora, mean over layers:\n{_table(['', *corpora], table)}")  # fmt: skip
    elif overall["agreement"]:
        table = [
            [pair.replace(" | ", " and "), _number(v["jaccard"]), _number(v["spearman"]), _number(v["kendall"])]
            for pair, v in overall["agreement"].items()
        ]
        parts.append(_table(["corpora, mean over layers", f"overlap of the best {facts['keep']}", "Spearman", "Kendall"], table))  # fmt: skip
    if "never_routed" in overall:
        parts.append(f"Never routed by any corpus: {overall['never_routed']} experts, {overall['never_routed_kept']} of them kept. Super experts: {overall['super_experts']}, {overall['super_experts_dropped']} of them dropped.")  # fmt: skip
    if any(row["loss"] is not None for row in rows):
        ways = " and ".join(sorted({row["search"] for row in rows if row["search"]}))
        parts.append(f"Reconstruction loss {sum(row['loss'] or 0 for row in rows):.4g} over the layers, {ways} search.")
    if (stable := facts.get("stability")) is not None:
        parts.append(_stability_text(stable))
    if "changes" in facts:
        parts.append(_changes_text(facts["changes"], facts))
    if layers:
        table = []
        for row in rows:
            pairs = [v["jaccard"] for v in row["agreement"].values()]
            table.append([str(row["decoder_layer"]), *(f"{row['kept_utility'][c]:.1%}" for c in corpora), row["worst_corpus"], str(row["guarantee"]), _number(min(pairs)) if pairs else "-", str(len(row.get("never_routed", [])))])  # fmt: skip
        parts.append(_table(["decoder layer", *corpora, "worst served", "guarantee", "least overlap", "never routed"], table))  # fmt: skip
    return "\n\n".join(parts)


def _stability_text(stable: Mapping[str, Any]) -> str:
    curve = stable["curve"]
    whole = curve[-1]["tokens"]
    points = ", ".join(f"{point['tokens']:,}: {point['changed']:.1%}" for point in curve[:-1])
    if stable["enough_tokens"] is not None:
        verdict = f"{stable['enough_tokens']:,} tokens are enough: at most {stable['change']:.0%} of the kept experts still change up to {whole:,}."  # fmt: skip
    else:
        verdict = f"{whole:,} tokens may not be enough: from {curve[-2]['tokens']:,} to all of them, {curve[-2]['changed']:.1%} of the kept experts changed. Calibrate on more."  # fmt: skip
    return f"Stability: {verdict}\nKept experts that the whole text exchanges, by tokens seen: {points}. Plans of the two halves of the text differ in {stable['halves']:.1%}."  # fmt: skip


def _changes_text(change: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    options = ", ".join(f"{k} {v}" for k, v in change["options"].items())
    name = f"{change['method']}{f' ({options})' if options else ''}, keep {change['keep']}"
    if change["same"]:
        return f"Against {name}: the same experts."
    most = max(change["layers"], key=lambda row: len(row["only_here"]) + len(row["only_there"]))
    return f"Against {name}: {change['only_here']} of {facts['keep'] * len(change['layers'])} kept experts are only here, {change['only_there']} only there; overlap {change['jaccard']:.2f}, least in decoder layer {most['decoder_layer']} ({most['jaccard']:.2f})."  # fmt: skip
