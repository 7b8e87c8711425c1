"""Whether a plan fits a model: reads both, refuses what no checkpoint could be cut by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moecover.checkpoints.config_edit import TOP_K_KEYS, top_k_keys
from moecover.checkpoints.families import FIXED_TOP_K
from moecover.checkpoints.structure import Structure
from moecover.checkpoints.topology import Topology
from moecover.errors import InputError, arg
from moecover.planning.artifact import LayerPlan, Plan
from moecover.planning.keep import resolve_keep, resolve_width
from moecover.profiling.artifact import Profile

NO_REPAIR = "merges and repairs are made with the model's own number of experts per token. Leave one of the two out"


def check_plan(plan: Plan, structure: Structure, *, other_weights: bool = False, unequal: bool = False) -> None:
    """Refuse a plan that does not fit a model.

    A quantised checkpoint is checked by its topology alone: its plan comes from the original that it was made from.

    Args:
        plan: by `plan` or by hand.
        structure: the checkpoint to be pruned.
        other_weights: accept a plan that was made on other weights of the same shape (a fine-tuned sibling).
        unequal: accept a plan by which no checkpoint can be written, for evaluation.

    Raises:
        InputError: other layers, ids out of range, unequal counts, fewer than top-k, or made for another model.
    """
    topology, name = structure.topology, structure.checkpoint.name
    if plan.topology_fingerprint is not None and not structure.has_topology(plan.topology_fingerprint):
        raise InputError(
            f"the plan was made for another model ({plan.model}), not for {name}: their topologies differ. Make a "
            "profile and a plan of this one"
        )
    layers = tuple(layer.decoder_layer for layer in plan.layers)
    if layers != topology.decoder_layers:
        raise InputError(
            f"the plan has decoder layers {_short(layers)}, {name} has its MoE layers at "
            f"{_short(topology.decoder_layers)}"
        )
    if plan.unequal:
        check_writable(unequal, sorted(map(len, plan.kept)))
    if plan.mtp and structure.mtp and tuple(row.decoder_layer for row in plan.mtp) != structure.mtp_layers:
        raise InputError(
            f"the plan has multi-token-prediction layers {_short(tuple(row.decoder_layer for row in plan.mtp))}, {name}"
            f" has {_short(structure.mtp_layers)}"
        )
    for layer in plan.with_mtp.layers:
        count = len(layer.kept) if plan.unequal else plan.keep
        _check_layer(layer, count, topology)
        resolve_keep(topology, keep=count, retain=None)
    _check_channels(plan, structure)
    if plan.top_k is not None:
        check_top_k(structure, plan.top_k)
    if (
        structure.quantised is None
        and not other_weights
        and plan.model_fingerprint is not None
        and not structure.has_routers(plan.model_fingerprint)
    ):
        raise InputError(
            f"the plan was made for another model ({plan.model}) of the same shape as {name}: the routers differ. Make "
            f"a plan of this one, or give {arg('other_weights')} if it is a sibling of that model"
        )


def check_model(profile: Profile, structure: Structure) -> None:
    """Refuse a model that is not the profile's.

    Raises:
        InputError: the topology or the routers differ.
    """
    if structure.model_fingerprint != profile.model["fingerprint"]:
        raise InputError(
            f"the profile is of another model ({profile.model['name']}), not of {structure.checkpoint.name}: topology "
            f"or routers differ. Give the {arg('model')} that was profiled"
        )


def check_writable(anyway: bool, counts: Sequence[int]) -> None:
    """Refuse unequal counts where a checkpoint is to be written.

    Args:
        anyway: none is.
        counts: of the layers, ascending.

    Raises:
        InputError: says who reads such counts.
    """
    if not anyway:
        raise InputError(
            f"the plan keeps {counts[0]} to {counts[-1]} experts by layer. config.json has one number, and vLLM, "
            "SGLang and llama.cpp read one (per-layer counts: vLLM and SGLang, of nemotron_h_puzzle only). Such a plan "
            "can be evaluated; to write a checkpoint, plan with equal counts"
        )


def check_top_k(structure: Structure, top_k: int) -> None:
    """Refuse a number of experts per token that a model cannot have.

    Args:
        structure: the checkpoint.
        top_k: experts per token.

    Raises:
        InputError: below 1 or not below the model's own, a GGUF file, a family that does not follow, or a config.json
            that does not hold the number.
    """
    own, name = structure.topology.top_k, structure.checkpoint.name
    if type(top_k) is not int or not 1 <= top_k < own:
        raise InputError(f"{arg('top_k', top_k)} is out of range: {name} sends a token to {own}. Give fewer, 1 or more")
    if structure.checkpoint.gguf is not None:
        key = f"{structure.topology.family}.expert_used_count=int:{top_k}"
        raise InputError(
            f"{arg('top_k', top_k)}: GGUF files are not changed in that, llama.cpp does it when it loads one: "
            f"llama-server -m {name} --override-kv {key}"
        )
    if reason := FIXED_TOP_K.get(structure.topology.family):
        raise InputError(f"{arg('top_k', top_k)}: {structure.topology.family} cannot be changed in that: {reason}")
    if not top_k_keys(structure.checkpoint.config, own):
        raise InputError(
            f"{arg('top_k', top_k)}: config.json of {name} does not say that a token goes to {own} experts, under none "
            f"of {', '.join(TOP_K_KEYS)}, or not to as many in every layer. Add the key"
        )


def _check_layer(layer: LayerPlan, keep: int, topology: Topology) -> None:
    """Refuse a layer that keeps another number of experts, or ones that do not exist."""
    where = f"the plan's decoder layer {layer.decoder_layer}"
    if len(layer.kept) != keep:
        raise InputError(
            f"{where} keeps {len(layer.kept)} experts, `keep` is {keep}. Every layer must keep the same number: stock "
            "loaders and servers read one"
        )
    if layer.kept[-1] >= topology.num_experts:
        raise InputError(f"{where} keeps expert {layer.kept[-1]}. Allowed: 0 to {topology.num_experts - 1}")
    if wrong := [corpus for corpus, values in layer.saliency.items() if len(values) != topology.num_experts]:
        raise InputError(
            f"{where} has {len(layer.saliency[wrong[0]])} values of {wrong[0]}, the model has {topology.num_experts} "
            "experts. Make the plan again"
        )
    size = topology.num_experts // topology.num_groups
    counts = np.bincount([e // size for e in layer.kept], minlength=topology.num_groups)
    if counts.min() < counts.max():
        raise InputError(
            f"{where} keeps {', '.join(map(str, counts))} experts of the router's groups. Every group must keep the "
            "same number"
        )


def _check_channels(plan: Plan, structure: Structure) -> None:
    """Refuse channels that do not exist, or another number of them than the plan says."""
    if plan.width is None:
        if any(layer.channels for layer in plan.layers):
            raise InputError("the plan names channels, but not how many of an expert are kept: give `width`")
        return
    name = structure.checkpoint.name
    if isinstance(structure.width, str):
        raise InputError(
            f"the plan keeps {plan.width} channels of an expert, {name} can keep all only: {structure.width}"
        )
    channels = structure.width.channels
    resolve_width(channels, width=plan.width, retain=None)
    for layer in plan.with_mtp.layers:
        where = f"the plan's decoder layer {layer.decoder_layer}"
        if len(layer.channels) != len(layer.kept) or {len(ids) for ids in layer.channels} != {plan.width}:
            raise InputError(
                f"{where} does not have {plan.width} channels of each of {len(layer.kept)} experts. Every expert must "
                "keep the same number: stock loaders and servers read one"
            )
        if (last := max(ids[-1] for ids in layer.channels)) >= channels:
            raise InputError(f"{where} keeps channel {last}. Allowed: 0 to {channels - 1}")
        if (group := structure.width.group) > 1 and not all(in_groups(ids, group) for ids in layer.channels):
            raise InputError(
                f"{where} keeps parts of blocks: {name} is quantised in blocks of {group} channels. Make the plan "
                f"with {arg('channel_groups', group)}"
            )


def channel_groups(structure: Structure | None, asked: int = 1) -> int:
    """Consecutive channels that stay or go together: as many as asked for, and as a block of a quantised model has."""
    width = None if structure is None else structure.width
    return math.lcm(asked, 1 if width is None or isinstance(width, str) else width.group)


def in_groups(ids: Sequence[int], group: int) -> bool:
    """Whether ids, ascending, are whole groups of consecutive ones."""
    firsts = ids[::group]
    return all(first % group == 0 for first in firsts) and [*ids] == [f + i for f in firsts for i in range(group)]


def _short(values: tuple[int, ...]) -> str:
    text = ", ".join(map(str, values))
    return text if len(text) < 60 else f"{text[:40]} ... ({len(values)} in all)"
