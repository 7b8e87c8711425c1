"""What in a model depends on the experts: reads a checkpoint's configuration and headers, gives its topology.

No table of families is needed. The model class is built on torch's ``meta`` device (no memory) with E and with 2 E
experts: whatever tensor changes its shape has an expert axis, and where. The library's own conversion mapping leads from
the names on disk to those parameters. A family that this reading does not fit is refused before any work.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.config_edit import (
    COUNT_KEYS,
    GROUP_KEYS,
    QUANTISATION_FILES,
    TOP_K_KEYS,
    expert_count_keys,
    quantisation,
    with_expert_count,
)
from moecover.checkpoints.expert_tensors import ExpertTensor, Tensors, classify, layer_number
from moecover.checkpoints.families import PROVEN_FAMILIES, UNSUPPORTED
from moecover.checkpoints.source import Checkpoint, open_checkpoint
from moecover.checkpoints.topology import Topology
from moecover.errors import InputError
from moecover.signals import held

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Structure:
    """A checkpoint read with its topology.

    Attributes:
        checkpoint: the files.
        topology: shape of the routed part.
        tensors: the expert-dependent tensors on disk, by name.
        parameters: expert axis of every expert-dependent parameter or buffer of the live model, by name.
        experts_modules: dotted name of the experts module of every MoE layer.
        count_keys: paths of the expert-count keys in config.json.
        mtp: all tensors of the multi-token-prediction layers that have experts, see `tensors.Tensors`.
        quantised: how the experts are stored, None where they are plain numbers.
        warnings: what the user should know before using the result.
    """

    checkpoint: Checkpoint
    topology: Topology
    tensors: dict[str, ExpertTensor]
    parameters: dict[str, int]
    experts_modules: tuple[str, ...]
    count_keys: tuple[tuple[str, ...], ...]
    mtp: dict[str, ExpertTensor | None]
    quantised: str | None
    warnings: tuple[str, ...]

    @functools.cached_property
    def expert_num_bytes(self) -> int:
        """Bytes of one expert of one layer on disk, its router rows included (mean over the layers)."""
        return self.expert_total_bytes // (self.topology.num_experts * len(self.topology.decoder_layers))

    @functools.cached_property
    def expert_total_bytes(self) -> int:
        """Bytes of everything that depends on the experts: a multiple of their number."""
        total = 0
        for name, row in self.tensors.items():
            entry = self.checkpoint.tensors[name]
            places = 1 if row.axis is None else entry.shape[row.axis]
            total += entry.num_bytes // places * (places - row.tail)
        return total

    def num_bytes(self, keep: int, *, mtp: str = "drop") -> int:
        """Bytes of all tensors when ``keep`` experts per layer remain; multi-token-prediction layers as in `prune`."""
        removed, sizes = self.topology.num_experts - keep, self.checkpoint.tensors
        goes = self.expert_total_bytes // self.topology.num_experts * removed
        if mtp == "drop":
            goes += sum(sizes[name].num_bytes for name in self.mtp)
        else:
            cut = sum(sizes[name].num_bytes for name, row in self.mtp.items() if row)
            goes += cut // self.topology.num_experts * removed
        return self.checkpoint.num_bytes - goes

    @functools.cached_property
    def model_fingerprint(self) -> str:
        """Hash of the topology and of the routers' bytes: the same for every copy of a model, whatever its sharding."""
        digest = hashlib.sha256(self.topology.fingerprint.encode())
        for name in sorted(n for n, t in self.tensors.items() if not t.routed):
            entry = self.checkpoint.tensors[name]
            digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
            with (self.checkpoint.path / entry.shard).open("rb") as file:
                digest.update(os.pread(file.fileno(), entry.num_bytes, entry.start))
        return digest.hexdigest()


def auto_class(config_class: type) -> Any:
    """The Auto class that makes a language model of a configuration class, multimodal ones included; None for others."""
    import transformers
    from transformers.models.auto import modeling_auto

    if config_class in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if config_class in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    return None


def build_on_meta(config: dict[str, Any], name: str) -> torch.nn.Module:
    """The model class of a raw config without memory.

    Raises:
        InputError: transformers does not know the architecture, or cannot build it.
    """
    with held():
        import torch
        import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = str(config.get("model_type"))
    if family not in CONFIG_MAPPING:
        raise InputError(f"{name}: architecture {family!r} is not known to transformers {transformers.__version__}, and code that comes with a checkpoint is not run")  # fmt: skip
    try:
        parsed = CONFIG_MAPPING[family].from_dict(transformers.PreTrainedConfig._decode_special_floats(config))
        if (auto := auto_class(type(parsed))) is None:
            raise InputError(f"{name}: architecture {family!r} is no causal language model")
        with torch.device("meta"):
            model: torch.nn.Module = auto.from_config(parsed)
            return model
    except InputError:
        raise
    except Exception as error:  # whatever the library raises on a configuration that it cannot build
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{name}: transformers cannot build {family!r} from config.json: {reason}") from error


def _expert_axes(one: torch.nn.Module, two: torch.nn.Module, experts: int, name: str, *, tail: bool) -> dict[str, int]:
    """Parameters and buffers whose shape follows the expert count, with the axis that does.

    With ``tail`` an axis may go on behind the experts. That these come first no shape tells: only for proven families.
    """
    wide = dict(two.state_dict())
    axes = {}
    for key, tensor in one.state_dict().items():
        changed = [i for i, (a, b) in enumerate(zip(tensor.shape, wide[key].shape, strict=True)) if a != b]
        if not changed:
            continue
        places, more = tensor.shape[changed[0]], wide[key].shape[changed[0]] - tensor.shape[changed[0]]
        if len(changed) > 1 or more != experts or places < experts or (places > experts and not tail):
            raise InputError(f"{name}: {key} of shape {list(tensor.shape)} depends on the expert count in a way that is not supported")  # fmt: skip
        axes[key] = changed[0]
    return axes


def read_structure(model: str | Path | Checkpoint, *, revision: str | None = None) -> Structure:
    """Topology and expert-dependent tensors of a checkpoint, from its configuration and headers only.

    What a process that has not loaded transformers reads is remembered on this machine, see `structures`.

    Args:
        model: folder, hub id, or a checkpoint already opened.
        revision: branch, tag or commit of a hub model.

    Raises:
        InputError: no routed experts, an architecture that is unknown or does not fit, or tensors that do not match it.
    """
    from moecover.checkpoints.structure_cache import place_of, recall, remember

    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model, revision=revision)
    place = place_of(checkpoint)
    structure = recall(checkpoint, place) if place else None
    if structure is None:
        structure = _derived(checkpoint)
        if place:
            remember(structure, place)
    return structure


def _derived(checkpoint: Checkpoint) -> Structure:
    """The structure by the model class: what `read_structure` gives and raises."""
    config, name = checkpoint.config, checkpoint.name
    counts = expert_count_keys(config)
    if reason := UNSUPPORTED.get(str(config.get("model_type"))):
        raise InputError(f"{name}: {config['model_type']} is not supported: {reason}")
    one = build_on_meta(config, name)
    if not counts:
        raise _no_experts(name, config)
    if len(set(counts.values())) > 1:
        raise InputError(f"{name}: config.json counts experts in more than one way: { {'.'.join(k): v for k, v in counts.items()} }")  # fmt: skip
    experts = next(iter(counts.values()))
    two = build_on_meta(with_expert_count(config, tuple(counts), 2 * experts), name)
    axes = _expert_axes(one, two, experts, name, tail=config["model_type"] in PROVEN_FAMILIES)
    if not axes:
        raise _no_experts(name, config)
    modules = _experts_modules(one, axes)
    if not modules:
        raise InputError(f"{name}: {config['model_type']!r} has no MoE layer in a form that is supported (moecover ls families names those that are proven)")  # fmt: skip
    decoder_layers = tuple(layer_number(module) for module in modules)
    stray = next((key for key in axes if layer_number(key) not in decoder_layers), None)
    if stray or len(set(decoder_layers)) < len(decoder_layers):
        what = f"{stray} depends on the experts but lies" if stray else "two groups of experts lie"
        raise InputError(
            f"{name}: {what} outside the one experts module of its layer: {config['model_type']!r} is not supported"
        )
    text: Any = one.config.get_text_config()  # type: ignore[operator,union-attr]
    top_k = next((int(v) for k in TOP_K_KEYS if isinstance(v := getattr(text, k, None), int)), None)
    if top_k is None:
        raise InputError(f"{name}: no slots per token (top-k) in config.json; looked for {', '.join(TOP_K_KEYS)}")
    topology = Topology(
        config["model_type"],
        decoder_layers,
        experts,
        top_k,
        text.hidden_size,
        text.num_hidden_layers,
        *_groups(text, experts, name),
    )
    tensors = classify(
        checkpoint, one, axes, modules, experts, topology.num_layers, declared=declared(checkpoint) is not None
    )
    return assembled(checkpoint, topology, tensors, axes, modules)


def assembled(
    checkpoint: Checkpoint, topology: Topology, tensors: Tensors, parameters: dict[str, int], modules: tuple[str, ...]
) -> Structure:
    """The structure of what the model class says, and of what the configuration says alone."""
    warnings = []
    if topology.family not in PROVEN_FAMILIES:
        warnings.append(f"family {topology.family!r} is not among the proven ones (moecover ls families): run `moecover verify` on the result")  # fmt: skip
    if tensors.mtp:
        warnings.append(f"{len(tensors.mtp)} tensors belong to multi-token-prediction layers with experts of their own: `prune` drops these layers, or cuts them with --mtp prune")  # fmt: skip
    stored = (declared(checkpoint) or "a type that config.json says nothing of") if tensors.quantised else None
    count_keys = tuple(expert_count_keys(checkpoint.config))
    return Structure(
        checkpoint, topology, tensors.experts, parameters, modules, count_keys, tensors.mtp, stored, tuple(warnings)
    )


def declared(checkpoint: Checkpoint) -> str | None:
    """How a checkpoint says that it is quantised, in config.json or by a quantiser's own settings file; None if it does not."""
    if found := quantisation(checkpoint.config):
        return found
    if checkpoint.folder is None:
        return None
    return next((name for name in QUANTISATION_FILES if (checkpoint.folder / name).is_file()), None)


def _groups(text: Any, experts: int, name: str) -> tuple[int, int]:
    """Groups of experts and groups per token of a group-limited router; 1 and 1 for any other."""
    groups = next((v for k in GROUP_KEYS if isinstance(v := getattr(text, k, None), int)), 1)
    if groups <= 1 or getattr(text, "topk_method", None) == "greedy":
        return 1, 1
    top = getattr(text, "topk_group", None)
    if experts % groups or not isinstance(top, int) or not 1 <= top <= groups:
        raise InputError(f"{name}: config.json has {groups} groups for {experts} experts and {top} groups per token, which do not fit together")  # fmt: skip
    return groups, top


def _no_experts(name: str, config: dict[str, Any]) -> InputError:
    return InputError(f"{name}: {config['model_type']!r} has no routed experts (no count above 1 that shapes its tensors under {', '.join(COUNT_KEYS)} in config.json)")  # fmt: skip


def _experts_modules(model: torch.nn.Module, axes: dict[str, int]) -> tuple[str, ...]:
    """Modules named ``experts`` that hold expert-dependent parameters, in the order of the layers."""
    owners = {key.rpartition(".")[0] for key in axes}
    found = sorted((name for name in owners if name.rpartition(".")[2] == "experts"), key=layer_number)
    return tuple(name for name in found if hasattr(model.get_submodule(name), "num_experts"))
