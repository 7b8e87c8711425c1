"""A walk over the MoE layers of a running model: what enters each on a sample of text, and a function of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from moecover.planning.fitting import check_model
from moecover.planning.options import LAYERWISE
from moecover.planning.search.driver import arriving, live_layers
from moecover.planning.search.hidden_states import sample_of
from moecover.planning.search.live_layer import LiveLayer
from moecover.runtime.distributed import shared_out
from moecover.runtime.running import Running, running

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.structure import Structure
    from moecover.corpora.packing import Corpus
    from moecover.profiling.artifact import Profile

T = TypeVar("T")


def over_layers(
    of_layer: Callable[[LiveLayer, Sequence[torch.Tensor]], T],
    profile: Profile,
    model: torch.nn.Module | Running,
    structure: Structure,
    *,
    sample: Sequence[Corpus] | None,
    advance: Callable[[int], None],
) -> list[T]:
    """What a function gives for every MoE layer; several processes share the layers.

    Args:
        of_layer: from a layer and what enters it, calibration batches ``[token, hidden]``.
        profile: of the model.
        model: the live model, from `load_model`, or a `Running` one.
        structure: its checkpoint.
        sample: token ids to run on instead of the sample that the profile keeps.
        advance: called with 1 after every layer.

    Raises:
        InputError: the model is not the profile's, or there is no sample.
    """
    import torch

    check_model(profile, structure)
    text, runs = sample_of(profile, sample), running(model, structure)
    live, stops = live_layers(runs, structure)

    def some(mine: Sequence[int]) -> list[T]:
        found, walk = list[T](), arriving(LAYERWISE, text, runs, structure, stops, live, [])
        with torch.inference_mode(), contextlib.closing(walk):
            for layer, (hidden, _) in enumerate(walk):
                if layer in mine:
                    found.append(of_layer(live[layer], hidden))
                advance(1)
        return found

    return shared_out(runs.world, range(len(live)), some)
