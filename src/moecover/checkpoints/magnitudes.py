"""How large the weights of every expert are: reads the experts' weights from disk once, gives sums over them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moecover.checkpoints.header import TensorEntry
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK = 2**24  # numbers that are in memory at a time
NARROW = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}  # numpy knows no bfloat16


def check_magnitudes(structure: Structure) -> None:
    """Refuse a checkpoint whose weights cannot be compared as they are stored; from the headers.

    Raises:
        InputError: the weights are quantised.
    """
    if structure.quantised:
        raise InputError(
            f"{structure.checkpoint.name}: weights stored as {structure.quantised} are not compared. Use the "
            "checkpoint before it was quantised, or another method"
        )


def magnitudes(structure: Structure) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Sum of |w|, sum of w^2 and number of the weights of every expert, each ``[layer, expert]``; biases are left out.

    Raises:
        InputError: the weights are quantised or of another type than float, or not finite.
    """
    shape = (len(structure.topology.decoder_layers), structure.topology.num_experts)
    absolute, squared, number = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    check_magnitudes(structure)
    for name, row in structure.tensors.items():
        entry = structure.checkpoint.tensors[name]
        if not row.routed or len(entry.shape) < (2 if row.axis is None else 3):
            continue
        experts = [row.expert] if row.expert is not None else range(shape[1])
        for at, expert in enumerate(experts):
            one, two, weights = _sums(structure, entry, row.axis, at)
            absolute[row.layer, expert] += one
            squared[row.layer, expert] += two
            number[row.layer, expert] += weights
        if not np.isfinite(squared[row.layer]).all():
            raise InputError(f"{structure.checkpoint.name}: {name} holds weights that are not finite")
    return absolute, squared, number


def _sums(structure: Structure, entry: TensorEntry, axis: int | None, at: int) -> tuple[float, float, int]:
    """Sum of |w|, sum of w^2 and number of the weights at a place of an axis (None: of the whole tensor)."""
    if entry.dtype not in NARROW:
        raise InputError(f"{structure.checkpoint.name}: {entry.name} of type {entry.dtype} cannot be read as numbers")
    stored = np.memmap(
        structure.checkpoint.path / entry.shard, NARROW[entry.dtype], "r", entry.start, shape=tuple(entry.shape)
    )
    values = stored if axis is None else np.moveaxis(stored, axis, 0)[at]
    absolute = squared = 0.0
    step = max(1, CHUNK // max(1, values[0].size))
    for start in range(0, len(values), step):
        chunk = np.ascontiguousarray(values[start : start + step])
        if entry.dtype == "BF16":
            chunk = (chunk.astype("<u4") << 16).view("<f4")
        chunk = np.abs(chunk, dtype=np.float64)
        absolute += float(chunk.sum())
        squared += float(np.square(chunk, out=chunk).sum())
    return absolute, squared, int(values.size)
