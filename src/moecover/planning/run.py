"""Stage 3b, plan: reads a profile, writes which experts of every layer are kept, and why.

Arithmetic on the profile: no model and no forward pass, so one profile serves every method and every budget; only
`expert-sparsity`, which searches, needs the model too. A new method is one decorated function from a profile, a budget
and options to a choice per layer. The same profile and options give the same bytes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.errors import InputError
from moecover.planning.artifact import LayerPlan, Plan
from moecover.planning.keep import resolve_keep
from moecover.planning.saliency import SALIENCIES
from moecover.planning.selection import Budget, Room, cover, ranked
from moecover.profiling.artifact import Profile, Statistics
from moecover.registry import Registry, unknown_name

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from moecover.checkpoints.structure import Structure
    from moecover.checkpoints.topology import Topology
    from moecover.corpora.packing import Corpus

DEFAULT_METHOD, DEFAULT_SALIENCY, DEFAULT_PROTECT = "tb-coverage", "contribution", 0.5
METHODS: Registry[Callable[..., Any]] = Registry("method")
RESOURCES = ("model", "structure", "sample", "advance")  # what a method works with; not options, so not in the plan


# ------------------------------------------------------------------------------------------------------------ methods
def utility_of(saliency: str, statistics: Statistics) -> NDArray[np.float64]:
    """A saliency by name, ``[layer, expert]``.

    Raises:
        InputError: unknown name, or a function that gives another shape or non-finite values.
    """
    function = SALIENCIES[saliency]
    shape = statistics["count"].shape
    values = np.asarray(function(statistics))
    if values.shape != shape or values.dtype.kind not in "iuf":
        raise InputError(f"saliency {saliency} gives shape {list(values.shape)} of {values.dtype}, numbers of shape {list(shape)} are needed (layer, expert)")  # fmt: skip
    if not np.isfinite(values).all():
        layer, expert = np.argwhere(~np.isfinite(values))[0]
        raise InputError(f"saliency {saliency} gives {values[layer, expert]} for MoE layer {layer}, expert {expert}: finite numbers are needed")  # fmt: skip
    return values.astype(np.float64)


def chosen(
    profile: Profile,
    layer: int,
    room: Room,
    filled: list[int],
    *,
    protected: Mapping[str, list[int]] | None = None,
    utility: Mapping[str, NDArray[Any]] | None = None,
) -> LayerPlan:
    """The choice of a MoE layer, from the places that were filled."""
    named = {e for ids in (protected or {}).values() for e in ids} | set(filled)
    return LayerPlan(
        decoder_layer=profile.topology.decoder_layers[layer],
        kept=sorted(room.chosen),
        required=[e for e in room.chosen if e not in named],
        protected=dict(protected or {}),
        filled=filled,
        saliency={corpus: values[layer].tolist() for corpus, values in (utility or {}).items()},
    )


@METHODS("tb-coverage", paper="arXiv 2607.01710")
def tb_coverage(
    profile: Profile,
    budget: Budget,
    *,
    saliency: str = DEFAULT_SALIENCY,
    protect: float = DEFAULT_PROTECT,
    weights: Mapping[str, int] | None = None,
) -> list[LayerPlan]:
    """Corpora take turns protecting their best experts, the mean utility fills the rest.

    Args:
        profile: statistics of every corpus.
        budget: experts to keep.
        saliency: name in `SALIENCIES`, computed on every corpus by itself.
        protect: share of the kept experts that is protected, in [0, 1].
        weights: by corpus, turns per round and weight in the mean; 1 where none is given, 0 leaves a corpus out.
    """
    turns = int(protect * budget.keep + 0.5)
    corpora = {name: (weights or {}).get(name, 1) for name in profile.statistics}
    if not any(corpora.values()):
        raise InputError("every corpus has weight 0. Give at least one of them 1 or more")
    utility = {name: utility_of(saliency, s) for name, s in profile.statistics.items()}
    if any((values < 0).any() for values in utility.values()):
        raise InputError(f"saliency {saliency} gives negative values, of which no shares can be made. Use another saliency, or --method pooled")  # fmt: skip
    plans = []
    for layer in range(len(profile.topology.decoder_layers)):
        room, rows = budget.room(layer), np.stack([u[layer] for u in utility.values()])
        protected, filled = cover(rows, room, turns, list(corpora.values()))
        by_corpus = dict(zip(utility, protected, strict=True))
        plans.append(chosen(profile, layer, room, filled, protected=by_corpus, utility=utility))
    return plans


@METHODS("pooled", paper="arXiv 2510.13999 with --saliency reap")
def pooled(profile: Profile, budget: Budget, *, saliency: str = DEFAULT_SALIENCY) -> list[LayerPlan]:
    """The best of one saliency over all corpora taken as one text."""
    utility = {"pooled": utility_of(saliency, profile.pooled())}
    plans = []
    for layer, order in enumerate(ranked(utility["pooled"]).tolist()):
        room = budget.room(layer)
        plans.append(chosen(profile, layer, room, room.fill(order), utility=utility))
    return plans


@METHODS("random", paper="baseline", blind=True)
def random(profile: Profile, budget: Budget, *, seed: int = 0) -> list[LayerPlan]:
    """A seeded choice, other in every layer; the choice of a smaller budget is part of that of a larger one."""
    plans = []
    for layer in range(len(profile.topology.decoder_layers)):
        room, rng = budget.room(layer), np.random.default_rng((seed, layer))
        plans.append(chosen(profile, layer, room, room.fill(rng.permutation(budget.num_experts).tolist())))
    return plans


@METHODS("expert-sparsity", paper="arXiv 2402.14800", together=True)
def expert_sparsity(
    profile: Profile,
    budgets: Sequence[Budget],
    *,
    mode: str = "layerwise",
    search: str = "auto",
    model: torch.nn.Module | None = None,
    structure: Structure | None = None,
    sample: Sequence[Corpus] | None = None,
    advance: Callable[[int], None] = lambda layers: None,
) -> list[list[LayerPlan]]:
    """The subset whose routed output, re-routed, is nearest to the full layer's on a sample of the calibration text.

    Args:
        profile: of the model.
        budgets: experts to keep; a greedy layerwise search serves all of them at once.
        mode: ``layerwise`` (inputs of the full model) or ``progressive`` (inputs of the pruned prefix).
        search: ``exhaustive``, ``greedy``, or ``auto``: exhaustive where there are at most 100,000 subsets.
        model: the live model, from `load_model`.
        structure: its checkpoint.
        sample: token ids to search on instead of the sample that the profile keeps.
        advance: called with 1 after every layer.
    """
    from moecover.planning.search.subsets import search_layers

    if model is None or structure is None:
        raise InputError("expert-sparsity runs the experts: give --model MODEL, the model of the profile")
    return search_layers(profile, budgets, model, structure, mode=mode, search=search, sample=sample, advance=advance)


@METHODS("worst-corpus", paper="this project", together=True)
def worst_corpus(
    profile: Profile,
    budgets: Sequence[Budget],
    *,
    mode: str = "layerwise",
    search: str = "auto",
    model: torch.nn.Module | None = None,
    structure: Structure | None = None,
    sample: Sequence[Corpus] | None = None,
    advance: Callable[[int], None] = lambda layers: None,
) -> list[list[LayerPlan]]:
    """The subset whose routed output, re-routed, is nearest on the corpus where it is farthest, as a share of that output.

    Args:
        profile: of the model.
        budgets: experts to keep; a greedy layerwise search serves all of them at once, then each has its own exchanges.
        mode: as in `expert_sparsity`.
        search: as there; greedy means elimination, then single exchanges until none helps.
        model: the live model, from `load_model`.
        structure: its checkpoint.
        sample: token ids to search on instead of the sample that the profile keeps.
        advance: called with 1 after every layer.
    """
    from moecover.planning.search.subsets import search_layers

    if model is None or structure is None:
        raise InputError("worst-corpus runs the experts: give --model MODEL, the model of the profile")
    return search_layers(profile, budgets, model, structure, mode=mode, search=search, worst=True, sample=sample, advance=advance)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- super experts
SUPER_QUANTILE, SUPER_SHARE = 0.995, 0.1


def super_experts(profile: Profile) -> tuple[frozenset[int], ...]:
    """By MoE layer, the experts with extreme outputs (arXiv 2507.23279).

    The largest absolute component of an expert's output over all corpora is above the 99.5 % quantile over all experts
    of all layers, and above a tenth of the global maximum. Layers are MoE layers: dense ones do not count.
    """
    peaks = np.max([s["max_abs"] for s in profile.statistics.values()], axis=0)
    threshold = max(float(np.quantile(peaks, SUPER_QUANTILE)), SUPER_SHARE * float(peaks.max()))
    return tuple(frozenset(np.flatnonzero(row > threshold).tolist()) for row in peaks)


# ---------------------------------------------------------------------------------------------------------------- plan
def runs_experts(method: str) -> bool:
    """Whether a method needs the model, and inputs of its layers."""
    return "model" in inspect.signature(METHODS[method]).parameters


def check_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options with its defaults filled in.

    Raises:
        InputError: unknown method or saliency, an option that the method does not have, or one out of range.
    """
    parameters = inspect.signature(METHODS[method]).parameters
    known = {
        n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and (n not in RESOURCES or n in options)
    }
    if unknown := [name for name in options if name not in known]:
        flags = [f"--{k}" for k in known if k not in RESOURCES]
        raise InputError(f"--{unknown[0]} is no option of method {method}. It has: {', '.join(flags) or 'none'}")
    complete = {**known, **options}
    if "saliency" in complete:
        SALIENCIES[complete["saliency"]]
    if "protect" in complete and not 0 <= complete["protect"] <= 1:
        raise InputError(f"--protect {complete['protect']} is out of range: a share of the kept experts, from 0 to 1")
    for name, allowed in {"mode": ("layerwise", "progressive"), "search": ("auto", "exhaustive", "greedy")}.items():
        if complete.get(name, allowed[0]) not in allowed:
            raise InputError(f"--{name} {complete[name]} is unknown. Allowed: {', '.join(allowed)}")
    for corpus, weight in (complete.get("weights") or {}).items():
        if type(weight) is not int or weight < 0:
            raise InputError(f"--weight {corpus}={weight} is out of range: a whole number of turns, 0 or more")
    return complete


def plan_budgets(
    profile: Profile,
    *,
    method: str = DEFAULT_METHOD,
    keeps: Sequence[int],
    protect_super_experts: bool = False,
    **options: Any,
) -> list[Plan]:
    """Plans from a profile, one a budget.

    Args:
        profile: from `profile` or `Profile.load`.
        method: name in `METHODS`.
        keeps: experts to keep per layer, one number a plan; see `resolve_keep`.
        protect_super_experts: keep the `super_experts` whatever the method says.
        **options: options of the method (``saliency``, ``protect``, ``seed``, ...); the defaults are filled in.

    Raises:
        InputError: unknown method or saliency, an option that the method does not have, or a budget out of range.
    """
    complete = check_options(method, options)
    topology = profile.topology
    for corpus in complete.get("weights") or {}:
        if corpus not in profile.statistics:
            raise unknown_name("corpus in --weight", corpus, profile.statistics)
    required = super_experts(profile) if protect_super_experts else ()
    budgets = [
        Budget(resolve_keep(topology, keep=k, retain=None), topology.num_experts, topology.num_groups, required)
        for k in keeps
    ]
    function = METHODS[method]
    together = METHODS.facts[method].get("together", False)
    layers = function(profile, budgets, **complete) if together else [function(profile, b, **complete) for b in budgets]
    for budget, rows in zip(budgets, layers, strict=True):
        _check_choice(method, topology, budget, rows)
    recorded = {k: v for k, v in complete.items() if k not in RESOURCES and v is not None}
    if protect_super_experts:
        recorded["protect_super_experts"] = True
    return [
        Plan(
            schema=1,
            method=method,
            options=recorded,
            keep=budget.keep,
            layers=rows,
            topology_fingerprint=topology.fingerprint,
            model_fingerprint=profile.model["fingerprint"],
            profile_fingerprint=profile.fingerprint,
            model=profile.model["name"],
            calibration={} if METHODS.facts[method].get("blind") and not required else profile.corpora,
        )
        for budget, rows in zip(budgets, layers, strict=True)
    ]


def _check_choice(method: str, topology: Topology, budget: Budget, rows: Any) -> None:
    """Refuse what no plan may hold; a method of a plugin can give anything."""
    layers = len(topology.decoder_layers)
    if not isinstance(rows, list) or len(rows) != layers or not all(isinstance(row, LayerPlan) for row in rows):
        raise InputError(f"method {method} gives no list of {layers} LayerPlan, one a MoE layer")
    size = budget.num_experts // budget.num_groups
    for row, decoder_layer, layer in zip(rows, topology.decoder_layers, range(layers), strict=True):
        counts = np.bincount([e // size for e in row.kept], minlength=budget.num_groups)
        if (
            len(counts) > budget.num_groups
            or (counts != budget.keep // budget.num_groups).any()
            or row.decoder_layer != decoder_layer
        ):
            raise InputError(f"method {method} keeps experts {row.kept} of decoder layer {row.decoder_layer}, {budget.keep} of {budget.num_experts} of layer {decoder_layer} are to be kept{', the same number in each group' if budget.num_groups > 1 else ''}")  # fmt: skip
        if budget.required and not budget.required[layer] <= set(row.kept):
            raise InputError(f"method {method} drops super experts of decoder layer {decoder_layer}: take the places from budget.room(layer)")  # fmt: skip


def plan(profile: Profile, *, keep: int | None = None, retain: float | None = None, **options: Any) -> Plan:
    """A plan from a profile; see `plan_budgets` for the options.

    Args:
        profile: from `profile` or `Profile.load`.
        keep: experts to keep per layer; give this or ``retain``.
        retain: fraction to keep, in (0, 1].
        **options: ``method``, ``protect_super_experts`` and the method's options.

    Raises:
        InputError: as `plan_budgets`.
    """
    check_options(options.get("method", DEFAULT_METHOD), {k: v for k, v in options.items() if k not in ("method", "protect_super_experts")})  # fmt: skip
    count = resolve_keep(profile.topology, keep=keep, retain=retain)
    return plan_budgets(profile, keeps=[count], **options)[0]
