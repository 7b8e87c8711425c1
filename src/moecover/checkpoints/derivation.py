"""The layout of a checkpoint's experts, derived from its model class: reads configuration and headers.

No table of families is needed. The model class is built on torch's ``meta`` device (no memory) with E and with 2 E
experts: every tensor whose shape changes has an expert axis, and the change tells which. The library's own conversion
mapping leads from the names on disk to those parameters. A family that does not fit is refused before any work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moecover.checkpoints.config_edit import (
    COUNT_KEYS,
    GROUP_KEYS,
    TOP_K_KEYS,
    Config,
    check_counts,
    expert_count_keys,
    number,
    with_expert_count,
    with_single_counts,
)
from moecover.checkpoints.expert_tensors import classify
from moecover.checkpoints.families import PROVEN_FAMILIES, UNSUPPORTED
from moecover.checkpoints.formats import check_format
from moecover.checkpoints.id_tables import find_tables
from moecover.checkpoints.model_class import build_on_meta
from moecover.checkpoints.names import EXPERT, NUMBERED, layer_number
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.topology import ExpertLayout, Topology
from moecover.checkpoints.widths import derive_width
from moecover.errors import InputError

if TYPE_CHECKING:
    import torch

MOST_EXPERTS = 2**16


def derive(checkpoint: Checkpoint) -> ExpertLayout:
    """Derive the layout of a checkpoint's experts from its model class.

    Raises:
        InputError: no routed experts, an architecture that is unknown or does not fit, or tensors that do not match it.
    """
    config, name = checkpoint.config, checkpoint.name
    if reason := UNSUPPORTED.get(str(config.get("model_type"))):
        raise InputError(f"{name}: {config['model_type']} is not supported: {reason}")
    check_format(checkpoint)
    check_counts(config, name)
    counts = expert_count_keys(config)
    _check_size(checkpoint, max(counts.values(), default=0))
    config = with_single_counts(config, counts)
    one = build_on_meta(config, name)
    if not counts:
        raise _no_experts(name, config)
    if len(set(counts.values())) > 1:
        by_key = {".".join(path): count for path, count in counts.items()}
        raise InputError(f"{name}: config.json has several counts of experts: {by_key}")
    experts = next(iter(counts.values()))
    two = build_on_meta(with_expert_count(config, tuple(counts), 2 * experts), name)
    axes = _expert_axes(one, two, experts, name, tail=config["model_type"] in PROVEN_FAMILIES)
    if not axes:
        raise _no_experts(name, config)
    modules = _experts_modules(one, axes)
    _check_modules(one, modules, axes, name, config["model_type"])
    topology = _topology(one, config["model_type"], modules, experts, name)
    tensors = classify(checkpoint, one, axes, modules, experts, topology.num_layers)
    width = derive_width(checkpoint, config, one, axes, modules, tensors)
    tables = find_tables(checkpoint, one, axes, modules, topology.top_k)
    return ExpertLayout(topology, tensors, axes, modules, width, tables)


def _check_size(checkpoint: Checkpoint, experts: int) -> None:
    """Refuse counts that no files could fill, before a model class is built with them.

    Raises:
        InputError: more decoder layers than the files have, or more experts than any model.
    """
    layers = checkpoint.text_config.get("num_hidden_layers")
    numbers = [int(found[1]) for name in checkpoint.tensors if (found := NUMBERED.match(name))]
    if type(layers) is int and numbers and layers > max(numbers) + 1:
        raise InputError(
            f"{checkpoint.name}: config.json has {layers} decoder layers, the files have tensors of "
            f"{max(numbers) + 1}. Fetch the checkpoint again"
        )
    if experts > MOST_EXPERTS:
        raise InputError(
            f"{checkpoint.name}: config.json has {experts} experts per layer, at most {MOST_EXPERTS} are read"
        )


def _no_experts(name: str, config: Config) -> InputError:
    return InputError(
        f"{name}: {config['model_type']!r} has no routed experts (no count above 1 that shapes its tensors under "
        f"{', '.join(COUNT_KEYS)} in config.json)"
    )


def _expert_axes(one: torch.nn.Module, two: torch.nn.Module, experts: int, name: str, *, tail: bool) -> dict[str, int]:
    """The axis of every parameter and buffer that follows the expert count.

    With ``tail`` an axis may be longer than the expert count. No shape tells that the experts come first on it, so this
    is for proven families only.
    """
    wide = dict(two.state_dict())
    axes = {}
    for key, tensor in one.state_dict().items():
        changed = [i for i, (a, b) in enumerate(zip(tensor.shape, wide[key].shape, strict=True)) if a != b]
        if not changed:
            continue
        places, more = tensor.shape[changed[0]], wide[key].shape[changed[0]] - tensor.shape[changed[0]]
        if len(changed) > 1 or more != experts or places < experts or (places > experts and not tail):
            raise InputError(
                f"{name}: {key} of shape {list(tensor.shape)} depends on the expert count in an unsupported way"
            )
        axes[key] = changed[0]
    return axes


def _experts_modules(model: torch.nn.Module, axes: dict[str, int]) -> tuple[str, ...]:
    """Modules named ``experts`` that hold expert-dependent parameters, in the order of the layers."""
    owners = {key.rpartition(".")[0] for key in axes}
    found = sorted((name for name in owners if name.rpartition(".")[2] == "experts"), key=layer_number)
    return tuple(name for name in found if hasattr(model.get_submodule(name), "num_experts"))


def _check_modules(
    model: torch.nn.Module, modules: tuple[str, ...], axes: dict[str, int], name: str, family: str
) -> None:
    """Every layer has one experts module, and nothing else depends on the experts.

    Raises:
        InputError: this is not so.
    """
    if not modules:
        apart = any(EXPERT.search(key) for key in model.state_dict())
        why = "its experts are modules of their own, not the library's stack" if apart else "no stack of experts"
        raise InputError(
            f"{name}: {family!r} has no MoE layer in a form that is supported: {why} "
            "(moecover ls families names those that are proven)"
        )
    decoder_layers = tuple(layer_number(module) for module in modules)
    stray = next((key for key in axes if layer_number(key) not in decoder_layers), None)
    if stray or len(set(decoder_layers)) < len(decoder_layers):
        what = f"{stray} depends on the experts but lies" if stray else "two groups of experts lie"
        raise InputError(f"{name}: {what} outside the one experts module of its layer: {family!r} is not supported")


def _topology(model: torch.nn.Module, family: str, modules: tuple[str, ...], experts: int, name: str) -> Topology:
    text: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]  # a class of the library's
    top_k = next((v for k in TOP_K_KEYS if (v := number(getattr(text, k, None))) is not None), None)
    if top_k is None:
        raise InputError(f"{name}: no number of experts per token (top-k) in config.json under {', '.join(TOP_K_KEYS)}")
    if not 1 <= top_k <= experts:
        raise InputError(
            f"{name}: config.json sends a token to {top_k} of {experts} experts. Allowed: 1 to {experts} "
            f"({', '.join(TOP_K_KEYS)})"
        )
    groups, top_groups = _groups(text, experts, name)
    layers = tuple(layer_number(module) for module in modules)
    return Topology(
        family,
        layers,
        experts,
        top_k,
        text.hidden_size,
        text.num_hidden_layers,
        num_groups=groups,
        top_groups=top_groups,
    )


def _groups(text: Any, experts: int, name: str) -> tuple[int, int]:
    """Groups of experts and groups per token of a group-limited router; 1 and 1 for any other."""
    groups = next((v for k in GROUP_KEYS if isinstance(v := getattr(text, k, None), int)), 1)
    if groups <= 1 or getattr(text, "topk_method", None) == "greedy":
        return 1, 1
    top = getattr(text, "topk_group", None)
    if experts % groups or not isinstance(top, int) or not 1 <= top <= groups:
        raise InputError(
            f"{name}: config.json has {groups} groups for {experts} experts and {top} groups per token, "
            "which do not fit together"
        )
    return groups, top
