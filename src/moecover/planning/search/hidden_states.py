"""The text that a search runs on, and the hidden states that enter each MoE layer on it: from disk or by running it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.corpora.batches import batches
from moecover.corpora.packing import Corpus
from moecover.errors import InputError
from moecover.profiling.layer_inputs import Inputs
from moecover.runtime.loading import backbone_of

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.structure import Structure
    from moecover.profiling.artifact import Profile
    from moecover.runtime.running import Running


@dataclass(frozen=True)
class Sample:
    """The calibration text of a search.

    Attributes:
        texts: one per corpus.
        batch_size: sequences per batch.
        stored: its hidden states on disk; None for a text that must run.
    """

    texts: Sequence[Corpus]
    batch_size: int
    stored: Inputs | None

    @property
    def corpus_of(self) -> list[int]:
        """Index of the corpus of every batch."""
        return [i for i, corpus in enumerate(self.texts) for _ in range(0, len(corpus.tokens), self.batch_size)]

    def running(self, runs: Running, stops: Sequence[torch.nn.Module]) -> Generator[list[torch.Tensor]]:
        """Hidden states ``[token, hidden]`` per batch, layer after layer, as the layers before leave them.

        Args:
            runs: the model.
            stops: modules that see what the experts of each MoE layer see.
        """
        backbone = backbone_of(runs.module)
        inputs = [
            {key: value.to(runs.device) for key, value in batch.items()}
            for corpus in self.texts
            for batch in batches(corpus, self.batch_size)
        ]
        calls = [functools.partial(backbone, **one, use_cache=False) for one in inputs]
        with contextlib.closing(runs.arrivals(calls, stops)) as steps:
            for arrived in steps:
                yield [
                    hidden.reshape(-1, hidden.shape[-1])[
                        one["attention_mask"].flatten().bool() if "attention_mask" in one else slice(None)
                    ]
                    for hidden, one in zip(arrived, inputs, strict=True)
                ]

    def from_disk(self, runs: Running, structure: Structure) -> Generator[list[torch.Tensor]]:
        """The stored hidden states, layer after layer, while the layer's weights are loaded."""
        assert self.stored is not None
        for layer, number in enumerate(structure.topology.decoder_layers):
            with runs.loaded(number):
                yield [hidden.to(runs.device, runs.dtype) for hidden in self.stored.layer(layer)]


def sample_of(profile: Profile, given: Sequence[Corpus] | None) -> Sample:
    """The text to search on: what was given, else the sample that the profile keeps.

    Raises:
        InputError: neither is there.
    """
    if given is not None:
        return Sample(given, profile.settings["batch_size"], None)
    if profile.inputs is None:
        raise InputError(
            "the search needs the inputs of the layers, which this profile does not hold. Make it with "
            "`moecover profile ... --keep-inputs 8192`"
        )
    return Sample(profile.inputs.sequences(), profile.inputs.batch_size, profile.inputs)
