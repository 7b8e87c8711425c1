"""The text that a search runs on, and the hidden states that enter each MoE layer on it: from disk or by running it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.corpora.batches import batches
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, MoecoverError
from moecover.profiling.layer_inputs import Inputs
from moecover.runtime.loading import backbone_of, device_of
from moecover.runtime.lockstep import Here, Passing

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.structure import Structure
    from moecover.profiling.artifact import Profile
    from moecover.runtime.running import Running, Within


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
        inputs, backbone = self._inputs(runs), backbone_of(runs.module)
        calls = [functools.partial(backbone, **one, use_cache=False) for one in inputs]
        with contextlib.closing(runs.arrivals(calls, stops)) as steps:
            for arrived in steps:
                yield _tokens(arrived, inputs)

    def side_by_side(
        self, runs: Running, structure: Structure, stops: Sequence[torch.nn.Module], masked: Within
    ) -> Generator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Hidden states per batch of the full model and of the pruned one, layer after layer.

        Both passes run side by side, each decoder layer up to its MoE block first.

        Args:
            runs: the model.
            structure: its checkpoint.
            stops: modules that see what the experts of each MoE layer see.
            masked: the context in which a decoder layer of the pruned model runs.
        """
        inputs, backbone = self._inputs(runs), backbone_of(runs.module)
        calls = [functools.partial(backbone, **one, use_cache=False) for one in inputs] * 2
        around = contextlib.ExitStack()

        def enter(at: Passing) -> None:
            if at.call >= len(inputs):
                around.enter_context(masked(at.stop))

        layer_of = {number: layer for layer, number in enumerate(structure.topology.decoder_layers)}
        here = Here(before=enter, after=lambda at: around.close())
        with around, contextlib.closing(runs.at_layers(calls, here)) as steps:
            for number, waiting in enumerate(steps):
                if (layer := layer_of.get(number)) is None:
                    continue
                module = runs.module.get_submodule(runs.layers[number])
                found = [_arrived(module, stops[layer], passing) for passing in waiting]
                whole, pruned = found[: len(inputs)], found[len(inputs) :]
                yield _tokens(whole, inputs), _tokens(pruned, inputs)
                if layer == len(layer_of) - 1:
                    break

    def _inputs(self, runs: Running) -> list[dict[str, torch.Tensor]]:
        """The model inputs of every batch."""
        return [
            {key: value.to(runs.device) for key, value in batch.items()}
            for corpus in self.texts
            for batch in batches(corpus, self.batch_size)
        ]

    def from_disk(self, runs: Running, structure: Structure) -> Generator[list[torch.Tensor]]:
        """The stored hidden states, layer after layer, while the layer's weights are loaded."""
        assert self.stored is not None
        for layer, number in enumerate(structure.topology.decoder_layers):
            with runs.loaded(number):
                device = device_of(runs.module.get_submodule(structure.experts_modules[layer]))
                yield [hidden.to(device, runs.dtype) for hidden in self.stored.layer(layer)]


class _ArrivedError(Exception):
    """Ends a decoder layer's run at its MoE block, which is called with ``hidden``."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


def _arrived(layer: torch.nn.Module, stop: torch.nn.Module, passing: Passing) -> torch.Tensor:
    """What a module in a decoder layer is called with first, where a pass waits at the layer."""

    def arrive(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        raise _ArrivedError(args[0] if args else next(iter(kwargs.values())))

    handle = stop.register_forward_pre_hook(arrive, with_kwargs=True)
    try:
        layer(*passing.args, **passing.kwargs)
    except _ArrivedError as arrived:
        return arrived.hidden
    finally:
        handle.remove()
    raise MoecoverError("a decoder layer did not run its experts: please report this")


def _tokens(arrived: Sequence[torch.Tensor], inputs: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Hidden states ``[token, hidden]`` of every batch without padding."""
    return [
        hidden.reshape(-1, hidden.shape[-1])[
            one["attention_mask"].flatten().bool().to(hidden.device) if "attention_mask" in one else slice(None)
        ]
        for hidden, one in zip(arrived, inputs, strict=True)
    ]


def sample_of(profile: Profile, given: Sequence[Corpus] | None) -> Sample:
    """The text to search on: what was given, else the sample that the profile keeps.

    Raises:
        InputError: neither is there.
    """
    if given is not None:
        if "batch_size" not in profile.settings:
            raise InputError("the search runs in the profile's batches, but its batch size is not known (of a sum)")
        return Sample(given, profile.settings["batch_size"], None)
    if profile.inputs is None:
        raise InputError(
            "the search needs the inputs of the layers, which this profile does not hold. Make it with "
            "`moecover profile ... --keep-inputs 8192`"
        )
    return Sample(profile.inputs.sequences(), profile.inputs.batch_size, profile.inputs)
