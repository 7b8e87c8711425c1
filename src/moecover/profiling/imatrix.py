"""A profile from importance matrices of llama.cpp: reads one a corpus, and a GGUF model, gives what they tell.

An importance matrix knows how many tokens an expert was given and the squares of what enters its projections, but no
routing weights. What needs these is not a number in such a profile.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moecover.checkpoints.opening import Model, described
from moecover.checkpoints.topology import Topology
from moecover.corpora.sources import check_name
from moecover.errors import InputError, arg
from moecover.files.hashing import file_hash
from moecover.gguf.imatrix import Imatrix, read_imatrix
from moecover.gguf.parts import GgufFiles
from moecover.gguf.weights import column_squares
from moecover.profiling.artifact import Profile
from moecover.profiling.records import ModelRecord, model_record
from moecover.profiling.statistics import STATISTICS, Statistics
from moecover.progress import Progress, resolve

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moecover.checkpoints.structure import Structure

UNKNOWN: ModelRecord = {"name": "unknown", "revision": None, "fingerprint": ""}


def imatrix_profile(
    files: Mapping[str, str | Path], *, model: Model | None = None, progress: bool | Progress = True
) -> Profile:
    """What importance matrices tell of the experts, as a profile to plan from.

    ``count`` and ``num_tokens`` are exact. With a model, ``norm_sum`` is estimated as sqrt(count x sum over channels j
    of in_sum2_j ||W_down[:, j]||^2), and ``channels`` as in_sum2_j ||W_down[:, j]||^2: without the routing weights and
    without what channels share. All other statistics are NaN.

    Args:
        files: ``imatrix.gguf`` by name of the corpus.
        model: the GGUF file that they are of, in any quantisation; None plans by counts alone, and knows neither the
            groups of a router nor its top-k but from the counts.
        progress: True logs on stderr or in a notebook; False is silent.

    Raises:
        InputError: what `read_imatrix` and `column_squares` raise, or files that do not fit each other or the model.
    """
    shown = resolve(progress)
    for name in files:
        check_name(name)
    read = {name: read_imatrix(Path(path).expanduser()) for name, path in files.items()}
    if not read:
        raise InputError(f"give {arg('imatrix')}: an importance matrix for each corpus")
    structure = None if model is None else described(model, progress=shown)
    topology = _topology(read) if structure is None else structure.topology
    for name, one in read.items():
        _check(name, one, topology, structure)
    squares = dict[int, "NDArray[np.float64]"]()
    if structure is not None:
        weights = _of_gguf(structure)
        with shown.bar("reading weights", len(topology.decoder_layers), unit="layers") as advance:
            for block in topology.decoder_layers:
                squares[block] = column_squares(weights, f"blk.{block}.ffn_down_exps.weight")
                advance(1)
    return Profile(
        topology,
        {name: _statistics(one, topology, squares) for name, one in read.items()},
        {name: [_record(one, topology)] for name, one in read.items()},
        UNKNOWN if structure is None else model_record(structure),
        channels={name: _energy(one, topology, squares) for name, one in read.items()} if squares else {},
    )


def _of_gguf(structure: Structure) -> GgufFiles:
    if structure.checkpoint.gguf is None:
        raise InputError(
            f"{arg('model', structure.checkpoint.name)} is no GGUF file. Give the one that the importance matrix is "
            "of, in any quantisation"
        )
    return structure.checkpoint.gguf


def _topology(read: Mapping[str, Imatrix]) -> Topology:
    """The shape of the model as far as counts tell."""
    first = next(iter(read.values()))
    if not first.tokens:
        raise InputError(
            f"{first.path} counts the experts' matrices alone, so their top-k is not known: give {arg('model')}"
        )
    layers = tuple(first.count)
    top_k = round(float(first.count[layers[0]].sum() / first.tokens))
    return Topology("unknown", layers, len(first.count[layers[0]]), max(1, top_k), 0, layers[-1] + 1)


def _check(name: str, one: Imatrix, topology: Topology, structure: Structure | None) -> None:
    """Refuse an importance matrix that is of another model.

    Raises:
        InputError: says what differs.
    """
    whose = "the first" if structure is None else structure.checkpoint.name
    layers, experts = tuple(one.count), len(next(iter(one.count.values())))
    channels = {found.shape[1] for found in one.squares.values()}
    if layers != topology.decoder_layers or experts != topology.num_experts:
        raise InputError(
            f"{name}: {one.path} has {len(layers)} blocks of {experts} experts, {whose} has "
            f"{len(topology.decoder_layers)} of {topology.num_experts}: they are of different models"
        )
    if structure is not None and not isinstance(structure.width, str) and channels != {structure.width.channels}:
        raise InputError(
            f"{name}: {one.path} has experts of {', '.join(map(str, sorted(channels)))} channels, {whose} of "
            f"{structure.width.channels}: they are of different models"
        )


def _tokens(one: Imatrix, topology: Topology) -> int:
    return one.tokens or round(float(one.count[topology.decoder_layers[0]].sum() / topology.top_k))


def _statistics(one: Imatrix, topology: Topology, squares: Mapping[int, NDArray[np.float64]]) -> Statistics:
    count = np.array([one.count[block] for block in topology.decoder_layers])
    found: Statistics = {name: np.full(count.shape, np.nan) for name in STATISTICS}
    found |= {"count": count, "num_tokens": np.full_like(count, _tokens(one, topology))}
    if squares:
        energy = _energy(one, topology, squares).sum(axis=-1)
        found["norm_sum"] = np.sqrt(count * energy)
    return found


def _energy(one: Imatrix, topology: Topology, squares: Mapping[int, NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.array([one.squares[block] * squares[block] for block in topology.decoder_layers])


def _record(one: Imatrix, topology: Topology) -> dict[str, object]:
    """What is recorded of a corpus: nothing is known of its text but what the file says."""
    return {
        "source": one.path.name,
        "sha256": file_hash(one.path),
        "tokens": _tokens(one, topology),
        "chunks": one.chunks,
        "chunk_size": one.chunk_size,
    }
