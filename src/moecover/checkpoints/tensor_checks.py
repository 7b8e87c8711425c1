"""Checks of expert-dependent tensors against the headers: the experts are complete and alike, the parameters filled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moecover.checkpoints.header import DTYPE_BITS, TensorEntry
from moecover.checkpoints.names import kind_of
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.topology import ExpertTensor
from moecover.errors import InputError

if TYPE_CHECKING:
    import torch

FLOAT_TYPES = {"F16", "BF16", "F32", "F64"}
Rows = Mapping[str, ExpertTensor]


def wrong_shape(checkpoint: Checkpoint, entry: TensorEntry, expected: tuple[int, ...]) -> InputError:
    """The error for a tensor whose shape is not the one that follows from config.json."""
    return InputError(
        f"{checkpoint.name}: tensor {entry.name} in {entry.shard} has shape {list(entry.shape)}, "
        f"config.json asks for {list(expected)}"
    )


def check_rows(checkpoint: Checkpoint, found: Rows, modules: tuple[str, ...], experts: int) -> bool:
    """Check the rows of the MoE layers against the headers; returns whether the experts are quantised.

    Args:
        checkpoint: the files.
        found: the expert-dependent tensors of the MoE layers, by name.
        modules: name of the experts module of every MoE layer.
        experts: experts per layer.

    Raises:
        InputError: experts that the configuration does not have, that are missing or not alike, or a quantised router.
    """
    for key, row in found.items():
        _check_whole_bytes(checkpoint.tensors[key], row)
        if row.expert is not None and row.expert >= experts:
            raise InputError(f"{checkpoint.name}: tensor {key} is of expert {row.expert}, config.json has {experts}")
    quantised = any(t.routed and checkpoint.tensors[k].dtype not in FLOAT_TYPES for k, t in found.items())
    _check_router(checkpoint, found, quantised=quantised)
    if quantised and checkpoint.declared_quantisation:
        _check_every_expert(checkpoint, found, modules, experts)
    else:
        _check_experts_alike(checkpoint, found)
    return quantised


def _check_whole_bytes(entry: TensorEntry, row: ExpertTensor) -> None:
    """One expert's part of a tensor is a whole number of bytes, which types of less than a byte do not ensure."""
    if row.axis is not None and math.prod(entry.shape[row.axis + 1 :]) * DTYPE_BITS[entry.dtype] % 8:
        raise InputError(
            f"tensor {entry.name} in {entry.shard} of shape {list(entry.shape)} of {entry.dtype} shares bytes between "
            "experts, so that it cannot be cut"
        )


def _check_router(checkpoint: Checkpoint, found: Rows, *, quantised: bool) -> None:
    """A router's tensors are floating-point numbers, whatever type the experts are stored in."""
    for key, row in found.items():
        dtype = checkpoint.tensors[key].dtype
        if not row.routed and dtype not in FLOAT_TYPES:
            what = "quantised" if quantised or not dtype.startswith("I") else f"a table of {dtype}"
            raise InputError(
                f"{checkpoint.name}: the router is {what} ({key} of {dtype}), so its experts cannot be separated. "
                "Use a checkpoint whose router is not"
            )


def _check_every_expert(checkpoint: Checkpoint, found: Rows, modules: tuple[str, ...], experts: int) -> None:
    """Every layer of a quantised checkpoint has all experts, which may be stored in different ways."""
    present: list[set[int | None]] = [set() for _ in modules]
    for row in found.values():
        if row.routed:
            present[row.layer].add(row.expert)
    for module, ids in zip(modules, present, strict=True):
        if None not in ids and (missing := set(range(experts)) - ids):
            raise InputError(f"{checkpoint.name}: nothing in the files belongs to expert {min(missing)} of {module}")


def _check_experts_alike(checkpoint: Checkpoint, found: Rows) -> None:
    """Every expert of every layer has the same tensors with the same shapes and types."""
    kinds: dict[str, TensorEntry] = {}
    for key, row in found.items():
        if row.expert is None:
            continue
        entry = checkpoint.tensors[key]
        first = kinds.setdefault(kind_of(key), entry)
        if (entry.shape, entry.dtype) != (first.shape, first.dtype):
            raise InputError(
                f"{checkpoint.name}: tensor {key} in {entry.shard} has shape {list(entry.shape)} of {entry.dtype}, "
                f"{first.name} has {list(first.shape)} of {first.dtype}"
            )


def check_filled(
    checkpoint: Checkpoint,
    targets: Mapping[str, str],
    parameters: Mapping[str, torch.Tensor],
    axes: Mapping[str, int],
    packed: tuple[str, ...],
) -> None:
    """Check that the files have as many numbers for every parameter as it holds.

    Args:
        checkpoint: the files.
        targets: name of the parameter that a tensor fills, by the tensor's name.
        parameters: the model's parameters and buffers, by name.
        axes: expert axis of every expert-dependent parameter, by name.
        packed: experts modules whose weights are packed; these are not checked.

    Raises:
        InputError: nothing fills an expert-dependent parameter, or the numbers do not fit one.
    """
    sources: dict[str, list[TensorEntry]] = {}
    for key, target in targets.items():
        sources.setdefault(target, []).append(checkpoint.tensors[key])
    for key, parameter in parameters.items():
        if key.rpartition(".")[0] in packed:
            continue
        entries = sources.get(key, [])
        if not entries and key in axes:
            raise InputError(f"{checkpoint.name}: nothing in the files fills {key} of shape {list(parameter.shape)}")
        if any(entry.dtype not in FLOAT_TYPES for entry in entries):
            continue  # packed, too
        count = sum(math.prod(entry.shape) for entry in entries)
        if entries and count != parameter.numel():
            if len(entries) == 1:
                raise wrong_shape(checkpoint, entries[0], tuple(parameter.shape))
            raise InputError(
                f"{checkpoint.name}: {key} needs {parameter.numel()} numbers of shape {list(parameter.shape)}, "
                f"the files hold {count}"
            )
