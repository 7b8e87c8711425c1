"""Numbers of a GGUF file's tensors, expert by expert: dequantised by the package `gguf` (``moecover[gguf]``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moecover.errors import InputError
from moecover.gguf.parts import GgufFiles
from moecover.gguf.types import TYPE_NUMBERS

if TYPE_CHECKING:
    from numpy.typing import NDArray


def column_squares(files: GgufFiles, name: str) -> NDArray[np.float64]:
    """Squared norm of every column of stacked matrices, float64 ``[expert, column]``; expert by expert.

    Raises:
        InputError: there is no such tensor, its type cannot be dequantised, its weights are not finite, or `gguf` is
            not installed.
    """
    try:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise InputError("weights of a GGUF file are read by the package gguf: pip install 'moecover[gguf]'") from error
    part = next((part for part in files.parts if name in part.tensors), None)
    if part is None:
        raise InputError(f"{files.first.path} has no tensor {name}")
    info = part.tensors[name]
    experts, rows, columns = info.shape
    size = (info.end - info.start) // experts
    found = np.empty((experts, columns))
    with part.path.open("rb") as file:
        file.seek(info.start)
        for expert in range(experts):
            raw = np.frombuffer(file.read(size), dtype=np.uint8).reshape(rows, -1)
            try:
                values = dequantize(raw, GGMLQuantizationType(TYPE_NUMBERS[info.kind.name]))
            except (NotImplementedError, ValueError) as error:
                raise InputError(f"{part.path}: {name} of type {info.kind.name} cannot be read: {error}") from error
            found[expert] = np.square(values, dtype=np.float64).sum(axis=0)
    if not np.isfinite(found).all():
        raise InputError(f"{part.path}: {name} holds weights that are not finite. Fetch or convert it again")
    return found
