"""Checks on the file of a profile: reads its document and its tensors, gives what a pass can have written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.checkpoints.topology import Topology
from moecover.corpora.sources import check_name
from moecover.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

REMAKE = "Run `moecover profile` again"


def described(about: dict[str, Any]) -> tuple[Topology, list[str]]:
    """The topology and the corpora of a file, after a look at what later stages read of its document.

    Raises:
        KeyError: an entry is missing.
        TypeError: an entry has another type.
        ValueError: a corpus has a name that none can have.
    """
    about["model"]["fingerprint"], about["model"]["name"], about["settings"].items()
    for name, records in about["corpora"].items():
        check_name(name)
        for record in records:
            record["sha256"] + "", record["tokens"] + 0
    return Topology.from_json(about["topology"]), list(about["corpora"])


def checked(
    path: Path,
    tensors: dict[str, NDArray[Any]],
    key: str,
    shape: tuple[int | None, ...],
    dtype: str = "float64",
    *,
    negative: bool = False,
) -> NDArray[Any]:
    """A tensor of the file, of a shape and values that a pass can give.

    Args:
        path: the file, for messages.
        tensors: by name.
        key: the tensor's name.
        shape: None stands for any length.
        dtype: by numpy's name.
        negative: whether its values may be negative.

    Raises:
        InputError: it is missing, or of another kind.
    """
    tensor = tensors.get(key)
    fits = tensor is not None and tensor.ndim == len(shape)
    if tensor is None or not fits or any(b not in (None, a) for a, b in zip(tensor.shape, shape, strict=True)):
        got = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise InputError(f"{path}: {key} is {got}, [{wanted}] is needed. {REMAKE}")
    if tensor.dtype != np.dtype(dtype):
        raise InputError(f"{path}: {key} is of type {tensor.dtype}, {dtype} is needed. {REMAKE}")
    if not np.isfinite(tensor).all() or (not negative and (tensor < 0).any()):
        raise InputError(f"{path}: {key} holds negative or non-finite values. {REMAKE}")
    return tensor
