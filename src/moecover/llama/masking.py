"""A GGUF model with experts masked while it runs: what is left computes what the pruned file computes.

The router's logits of all other experts become minus infinity before the graph goes on to use them, and so do their
scores with a correction bias, which alone could select them. Channels that thinner experts lack become zero before the
down projection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.checkpoints.structure import Structure
from moecover.llama.experts import BIASED_PROBABILITIES, DOWN, TOP_K, holds_logits, named
from moecover.llama.library import Library
from moecover.llama.model import Model, Session
from moecover.llama.tensors import Tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

Kept = Sequence[Sequence[int]]
KeptChannels = Sequence[Sequence[Sequence[int]]]  # by MoE layer and kept expert


class Mask:
    """A watch (`model.Watch`) that masks experts, and channels of those that stay.

    Args:
        library: that runs the model.
        decoder_layers: blocks with experts, in order.
        experts: of a layer.
        kept: ids that stay, by MoE layer.
        channels: ids that stay of the channels of every kept expert; None for all.
        width: channels of an expert.
    """

    def __init__(
        self,
        library: Library,
        decoder_layers: Sequence[int],
        experts: int,
        kept: Kept,
        channels: KeptChannels | None = None,
        width: int = 0,
    ) -> None:
        self._library, self._tensors = library, Tensors(library)
        self._dropped: dict[int, NDArray[np.bool_]] = {}
        self._missing: dict[
            int, NDArray[np.bool_]
        ] = {}  # channels of every expert that it lacks, ``[expert, channel]``
        for layer, number in enumerate(decoder_layers):
            self._dropped[number] = np.ones(experts, bool)
            self._dropped[number][list(kept[layer])] = False
            if channels is not None:
                lacks = np.ones((experts, width), bool)
                for expert, ids in zip(kept[layer], channels[layer], strict=True):
                    lacks[expert, list(ids)] = False
                self._missing[number] = lacks
        self._selected: dict[int, Any] = {}
        self._entering: dict[bytes, int] = {}  # names of the inputs of down projections, known after a first run

    def __call__(self, tensor: Any, ask: bool) -> bool:
        """See `model.Watch`."""
        name = self._tensors.name(tensor)
        what, number = named(name)
        if number not in self._dropped and name not in self._entering:
            return False
        routing = holds_logits(what, tensor, self._library.ffi.NULL) or what == BIASED_PROBABILITIES
        if ask:
            if what == TOP_K:
                self._selected[number] = tensor
            elif what == DOWN and self._missing:
                self._entering[self._tensors.name(tensor.src[1])] = number
            return routing or name in self._entering
        if routing:
            self._tensors.edit(tensor, lambda scores: self._mask(scores, number))
        else:
            self._tensors.edit(tensor, lambda values: self._thin(values, self._entering[name]))
        return True

    def _mask(self, scores: NDArray[Any], number: int) -> None:
        """Minus infinity for ``[token, expert]``."""
        scores[..., self._dropped[number]] = -np.inf

    def _thin(self, values: NDArray[Any], number: int) -> None:
        """Zero for ``[token, slot, channel]``."""
        ids = np.ascontiguousarray(self._tensors.array(self._selected[number]))
        lacks = self._missing[number][ids.reshape(-1)]
        values.reshape(lacks.shape)[lacks] = 0


def mask_of(structure: Structure, library: Library, kept: Kept, channels: KeptChannels | None) -> Mask:
    """The mask for a model; see `Mask`."""
    topology = structure.topology
    width = 0 if isinstance(structure.width, str) else structure.width.channels
    return Mask(library, topology.decoder_layers, topology.num_experts, kept, channels, width)


@contextlib.contextmanager
def masked_session(model: Model, mask: Mask, length: int, *, threads: int) -> Iterator[Session]:
    """A session in which the model runs masked; see `Model.session`."""
    with model.session(length, threads=threads, watch=mask) as session:
        for _ in session.run(np.zeros(1, np.int64)):  # shows the mask what enters the down projections
            pass
        yield session
