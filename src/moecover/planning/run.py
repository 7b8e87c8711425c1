"""Planning: reads a profile, gives the experts that every layer keeps, and why.

Arithmetic on the profile: no model and no forward pass, so that one profile serves every method and budget. Only
methods that search run the experts (`Method.runs_experts`). The same profile and options give the same plan.json, byte
by byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from moecover.checkpoints.topology import Topology
from moecover.errors import InputError, arg
from moecover.planning.artifact import LayerPlan, Plan
from moecover.planning.channels import check_channels, choose_channels
from moecover.planning.keep import allowed_keeps, resolve_keep, resolve_width
from moecover.planning.method import RESOURCES, Method
from moecover.planning.methods import METHODS, default_method
from moecover.planning.selection import Budget
from moecover.planning.shapes import check_groups, resolve_shape
from moecover.planning.super_experts import super_experts
from moecover.profiling.artifact import Profile
from moecover.profiling.coverage import unused_experts
from moecover.registry import unknown_name

DEFAULT_METHOD = default_method().name


def runs_experts(method: str) -> bool:
    """Whether a method needs the model, and inputs of its layers."""
    return METHODS[method].runs_experts


def check_options(method: str, options: Mapping[str, object]) -> dict[str, object]:
    """A method's options with its defaults filled in.

    Raises:
        InputError: unknown method or saliency, an option that the method does not have, or one out of range.
    """
    return METHODS[method].complete(options)


def plan_budgets(
    profile: Profile,
    *,
    method: str = DEFAULT_METHOD,
    keeps: Sequence[int],
    widths: Sequence[int | None] | None = None,
    protect_super_experts: bool = False,
    protect_channels: float = 0.0,
    channel_groups: int = 1,
    **options: object,
) -> list[Plan]:
    """Plans from a profile, one per budget.

    Args:
        profile: from `profile` or `Profile.load`.
        method: name in `METHODS`.
        keeps: experts to keep per layer, one number per plan; see `resolve_keep`.
        widths: channels to keep of each of them, one number per plan, None for all; see `choose_channels`.
        protect_super_experts: keep the `super_experts` whatever the method says.
        protect_channels: share of the kept channels that corpora protect in turn, 0 to 1.
        channel_groups: consecutive channels that stay or go together, for a model that is quantised in such blocks.
        **options: options of the method (``saliency``, ``protect``, ``seed``, ...); the defaults are filled in.

    Raises:
        InputError: unknown method or saliency, an option that the method does not have, or a budget out of range.
    """
    chosen = METHODS[method]
    complete = chosen.complete(_with_weights(chosen, options, profile))
    if missing := chosen.needs(complete):
        needed = " and ".join(arg(name) for name in missing)
        does = "reads the weights" if chosen.reads_weights else "runs the experts"
        raise InputError(f"{method} {does}: give {needed} of the profile's model")
    _check_corpora(chosen, complete, profile)
    widths = [None] * len(keeps) if widths is None else list(widths)
    _check_widths(profile, widths, protect_channels, channel_groups)
    topology = profile.topology
    required = super_experts(profile) if protect_super_experts else ()
    budgets = [
        Budget(resolve_keep(topology, keep=k, retain=None), topology.num_experts, topology.num_groups, required)
        for k in keeps
    ]
    unused = [] if chosen.blind else unused_experts(profile)
    recorded = {k: v for k, v in complete.items() if k not in RESOURCES and v is not None}
    if protect_super_experts:
        recorded["protect_super_experts"] = True
    if protect_channels:
        recorded["protect_channels"] = protect_channels
    if channel_groups > 1:
        recorded["channel_groups"] = channel_groups
    made = [
        Plan(
            schema=1,
            method=method,
            options=recorded,
            keep=budget.keep,
            unequal=chosen.unequal,
            width=width,
            layers=layers,
            mtp=of_mtp,
            topology_fingerprint=topology.fingerprint if profile.model["fingerprint"] else None,
            model_fingerprint=profile.model["fingerprint"] or None,
            profile_fingerprint=profile.fingerprint,
            model=profile.model["name"],
            weight_files=profile.model.get("files", {}),
            calibration={} if chosen.blind and not required and width is None else profile.corpora,
        )
        for budget, width, layers, of_mtp in zip(
            budgets,
            widths,
            _choices(chosen, profile, budgets, complete),
            _mtp_choices(chosen, profile, budgets, complete),
            strict=True,
        )
    ]
    if any(width is not None for width in widths):
        _add_channels(made, profile, complete.get("weights"), protect_channels, channel_groups)
    for one in made:
        for row, ids in zip(one.layers, unused, strict=False):
            row.unused = ids
    return made


def _add_channels(plans: Sequence[Plan], profile: Profile, weights: object, protect: float, group: int) -> None:
    """Choose the channels of plans with a width, each layer by its own statistics."""
    by_corpus = weights if isinstance(weights, Mapping) else None
    pairs = [(one, profile, one.layers) for one in plans]
    pairs += [(one, profile.mtp, one.mtp) for one in plans if profile.mtp is not None]
    for one, source, rows in pairs:
        for layer, row in enumerate(rows if one.width is not None else []):
            assert one.width is not None
            row.channels = choose_channels(
                source, layer, row.kept, one.width, protect=protect, weights=by_corpus, group=group
            )


def _mtp_choices(
    method: Method, profile: Profile, budgets: Sequence[Budget], options: Mapping[str, object]
) -> list[list[LayerPlan]]:
    """What a method chooses for multi-token-prediction layers, by their own statistics.

    Nothing where the profile has none of them, and by methods that need more than a profile or leave unequal counts:
    then these layers keep the ids of the last MoE layer. Super experts are those of a model's layers together, so none
    is required here.
    """
    if profile.mtp is None or not method.rates_mtp:
        return [[] for _ in budgets]
    return _choices(method, profile.mtp, [replace(budget, required=()) for budget in budgets], options)


def _with_weights(method: Method, options: Mapping[str, object], profile: Profile) -> dict[str, object]:
    """A method's options, with the weights that the corpora of the profile were given where there are none."""
    recorded = {name: records[0]["weight"] for name, records in profile.corpora.items() if "weight" in records[0]}
    takes_them = any(option.name == "weights" for option in method.options)
    return {**options, "weights": recorded} if recorded and takes_them and not options.get("weights") else {**options}


def _check_widths(profile: Profile, widths: Sequence[int | None], protect: float, group: int) -> None:
    """Refuse widths that the profile knows nothing of, or that no expert can have."""
    if not isinstance(protect, (int, float)) or not 0 <= protect <= 1:
        raise InputError(f"{arg('protect_channels', protect)} is out of range: a share of the kept channels, 0 to 1")
    asked = [width for width in widths if width is not None]
    if protect and not asked:
        raise InputError(
            f"{arg('protect_channels', protect)} has no use here: all channels are kept. Give {arg('width')}"
        )
    check_groups(group, thin=bool(asked))
    for width in asked:
        channels = check_channels(profile, width)
        resolve_width(channels, width=width, retain=None)
        if width % group or channels % group:
            raise InputError(
                f"{arg('width', width)} of {channels} channels are no whole groups of {group} "
                f"({arg('channel_groups')}). Give a multiple of it"
            )


def _check_corpora(method: Method, options: Mapping[str, object], profile: Profile) -> None:
    """Refuse an option by corpus that names one which the profile does not have."""
    for option in method.options:
        by_corpus = options[option.name]
        for corpus in by_corpus if option.mapping and isinstance(by_corpus, Mapping) else ():
            if corpus not in profile.statistics:
                raise unknown_name(f"corpus in {arg(option.name)}", corpus, profile.statistics)


def _choices(
    method: Method, profile: Profile, budgets: Sequence[Budget], options: Mapping[str, object]
) -> list[list[LayerPlan]]:
    """What a method chooses for every budget, checked: a plugin's method can return anything."""
    if not method.together:
        found = [method.function(profile, budget, **options) for budget in budgets]
    else:
        together = method.function(profile, budgets, **options)
        if not isinstance(together, list) or len(together) != len(budgets):
            raise InputError(f"method {method.name} gives no list of {len(budgets)} lists of LayerPlan, one per budget")
        found = together
    return [_checked(method, profile.topology, *pair) for pair in zip(budgets, found, strict=True)]


def _checked(chosen: Method, topology: Topology, budget: Budget, rows: object) -> list[LayerPlan]:
    """A method's choice for one budget; refuses what no plan may hold."""
    number, method = len(topology.decoder_layers), chosen.name
    layers = [row for row in rows if isinstance(row, LayerPlan)] if isinstance(rows, list) else []
    if not isinstance(rows, list) or len(rows) != number or len(layers) != number:
        raise InputError(f"method {method} gives no list of {number} LayerPlan, one per MoE layer")
    if chosen.unequal:
        least, total = allowed_keeps(topology)[0], sum(len(row.kept) for row in layers)
        if total != budget.keep * number or min(len(row.kept) for row in layers) < least:
            raise InputError(
                f"method {method} keeps {total} experts in all. It must keep {budget.keep * number}, and {least} or "
                "more in every layer"
            )
    size = budget.num_experts // budget.num_groups
    for index, (row, decoder_layer) in enumerate(zip(layers, topology.decoder_layers, strict=True)):
        keep = len(row.kept) if chosen.unequal else budget.keep
        counts = np.bincount([e // size for e in row.kept], minlength=budget.num_groups)
        if (
            len(counts) > budget.num_groups
            or (counts * budget.num_groups != keep).any()
            or row.decoder_layer != decoder_layer
        ):
            equal = ", the same number in each group" if budget.num_groups > 1 else ""
            raise InputError(
                f"method {method} keeps experts {row.kept} of decoder layer {row.decoder_layer}. It must keep "
                f"{keep} of the {budget.num_experts} of layer {decoder_layer}{equal}"
            )
        if budget.required and not budget.required[index] <= set(row.kept):
            raise InputError(
                f"method {method} drops super experts of decoder layer {decoder_layer}: take the places from "
                "budget.room(layer)"
            )
    return layers


def plan(
    profile: Profile,
    *,
    method: str = DEFAULT_METHOD,
    keep: int | None = None,
    retain: float | None = None,
    width: int | None = None,
    retain_width: float | None = None,
    protect_super_experts: bool = False,
    protect_channels: float = 0.0,
    channel_groups: int = 1,
    **options: object,
) -> Plan:
    """A plan from a profile.

    Args:
        profile: from `profile` or `Profile.load`.
        method: name in `METHODS`.
        keep: experts to keep per layer; give this or ``retain``.
        retain: fraction to keep, in (0, 1].
        width: channels to keep of each of them; give this or ``retain_width``, or neither for all.
        retain_width: fraction of the channels, in (0, 1].
        protect_super_experts: keep the `super_experts` whatever the method says.
        protect_channels: share of the kept channels that corpora protect in turn, 0 to 1.
        channel_groups: consecutive channels that stay or go together, for a model that is quantised in such blocks.
        **options: options of the method, as in `plan_budgets`.

    Raises:
        InputError: as `plan_budgets`.
    """
    check_options(method, options)
    shape = resolve_shape(
        profile.topology,
        profile.width,
        keep=keep,
        retain=retain,
        width=width,
        retain_width=retain_width,
        channel_groups=channel_groups,
    )
    return plan_budgets(
        profile,
        method=method,
        keeps=[shape.keep],
        widths=[shape.width],
        protect_super_experts=protect_super_experts,
        protect_channels=protect_channels,
        channel_groups=channel_groups,
        **options,
    )[0]
