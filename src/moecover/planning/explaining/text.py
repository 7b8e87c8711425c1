"""An explanation in words and tables, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moecover.planning.explaining.records import Changes, ChannelFacts, LayerFacts, MtpFacts, Overall, Stability
from moecover.planning.explaining.stability import settled_text
from moecover.planning.shapes import shape_name
from moecover.terminal import aligned

MOST_PAIRS = 10  # of corpora, that have a line each; more are a matrix


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return aligned(headings, rows, left=1)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def pair_of(facts: Mapping[str, Any], one: str, two: str) -> str:
    """The key of two corpora in ``agreement``."""
    first, second = sorted((one, two), key=facts["corpora"].index)
    return f"{first} | {second}"


def _span(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _named(method: str, options: Mapping[str, object]) -> str:
    """A method with its options."""
    inside = ", ".join(f"{k} {v}" for k, v in options.items())
    return f"{method} ({inside})" if inside else method


def text_of(facts: Mapping[str, Any], *, layers: bool = False) -> str:
    """The facts of `explain` in words and tables.

    Args:
        facts: of the plan.
        layers: add a line for every layer.
    """
    overall: Overall = facts["overall"]
    rows: list[LayerFacts] = facts["layers"]
    corpora: list[str] = facts["corpora"]
    name, model = _named(facts["method"], facts["options"]), facts["model"] or "a model"
    thin: ChannelFacts | None = facts.get("channels")
    kept = f"{facts['keep']} of {facts['experts']} experts{_width_text(thin) if thin else ''}"
    parts = [f"{name} keeps {kept} in {len(rows)} layers of {model}."]
    parts += [_corpora_table(overall, rows, corpora), _utility_text(overall, facts["saliency"])]
    parts.append(_guarantee_text(overall["guarantee"], [len(row["filled"]) for row in rows]))
    parts += [_mtp_text(row, len(rows[-1]["kept"]), rows[-1]["decoder_layer"]) for row in facts.get("mtp", ())]
    parts += _channels_text(thin) if thin else []
    parts += _agreement_text(facts, overall, corpora)
    if "never_routed" in overall:
        parts.append(
            f"Never routed by any corpus: {overall['never_routed']} experts, {overall['never_routed_kept']} of them "
            f"kept. Super experts: {overall['super_experts']}, {overall['super_experts_dropped']} of them dropped."
        )
    if any(row["loss"] is not None for row in rows):
        ways = " and ".join(sorted({row["search"] for row in rows if row["search"]}))
        parts.append(f"Reconstruction loss {sum(row['loss'] or 0 for row in rows):.4g} over the layers, {ways} search.")
    if (stable := facts.get("stability")) is not None:
        parts.append(_stability_text(stable))
    if "changes" in facts:
        parts.append(_changes_text(facts["changes"], facts["keep"]))
    if layers:
        parts.append(_layers_table(rows, corpora))
        parts += _energy_table(thin, [row["decoder_layer"] for row in rows]) if thin else []
    return "\n\n".join(parts)


def _corpora_table(overall: Overall, rows: Sequence[LayerFacts], corpora: Sequence[str]) -> str:
    table = []
    for corpus in corpora:
        wanted = f"{overall['wanted_by_one_kept'][corpus]} of {overall['wanted_by_one'][corpus]}"
        table.append(
            [
                corpus,
                f"{overall['kept_utility'][corpus]:.1%}",
                f"{overall['least_kept_utility'][corpus]:.1%}",
                str(overall["covered_rank"][corpus]),
                _span([len(row["protected"].get(corpus, ())) for row in rows]),
                wanted if len(corpora) > 1 else "-",
            ]
        )
    headings = [
        "corpus",
        "utility kept",
        "least in a layer",
        "best experts all kept",
        "protected per layer",
        "wanted by it alone, kept",
    ]
    return _table(headings, table)


def _utility_text(overall: Overall, saliency: str) -> str:
    worst = overall["worst_corpus"]
    return (
        f"Utility is {saliency}, scaled to sum 1 in every layer and corpus. "
        f"Worst served: {worst}, {overall['kept_utility'][worst]:.1%}."
    )


def _mtp_text(row: MtpFacts, keep: int, last: int) -> str:
    """A multi-token-prediction layer, which the tables leave out."""
    kept = ", ".join(f"{corpus} {share:.1%}" for corpus, share in row["kept_utility"].items())
    return (
        f"Multi-token prediction, layer {row['decoder_layer']}, by its own statistics: utility kept {kept}; guarantee: "
        f"{_holds(row['guarantee'], 'its best expert')}. Of its {keep} ids decoder layer {last} keeps {row['as_last']}."
    )


def _holds(best: int, lost: str) -> str:
    """What a guarantee is, by how many of its best experts every corpus keeps."""
    if best > 1:
        return f"every corpus keeps its best {best} experts"
    return "every corpus keeps its best expert" if best else f"none, some corpus loses {lost}"


def _guarantee_text(best: int, filled: Sequence[int]) -> str:
    holds = _holds(best, "its best expert in some layer")
    return f"Guarantee in every layer: {holds}. Places filled by the method's own order, per layer: {_span(filled)}."


def _width_text(thin: ChannelFacts) -> str:
    """How wide the kept experts are."""
    before = "" if thin["channels"] is None else f" of {thin['channels']}"
    return f" and {thin['width']}{before} channels of each"


def _channels_text(thin: ChannelFacts) -> list[str]:
    """A table of the energy that stays, and what protected channels guarantee."""
    if thin["channels"] is None:
        return ["What the kept channels hold of each corpus is in the profile: give it to see."]
    table = [
        [
            corpus,
            f"{share:.1%}",
            f"{thin['least'][corpus]:.1%} in {thin['least_layer'][corpus]}",
            f"{thin['of_layer'][corpus]:.1%}",
            str(thin["best"][corpus]),
        ]
        for corpus, share in thin["of_experts"].items()
    ]
    headings = [
        "channel energy",
        "kept of the kept experts'",
        "least, in decoder layer",
        "kept of all experts'",
        "best channels all kept",
    ]
    if not thin["turns"]:
        return [_table(headings, table)]
    turns = ", ".join(f"the best {number} of {corpus}" for corpus, number in thin["turns"].items())
    return [
        _table(headings, table),
        f"Guarantee of protect_channels in every kept expert: of its channels by their energy, {turns} stay.",
    ]


def _energy_table(thin: ChannelFacts, decoder_layers: Sequence[int]) -> list[str]:
    """The share of the kept experts' energy that stays, a line for every layer."""
    if not thin["layers"]:
        return []
    corpora = list(thin["layers"][0]["of_experts"])
    rows = [
        [str(layer), *(f"{row['of_experts'][c]:.1%}" for c in corpora)]
        for layer, row in zip(decoder_layers, thin["layers"], strict=True)
    ]
    return [f"Channel energy kept of the kept experts':\n{_table(['decoder layer', *corpora], rows)}"]


def _agreement_text(facts: Mapping[str, Any], overall: Overall, corpora: Sequence[str]) -> list[str]:
    """A table of the pairs of corpora, a matrix if they are many, nothing for one corpus."""
    if len(overall["agreement"]) > MOST_PAIRS:
        overlap = {pair: v["jaccard"] for pair, v in overall["agreement"].items()}
        matrix = [
            [one, *("" if one == two else _number(overlap[pair_of(facts, one, two)]) for two in corpora)]
            for one in corpora
        ]
        title = f"Overlap of the best {facts['keep']} experts of two corpora, mean over layers:"
        return [f"{title}\n{_table(['', *corpora], matrix)}"]
    if not overall["agreement"]:
        return []
    table = [
        [pair.replace(" | ", " and "), _number(v["jaccard"]), _number(v["spearman"]), _number(v["kendall"])]
        for pair, v in overall["agreement"].items()
    ]
    headings = ["corpora, mean over layers", f"overlap of the best {facts['keep']}", "Spearman", "Kendall"]
    return [_table(headings, table)]


def _layers_table(rows: Sequence[LayerFacts], corpora: Sequence[str]) -> str:
    table = []
    for row in rows:
        pairs = [v["jaccard"] for v in row["agreement"].values()]
        table.append(
            [
                str(row["decoder_layer"]),
                *(f"{row['kept_utility'][c]:.1%}" for c in corpora),
                row["worst_corpus"],
                str(row["guarantee"]),
                _number(min(pairs)) if pairs else "-",
                str(len(row.get("never_routed", []))),
            ]
        )
    return _table(["decoder layer", *corpora, "worst served", "guarantee", "least overlap", "never routed"], table)


def _stability_text(stable: Stability) -> str:
    points = ", ".join(f"{point['tokens']:,}: {point['changed']:.1%}" for point in stable["curve"][:-1])
    more = ". Calibrate on more" if stable["enough_tokens"] is None else ""
    return (
        f"Stability: {settled_text(stable)}{more}.\nShare of kept experts that the whole text exchanges, by tokens "
        f"seen: {points}. Plans of the two halves of the text differ in {stable['halves']:.1%}."
    )


def _changes_text(change: Changes, keep: int) -> str:
    name = f"{_named(change['method'], change['options'])}, keep {shape_name(change['keep'], change['width'])}"
    thin = change["channels"]
    if change["same"]:
        return f"Against {name}: the same experts{' and channels' if thin else ''}."
    most = max(change["layers"], key=lambda row: len(row["only_here"]) + len(row["only_there"]))
    return (
        f"Against {name}: {change['only_here']} of {keep * len(change['layers'])} kept experts are only here, "
        f"{change['only_there']} only there; overlap {change['jaccard']:.2f}, least in decoder layer "
        f"{most['decoder_layer']} ({most['jaccard']:.2f}).{_channel_changes_text(change)}"
    )


def _channel_changes_text(change: Changes) -> str:
    """How the channels of experts that both plans keep differ; empty where either keeps all."""
    thin = change["channels"]
    if thin is None or thin["jaccard"] is None:
        return ""
    known = [
        (value, row["decoder_layer"])
        for value, row in zip(thin["layers"], change["layers"], strict=True)
        if value is not None
    ]
    least, layer = min(known)
    return (
        f" Channels of the experts that both keep: overlap {thin['jaccard']:.2f}, least in decoder layer {layer} "
        f"({least:.2f})."
    )
