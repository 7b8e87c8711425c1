"""Which tensors on disk depend on the experts: reads names and headers, gives a row for each tensor that does.

The library's own conversion mapping leads from the names on disk to the parameters of the model class, whose expert
axis is known. A quantised checkpoint has names that lead to no parameter (packed weights, scales): inside the experts
of a layer they belong to the expert in their name, or have the experts along their first axis.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moecover.checkpoints.formats import packed_router
from moecover.checkpoints.header import TensorEntry
from moecover.checkpoints.names import (
    OTHER_PARTS,
    expert_number,
    kind_of,
    layer_number,
    mtp_root,
    read_names,
    suffix_of,
    twin_of,
)
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.tensor_checks import FLOAT_TYPES, check_filled, check_rows, wrong_shape
from moecover.checkpoints.topology import ExpertTensor, ExpertTensors
from moecover.errors import InputError

if TYPE_CHECKING:
    import torch


def classify(
    checkpoint: Checkpoint,
    model: torch.nn.Module,
    axes: Mapping[str, int],
    modules: tuple[str, ...],
    experts: int,
    num_layers: int,
) -> ExpertTensors:
    """Find the expert-dependent tensors on disk; checks every tensor's shape against the parameter that it fills.

    Args:
        checkpoint: the files.
        model: the model class, on ``meta``.
        axes: expert axis of every expert-dependent parameter, by name.
        modules: names of the experts modules.
        experts: experts per layer.
        num_layers: decoder layers.

    Raises:
        InputError: tensors that are missing, have another shape, or belong to the experts in an unknown way.
    """
    parameters = dict(model.state_dict())
    destinations = read_names(checkpoint, model).destinations
    # A tensor that fills several parameters is not the one tensor of any of them.
    targets = {key: key if (d := destinations[key]).fills_several else d.parameter for key in checkpoint.tensors}
    outside = {key: target for key, target in targets.items() if target not in parameters}
    mtp = _mtp_names(outside, num_layers)
    layer_of = {layer_number(module): layer for layer, module in enumerate(modules)}
    owners = {key.rpartition(".")[0] for key in axes}
    shared = Counter(targets.values())  # a parameter may be assembled from several tensors
    found: dict[str, ExpertTensor] = {}
    for key, target in targets.items():
        entry, row = checkpoint.tensors[key], None
        if target in axes:
            routed = target.rpartition(".")[0] in modules
            one = expert_number(key)
            axis, expected = axes[target] if one is None else None, tuple(parameters[target].shape)
            part = axis is not None and shared[target] > 1 and entry.shape[axis] == experts
            if not routed and entry.dtype not in FLOAT_TYPES and entry.shape != expected:
                raise packed_router(checkpoint, entry)
            if axis is not None and entry.shape != expected and not part:
                raise wrong_shape(checkpoint, entry, expected)
            tail = 0 if axis is None else expected[axis] - experts
            row = ExpertTensor(layer_of[layer_number(target)], one, axis, routed, tail)
        elif key in outside and key not in mtp:
            row = _of_module(checkpoint, entry, target, owners, modules, experts)
        if row is not None:
            found[key] = row
    quantised = check_rows(checkpoint, found, modules, experts)
    packed = modules if quantised and checkpoint.declared_quantisation else ()
    check_filled(checkpoint, targets, parameters, axes, packed)
    return ExpertTensors(found, _mtp_rows(checkpoint, mtp, found, len(modules) - 1, experts), quantised)


def _of_module(
    checkpoint: Checkpoint, entry: TensorEntry, target: str, owners: set[str], modules: tuple[str, ...], experts: int
) -> ExpertTensor | None:
    """The row of a tensor that fills no parameter but belongs to a layer's experts; None if it does not."""
    if ".experts." not in target:
        if target.rpartition(".")[0] in owners and math.prod(entry.shape) > 1:
            raise InputError(
                f"{checkpoint.name}: tensor {entry.name} belongs to the router in an unknown way "
                "(a quantised router?): its experts cannot be separated. Use a checkpoint whose router is not quantised"
            )
        return None
    if OTHER_PARTS.search(target):
        return None  # experts of another part of the model than the decoder
    module = f".{target.partition('.experts.')[0]}.experts"
    layer = next((i for i, name in enumerate(modules) if module.endswith(f".{name}") or name.endswith(module)), None)
    if layer is None:
        raise InputError(
            f"{checkpoint.name}: tensor {entry.name} belongs to experts that the model class does not have: "
            "not supported"
        )
    if (one := expert_number(entry.name)) is not None:
        return ExpertTensor(layer, one, None, routed=True)
    if math.prod(entry.shape) == 1:
        return None  # one scale for all experts
    if entry.shape[0] != experts:
        raise InputError(
            f"{checkpoint.name}: tensor {entry.name} of shape {list(entry.shape)} belongs to the {experts} experts of "
            "a layer in an unknown way"
        )
    return ExpertTensor(layer, None, 0, routed=True)


# -------------------------------------------------------------------------------------------- multi-token prediction
def _mtp_names(outside: Mapping[str, str], num_layers: int) -> set[str]:
    """The tensors of multi-token-prediction layers with experts, among those that the model class lacks."""
    roots: dict[str, list[str]] = {}
    for key in outside:
        if root := mtp_root(key, num_layers):
            roots.setdefault(root, []).append(key)
    return {key for keys in roots.values() if any(".experts." in k for k in keys) for key in keys}


def _mtp_rows(
    checkpoint: Checkpoint, names: set[str], found: Mapping[str, ExpertTensor], layer: int, experts: int
) -> dict[str, ExpertTensor | None]:
    """The rows of multi-token-prediction layers: their tensors depend on experts as their twins in other layers do."""
    twins = {suffix_of(kind_of(key)): row for key, row in found.items()} if names else {}
    rows: dict[str, ExpertTensor | None] = {}
    for key in sorted(names):
        suffix = twin_of(key, twins)
        twin = twins[suffix] if suffix is not None else None
        one, shape = expert_number(key), checkpoint.tensors[key].shape
        if one is not None:
            rows[key] = ExpertTensor(layer, one, None, routed=True)
        elif twin is not None and twin.axis is not None:
            rows[key] = ExpertTensor(layer, None, twin.axis, twin.routed)
        elif ".experts." in key and math.prod(shape) > 1:
            if shape[0] != experts:
                raise InputError(
                    f"{checkpoint.name}: tensor {key} of shape {list(shape)} belongs to the experts of a "
                    "multi-token-prediction layer in an unknown way"
                )
            rows[key] = ExpertTensor(layer, None, 0, routed=True)
        else:
            rows[key] = None
    return rows
