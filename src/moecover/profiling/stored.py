"""The tensors of a profile's file: their names, and checks on them; gives what a pass can have written.

A tensor is named ``{corpus}/{statistic}``, those of multi-token-prediction layers ``{corpus}/mtp/{statistic}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.checkpoints.topology import Topology
from moecover.corpora.sources import check_name
from moecover.errors import InputError
from moecover.profiling.statistics import COUNTS, LATER, STATISTICS, Statistics, known
from moecover.profiling.wide import CHANNELS, WIDE, wide_shape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Wide = dict[str, dict[str, NDArray[np.float64]]]  # by statistic and corpus

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


def named(
    statistics: Mapping[str, Statistics], parts: Mapping[str, Statistics], wide: Wide, inside: str = ""
) -> dict[str, NDArray[Any]]:
    """The statistics of a profile by the names that they have in its file.

    Args:
        statistics: by corpus, see `Profile`.
        parts: likewise.
        wide: likewise.
        inside: what stands between the corpus and the statistic.
    """
    found = {f"{corpus}/{inside}{n}": v for corpus, s in statistics.items() for n, v in s.items() if known(n, s)}
    found |= {f"{corpus}/{inside}{n}/parts": v for corpus, s in parts.items() for n, v in s.items() if known(n, s)}
    return found | {f"{corpus}/{inside}{name}": v for name, of in wide.items() for corpus, v in of.items()}


def read_named(
    path: Path, tensors: dict[str, NDArray[Any]], topology: Topology, names: Sequence[str], inside: str = ""
) -> tuple[dict[str, Statistics], dict[str, Statistics], Wide]:
    """What `named` was given, for a file's corpora.

    Raises:
        InputError: tensors are missing, or of another kind.
    """
    shape = (len(topology.decoder_layers), topology.num_experts)
    statistics, parts = dict[str, Statistics](), dict[str, Statistics]()
    wide: Wide = {name: {} for name in WIDE}
    width: int | None = None  # of the first corpus that has one, then of all

    def values(key: str, name: str, *before: None) -> NDArray[Any]:
        if name in LATER and key not in tensors:
            return np.full(tensors[key.replace(name, COUNTS[0])].shape, np.nan)
        dtype = "int64" if name in COUNTS else "float64"
        return checked(path, tensors, key, (*before, *shape), dtype, negative=name not in COUNTS)

    for corpus in names:
        stem = f"{corpus}/{inside}"
        statistics[corpus] = {n: values(f"{stem}{n}", n) for n in STATISTICS}
        if f"{stem}count/parts" in tensors:
            parts[corpus] = {n: values(f"{stem}{n}/parts", n, None) for n in STATISTICS}
        for name in WIDE:
            if (key := f"{stem}{name}") in tensors:
                wide[name][corpus] = checked(path, tensors, key, wide_shape(name, topology, width))
        width = wide[CHANNELS][corpus].shape[-1] if corpus in wide[CHANNELS] else width
    return statistics, parts, wide
