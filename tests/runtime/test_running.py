"""The common interface: in memory and layer by layer give the same; contexts and hooks are gone afterwards."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moecover.checkpoints.structure import Structure, read_structure
from moecover.errors import MoecoverError
from moecover.runtime.loading import backbone_of, load_model
from moecover.runtime.lockstep import Here, lockstep
from moecover.runtime.masking import masked, masked_layers
from moecover.runtime.running import Running, running, unmasked
from moecover.runtime.streaming import streamed
from tests.conftest import random_corpus
from tests.support.passes import hooks_of


@contextlib.contextmanager
def opened(way: str, structure: Structure) -> Iterator[Running]:
    if way == "memory":
        yield running(load_model(structure), structure)
    else:
        with streamed(structure) as stream:
            yield stream


def calls_of(runs: Running) -> list[Callable[[], torch.Tensor]]:
    """Two forward passes without the head."""
    backbone = backbone_of(runs.module)
    tokens = [torch.from_numpy(random_corpus(sequences=2, seed=seed, vocab=128).tokens) for seed in range(2)]

    def hidden(ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = backbone(input_ids=ids, use_cache=False).last_hidden_state
        return found

    return [functools.partial(hidden, ids) for ids in tokens]


@pytest.mark.parametrize("way", ["memory", "layers"])
def test_masked_calls_run_beside_unmasked_ones(structure: Structure, way: str) -> None:
    """Each call in the contexts of its own, equal to the whole model masked around it."""
    kept = [[0, 1, 4, 7] for _ in structure.topology.decoder_layers]
    model = load_model(structure)
    with torch.inference_mode():
        plain = [call() for call in calls_of(running(model, structure))]
        with masked(model, structure, kept):
            expected = [call() for call in calls_of(running(model, structure))]
    with opened(way, structure) as runs:
        within = masked_layers(runs.module, structure, kept)
        calls = calls_of(runs)
        found = runs.run(calls * 2, head=False, within=[within, within, unmasked, unmasked])
        for one, two in zip(found, [*expected, *plain], strict=True):
            assert torch.equal(one, two)
        assert hooks_of(runs.module) == []


@pytest.mark.parametrize("way", ["memory", "layers"])
@pytest.mark.parametrize("broken", ["context", "call"])
def test_contexts_are_left_on_errors(structure: Structure, way: str, broken: str) -> None:
    inside: list[int] = []

    @contextlib.contextmanager
    def within(number: int) -> Iterator[None]:
        if broken == "context" and number == 1:
            raise RuntimeError("stop")
        inside.append(number)
        try:
            yield
        finally:
            inside.remove(number)

    with opened(way, structure) as runs:

        def fail(*args: object) -> None:
            assert inside == [1]
            raise RuntimeError("stop")

        layer = runs.module.get_submodule(runs.layers[1])
        inner = next(module for module in layer.modules() if not list(module.children()))
        handle = inner.register_forward_pre_hook(fail) if broken == "call" else None
        calls = calls_of(runs)
        with pytest.raises(RuntimeError, match="stop"):
            runs.run(calls, head=False, within=[within] * len(calls))
        if handle is not None:
            handle.remove()
        assert inside == []
        assert hooks_of(runs.module) == []
        if broken == "call":
            assert len(runs.run(calls, head=False, within=[within] * len(calls))) == len(calls)


@pytest.mark.parametrize("tied", [False, True])
def test_layer_after_layer(checkpoints: Callable[..., Path], tied: bool) -> None:
    """The inputs of the layers and the results are the same both ways, with tied embeddings too."""
    structure = read_structure(checkpoints("qwen2_moe", tie_word_embeddings=tied))
    found: dict[str, list[torch.Tensor]] = {}
    for way in ("memory", "layers"):
        with opened(way, structure) as runs:
            here = Here()
            found[way] = [at.args[0].clone() for step in runs.at_layers(calls_of(runs), here) for at in step]
            found[way] += here.results
    assert len(found["memory"]) == 2 * structure.topology.num_layers + 2
    for one, two in zip(found["memory"], found["layers"], strict=True):
        assert torch.equal(one, two)


def test_a_pass_that_leaves_out_a_stop_is_refused() -> None:
    layers = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    steps = lockstep([lambda: layers[0](torch.ones(1))], list(layers))
    assert next(steps)[0].tolist() == [1.0]
    with pytest.raises(MoecoverError, match="ended before it had run every layer once"):
        next(steps)
    assert not any("forward" in vars(layer) for layer in layers)
