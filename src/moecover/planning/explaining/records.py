"""What an explanation consists of: the records that `explain` puts together, JSON-ready."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Agreement(TypedDict):
    """How far two corpora want the same experts; a rank correlation is None where a corpus has no order."""

    jaccard: float
    spearman: float | None
    kendall: float | None


class LayerFacts(TypedDict):
    """One MoE layer; utilities are shares of the layer's sum, by corpus.

    Keys:
        kept_utility: share of the utility that the kept experts have.
        covered_rank: how many of a corpus's best experts are kept without a gap; ``guarantee`` is the least of them.
        protected, filled, required: as in the plan.
        wanted_by_one: experts among the best of this corpus alone.
        agreement: by pair of corpora, ``"a | b"``.
        search, loss: of a subset search.
        never_routed, super_experts: with a profile, ids of such experts.
    """

    decoder_layer: int
    kept: list[int]
    kept_utility: dict[str, float]
    worst_corpus: str
    covered_rank: dict[str, int]
    guarantee: int
    protected: dict[str, list[int]]
    filled: list[int]
    required: list[int]
    wanted_by_one: dict[str, list[int]]
    agreement: dict[str, Agreement]
    search: str | None
    loss: float | None
    never_routed: NotRequired[list[int]]
    super_experts: NotRequired[list[int]]


class MtpFacts(LayerFacts):
    """One multi-token-prediction layer; ``as_last`` is how many of its ids the last MoE layer keeps too."""

    as_last: int


class Overall(TypedDict):
    """All layers: means of shares and agreements, least values of ranks, sums of counts."""

    kept_utility: dict[str, float]
    least_kept_utility: dict[str, float]
    covered_rank: dict[str, int]
    guarantee: int
    wanted_by_one: dict[str, int]
    wanted_by_one_kept: dict[str, int]
    worst_corpus: str
    agreement: dict[str, Agreement]
    never_routed: NotRequired[int]
    never_routed_kept: NotRequired[int]
    super_experts: NotRequired[int]
    super_experts_dropped: NotRequired[int]


class LayerEnergy(TypedDict):
    """One MoE layer of thinner experts, by corpus; see `ChannelFacts`."""

    of_experts: dict[str, float]
    of_layer: dict[str, float]
    best: dict[str, int]


class ChannelFacts(TypedDict):
    """What thinner experts keep: shares of the channels' energy, by corpus.

    Keys:
        width, channels: channels that stay of an expert, and how many it had; the latter None without their energies,
            and then the keys from ``of_experts`` on are missing.
        turns: with ``protect_channels``, how many turns a corpus had in every expert: as many of its best channels stay
        layers: the shares and numbers of every layer.
        of_experts: share of the kept experts' energy that stays, mean over layers; ``least`` is that of the layer with
            the least, ``least_layer`` its decoder layer.
        of_layer: share of the energy of all experts of the layer that stays, mean over layers.
        best: how many of an expert's channels of highest energy are kept without a gap, the least over all experts.
    """

    width: int
    channels: int | None
    turns: dict[str, int]
    layers: list[LayerEnergy]
    of_experts: NotRequired[dict[str, float]]
    of_layer: NotRequired[dict[str, float]]
    least: NotRequired[dict[str, float]]
    least_layer: NotRequired[dict[str, int]]
    best: NotRequired[dict[str, int]]


class ChannelChanges(TypedDict):
    """Overlap of the channels of the experts that two plans keep: Jaccard, mean over experts, then over layers.

    None where two plans have no expert in common.
    """

    jaccard: float | None
    layers: list[float | None]


class Point(TypedDict):
    """A plan from part of the text: its tokens, and the share of kept experts that the whole text would exchange."""

    tokens: int
    changed: float


class Stability(TypedDict):
    """How the plan changes with the number of calibration tokens.

    Keys:
        change: share of the kept experts that may still change in a stable plan.
        curve: a point per part of the text, the last one for all of it.
        halves: share of kept experts in which the plans of the two halves of the text differ.
        half_tokens: tokens of the first half.
        enough_tokens: from here on the curve stays at or below ``change``; None if only the last part does.
    """

    change: float
    curve: list[Point]
    halves: float
    half_tokens: int
    enough_tokens: int | None


class LayerChange(TypedDict):
    """One MoE layer of two plans: ids of the experts that only one of them keeps, and their overlap."""

    decoder_layer: int
    only_here: list[int]
    only_there: list[int]
    common: int
    jaccard: float


class Changes(TypedDict):
    """What another plan keeps instead; counts over all layers, ``jaccard`` is their mean.

    ``channels`` compares thinner experts; ``same`` also means the same channels.
    """

    method: str
    options: dict[str, Any]
    keep: int
    width: int | None
    same: bool
    only_here: int
    only_there: int
    jaccard: float
    channels: ChannelChanges | None
    layers: list[LayerChange]
