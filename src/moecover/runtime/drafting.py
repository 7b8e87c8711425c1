"""Multi-token-prediction layers that run: reads a checkpoint and its live model, gives their outputs on text.

A model's forward pass leaves these layers out; transformers has a model of its own for them, which shares embedding
and head with the whole one. Layer k takes what comes before it (the model's last hidden states for k = 0) at position
t, and the embedding of the token at t + k + 1.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.model_class import BUILDING, parsed_config
from moecover.checkpoints.names import mtp_root
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, is_out_of_memory
from moecover.runtime.loading import device_of, no_bars

if TYPE_CHECKING:
    import torch

    from moecover.runtime.running import Running


def not_run(structure: Structure, model: Running | None = None) -> str | None:
    """Why a checkpoint's multi-token-prediction layers cannot run, in words; None if nothing is against it.

    Args:
        structure: the checkpoint.
        model: that runs, where it is open.
    """
    import transformers

    name, found = structure.checkpoint.name, structure.mtp_layers
    if not found:
        return f"{name} has no multi-token-prediction layers with experts"
    if structure.quantised or structure.checkpoint.declared_quantisation:
        return f"{name} is quantised, and transformers runs these layers unquantised only: profile the original"
    try:
        number = parsed_config(structure.checkpoint.config).get_mtp_config().num_hidden_layers
    except Exception as error:  # the library may raise anything
        if is_out_of_memory(error):
            raise
        return f"transformers {transformers.__version__} does not run these layers of {structure.topology.family}"
    total = structure.topology.num_layers
    if found != tuple(range(total, total + number)):
        return f"config.json of {name} has {number} of these layers, its files have experts in {len(found)}"
    if model is not None and model.by_layer:
        return beside_whole(structure)
    if model is not None and len({one.device for one in model.module.parameters()}) > 1:
        return f"{name} is on several devices, and these layers run beside a model on one only"
    return None


def beside_whole(structure: Structure) -> str:
    """Why the layers do not run beside a model that runs layer by layer."""
    return f"{structure.checkpoint.name} does not fit into memory, and these layers run beside a whole model only"


@dataclass(frozen=True)
class Drafts:
    """The multi-token-prediction layers of a model.

    Attributes:
        model: transformers' model of them.
        module: their decoder layers under the names of a model's, numbered on from its own.
        structure: the checkpoint as if these were all of its MoE layers.
    """

    model: Any
    module: torch.nn.Module
    structure: Structure

    def run(self, hidden: torch.Tensor, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the output of every layer in turn, ``[sequence, position, hidden]``, each a position shorter.

        Layers that no position is left for do not run.

        Args:
            hidden: the model's last hidden states, ``[sequence, position, hidden]``.
            tokens: the ids that it ran on, ``[sequence, position]``, without padding.
        """
        yield from _outputs(self.model, hidden, tokens)


def _outputs(model: Any, hidden: torch.Tensor, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """See `Drafts.run`."""
    import torch

    for layer in range(min(len(model.layers), tokens.shape[1] - 1)):
        positions = torch.arange(layer + 1, tokens.shape[1], device=hidden.device)[None]
        hidden = model.forward_layer(layer, hidden[:, :-1], positions, None, input_ids=tokens[:, layer + 1 :])
        yield hidden


def load_drafts(model: torch.nn.Module, structure: Structure) -> Drafts:
    """Load the multi-token-prediction layers of a checkpoint beside its model, on the device of its last layer.

    Args:
        model: the live model, in memory.
        structure: its checkpoint; `not_run` has no objection.

    Raises:
        InputError: transformers cannot load or run them, or they have no experts where decoder layers do.
    """
    import torch
    import transformers
    from transformers.modeling_layers import MtpModel

    name, numbers = structure.checkpoint.name, structure.mtp_layers
    roots = {str(mtp_root(name, structure.topology.num_layers)) for name in structure.mtp}
    last = model.get_submodule(structure.experts_modules[-1])
    try:
        with BUILDING, no_bars(), _named(model, structure, [rf"^{re.escape(root)}\." for root in sorted(roots)]):
            made = MtpModel.from_pretrained(model, device_map={"": device_of(last)}).eval()
        ids = torch.zeros(1, len(numbers) + 2, dtype=torch.int64, device=device_of(made.embed_tokens))
        states = torch.zeros(*ids.shape, structure.topology.hidden_size, dtype=made.dtype, device=device_of(last))
        with torch.inference_mode():
            tuple(_outputs(made, states, ids))  # what fails, fails here and not in the middle of a pass
    except Exception as error:  # the library may raise anything
        if is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"transformers {transformers.__version__} cannot run the multi-token-prediction layers of {name}: {reason}"
        ) from error
    module = torch.nn.Module()
    module.layers = torch.nn.ModuleDict(
        {str(number): one.mtp_block for number, one in zip(numbers, made.layers, strict=True)}
    )
    module._can_record_outputs = getattr(model, "_can_record_outputs", None)  # type: ignore[assignment]
    inside = re.split(r"\.\d+\.", structure.experts_modules[-1], maxsplit=1)[1]
    modules = tuple(f"layers.{number}.{inside}" for number in numbers)
    try:
        for one in modules:
            module.get_submodule(one)
    except AttributeError as error:
        raise InputError(
            f"the multi-token-prediction layers of {name} have no experts at {inside}, where its decoder layers have "
            "them: not supported"
        ) from error
    topology = replace(structure.topology, decoder_layers=numbers)
    return Drafts(made, module, replace(structure, topology=topology, experts_modules=modules, tables={}))


@contextlib.contextmanager
def _named(model: Any, structure: Structure, patterns: list[str]) -> Iterator[None]:
    """What the library reads these layers by.

    The folder; patterns of names, which it has for real models' only; and what the model keeps in float32, such as the
    biases that DeepSeek-V3 selects experts by, which the library would round in these layers.
    """
    from transformers import modeling_layers as library

    config, before = model.config, (model.config.name_or_path, model._keys_to_ignore_on_load_unexpected)
    loading = library.LoadStateDictConfig
    config.name_or_path, model._keys_to_ignore_on_load_unexpected = str(structure.checkpoint.path), patterns
    precise = functools.partial(loading, dtype_plan=model._get_dtype_plan(config.dtype))
    library.LoadStateDictConfig = precise
    try:
        yield
    finally:
        config.name_or_path, model._keys_to_ignore_on_load_unexpected = before
        library.LoadStateDictConfig = loading
