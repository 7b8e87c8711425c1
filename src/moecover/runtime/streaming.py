"""A model whose decoder layers are in memory one at a time: reads a checkpoint, gives a `Running` model.

All batches go through one layer before the next one is loaded (`layerwise`), so that the weights are read once,
whatever the number of batches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.deepseek.registration import register_deepseek
from moecover.checkpoints.model_class import BUILDING, auto_class
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError
from moecover.runtime import layerwise
from moecover.runtime.devices import check_device
from moecover.runtime.loadable import check_loadable
from moecover.runtime.loading import missing_tensors
from moecover.runtime.lockstep import Here, Passing
from moecover.runtime.running import Result, Within, layer_names
from moecover.runtime.weights import Weights, limit_caches
from moecover.runtime.world import ALONE, World

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Streamed:
    """A model on ``meta`` whose parts are loaded when they are needed; see `Running`.

    Attributes:
        module: the model; what lies outside the parts below is always in memory.
        layers: names of the decoder layers, in order.
        ends: names of the token embedding, which is loaded until all passes have entered the first layer, and of the
            head, which is loaded from the last layer on; None where they share their weights and stay in memory.
        weights: loads and frees the parts.
        device: where they run.
        spill: keep the hidden states between layers in files instead of memory, where a state of the pass is kept.
        room: tokens whose hidden states may be held between two layers, where the passes can run in parts.
        world: see `Running.world`.
    """

    module: torch.nn.Module
    layers: tuple[str, ...]
    ends: tuple[str, str] | None
    weights: Weights
    device: torch.device
    spill: bool = False
    room: float = math.inf
    world: World = ALONE

    by_layer = True

    @property
    def dtype(self) -> torch.dtype:
        """See `Running.dtype`."""
        return next(self.module.parameters()).dtype

    def run(
        self, calls: Sequence[Callable[[], Result]], *, head: bool = True, within: Sequence[Within] = ()
    ) -> list[Result]:
        """See `Running.run`."""
        return layerwise.run(self, calls, head=head, within=within)

    def at_layers(self, calls: Sequence[Callable[[], object]], here: Here) -> Generator[list[Passing]]:
        """See `Running.at_layers`."""
        return layerwise.at_layers(self, calls, here)

    def arrivals(
        self, calls: Sequence[Callable[[], object]], modules: Sequence[torch.nn.Module]
    ) -> Generator[list[torch.Tensor]]:
        """See `Running.arrivals`."""
        return layerwise.arrivals(self, calls, modules)

    @contextlib.contextmanager
    def loaded(self, number: int) -> Iterator[None]:
        """See `Running.loaded`."""
        self.weights.load(f"{self.layers[number]}.")
        try:
            yield
        finally:
            self.weights.free(f"{self.layers[number]}.", again=True)


def skeleton(structure: Structure, *, dtype: str = "auto") -> torch.nn.Module:
    """The model of a checkpoint with its buffers but no memory for its parameters, in evaluation mode.

    Raises:
        InputError: the weights are quantised.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    check_loadable(structure, dtype)
    if how := structure.quantised or structure.checkpoint.declared_quantisation:
        raise InputError(
            f"{structure.checkpoint.name} is quantised ({how}), which does not run layer by layer. Use"
            " the original that it was made from"
        )
    register_deepseek()
    config = AutoConfig.from_pretrained(structure.checkpoint.path, trust_remote_code=False, local_files_only=True)
    if dtype == "auto":
        kind = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None) or torch.float32
    else:
        kind = getattr(torch, dtype)
    auto = auto_class(type(config))
    with BUILDING, init_empty_weights(include_buffers=False):
        model: torch.nn.Module = auto.from_config(config, dtype=kind)
    return model.eval()


@contextlib.contextmanager
def streamed(
    structure: Structure,
    *,
    dtype: str = "auto",
    device: str = "auto",
    spill: bool = False,
    room: float = math.inf,
    world: World = ALONE,
) -> Iterator[Streamed]:
    """Open a model that runs layer by layer; its memory is freed when the block ends.

    Args:
        structure: the checkpoint.
        dtype: torch dtype by name, ``auto`` for the checkpoint's.
        device: torch device by name, ``auto`` for the first GPU, else the CPU.
        spill: see `Streamed`.
        room: see `Streamed`.
        world: see `Streamed`.

    Raises:
        InputError: unknown dtype or device, quantised weights, or tensors that are missing in the files.
    """
    import torch

    device = check_device(dtype, device)
    limit_caches()
    model = skeleton(structure, dtype=dtype)
    layers, ends = layer_names(model, structure), _ends(model)
    weights = Weights(structure, model, (*layers, *(ends or ())), device, ahead=torch.device(device).type != "cpu")
    with contextlib.closing(weights):
        if missing := weights.missing():
            raise missing_tensors(structure.checkpoint.name, missing)
        weights.load("")
        for owner in model.modules():  # buffers that are not in the files
            owner._buffers = {k: v if v is None or v.is_meta else v.to(device) for k, v in owner._buffers.items()}
        if ends is None:
            empty = {name for name, value in model.state_dict().items() if value.is_meta}
            model.tie_weights(missing_keys=empty, recompute_mapping=False)  # type: ignore[operator]
        yield Streamed(model, layers, ends, weights, torch.device(device), spill, room, world)


def _ends(model: Any) -> tuple[str, str] | None:
    """Names of the token embedding and of the head; None where they share their weights."""
    if getattr(model, "all_tied_weights_keys", None):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    if head is None:  # a wrapper around a causal language model
        head = model.language_model.get_output_embeddings()
    return names[id(model.get_input_embeddings())], names[id(head)]
