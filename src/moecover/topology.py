"""What in a model depends on the experts: reads a checkpoint's configuration and headers, gives its topology.

No table of families is needed. The model class is built on torch's ``meta`` device (no memory) with E and with 2 E
experts: whatever tensor changes its shape has an expert axis, and where. The library's own conversion mapping leads from
the names on disk to those parameters. A family that this reading does not fit is refused before any work.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.errors import InputError
from moecover.files import canonical_json
from moecover.interrupts import held
from moecover.source import Checkpoint, TensorEntry, open_checkpoint

if TYPE_CHECKING:
    import torch

# Families proven end to end by the tests (golden property through the written files). Others run by the same mechanism
# with a warning; `moecover verify` proves them case by case.
PROVEN_FAMILIES = (
    "afmoe",
    "aria_text",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "cohere2_moe",
    "deepseek",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "gemma4",
    "gemma4_text",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "inkling2_text",
    "jamba",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lfm2_moe",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl",
    "minimax_m3_vl_text",
    "mistral4",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl_moe",
    "qwen4_exp",
    "qwen4_exp_text",
    "solar_open",
)
PROVEN_WITH = "5.23.0"  # the version of transformers that the tests ran with
COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token")
GROUP_KEYS = ("n_group", "num_expert_group")
FLOAT_TYPES = {"F16", "BF16", "F32", "F64"}


@dataclass(frozen=True)
class Topology:
    """Shape of the routed part of a model.

    Attributes:
        family: ``model_type`` of config.json.
        decoder_layers: decoder index of every MoE layer; its position is the MoE ``layer`` axis everywhere else.
        num_experts: routed experts per MoE layer (E).
        top_k: slots per token.
        hidden_size: width of the residual stream.
        num_layers: decoder layers, dense ones included.
        num_groups: groups of consecutive experts that the router chooses among first; 1 where it does not.
        top_groups: groups that a token may use.
    """

    family: str
    decoder_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    num_layers: int
    num_groups: int = 1
    top_groups: int = 1

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "decoder_layers": list(self.decoder_layers)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Topology:
        return cls(**{**value, "decoder_layers": tuple(value["decoder_layers"])})

    @property
    def fingerprint(self) -> str:
        """Hash of the topology alone."""
        return hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()


@dataclass(frozen=True)
class ExpertTensor:
    """How one tensor on disk depends on the experts of a layer.

    Attributes:
        layer: MoE layer.
        expert: the one expert whose tensor this is; None when the tensor holds all experts along ``axis``.
        axis: axis of the experts; None for the tensor of one expert.
        routed: part of an expert's own weights (else: of the router).
    """

    layer: int
    expert: int | None
    axis: int | None
    routed: bool


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
        warnings: what the user should know before using the result.
    """

    checkpoint: Checkpoint
    topology: Topology
    tensors: dict[str, ExpertTensor]
    parameters: dict[str, int]
    experts_modules: tuple[str, ...]
    count_keys: tuple[tuple[str, ...], ...]
    warnings: tuple[str, ...]

    @functools.cached_property
    def expert_num_bytes(self) -> int:
        """Bytes of one expert of one layer on disk, its router rows included (mean over the layers)."""
        return self.expert_total_bytes // (self.topology.num_experts * len(self.topology.decoder_layers))

    @functools.cached_property
    def expert_total_bytes(self) -> int:
        """Bytes of everything that depends on the experts: a multiple of their number."""
        return sum(self.checkpoint.tensors[name].num_bytes for name in self.tensors)

    def num_bytes(self, keep: int) -> int:
        """Bytes of all tensors when ``keep`` experts per layer remain."""
        removed = self.topology.num_experts - keep
        return self.checkpoint.num_bytes - self.expert_total_bytes // self.topology.num_experts * removed

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


def _dicts(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    yield path, config
    for key, value in config.items():
        if isinstance(value, dict) and (key.endswith("config") and key != "quantization_config"):
            yield from _dicts(value, (*path, key))


def expert_count_keys(config: dict[str, Any]) -> dict[tuple[str, ...], int]:
    """Paths of the keys of a raw config that count routed experts, with their values (above one)."""
    return {
        (*path, key): value
        for path, part in _dicts(config)
        for key in COUNT_KEYS
        if isinstance(value := part.get(key), int) and not isinstance(value, bool) and value > 1
    }


def with_expert_count(config: dict[str, Any], keys: tuple[tuple[str, ...], ...], count: int) -> dict[str, Any]:
    """A copy of a raw config with every expert-count key set to ``count``."""
    edited = copy.deepcopy(config)
    for path in keys:
        part = edited
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = count
    return edited


def auto_class(config_class: type) -> Any:
    """The Auto class that makes a language model of a configuration class, multimodal ones included; None for others."""
    import transformers
    from transformers.models.auto import modeling_auto

    if config_class in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if config_class in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    return None


def _build_on_meta(config: dict[str, Any], name: str) -> torch.nn.Module:
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


def _expert_axes(one: torch.nn.Module, two: torch.nn.Module, experts: int, name: str) -> dict[str, int]:
    """Parameters and buffers whose shape follows the expert count, with the axis that does."""
    wide = dict(two.state_dict())
    axes = {}
    for key, tensor in one.state_dict().items():
        changed = [i for i, (a, b) in enumerate(zip(tensor.shape, wide[key].shape, strict=True)) if a != b]
        if not changed:
            continue
        if len(changed) > 1 or tensor.shape[changed[0]] != experts:
            raise InputError(f"{name}: {key} of shape {list(tensor.shape)} depends on the expert count in a way that is not supported")  # fmt: skip
        axes[key] = changed[0]
    return axes


def first_number(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first whole number under one of the keys, in a raw config or its parts; None where there is none."""
    for _, part in _dicts(config):
        for key in keys:
            if isinstance(part.get(key), int):
                return int(part[key])
    return None


def read_structure(model: str | Path | Checkpoint, *, revision: str | None = None) -> Structure:
    """Topology and expert-dependent tensors of a checkpoint, from its configuration and headers only.

    Args:
        model: folder, hub id, or a checkpoint already opened.
        revision: branch, tag or commit of a hub model.

    Raises:
        InputError: no routed experts, an architecture that is unknown or does not fit, or tensors that do not match it.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model, revision=revision)
    config, name = checkpoint.config, checkpoint.name
    counts = expert_count_keys(config)
    _check_unquantised(checkpoint)
    one = _build_on_meta(config, name)
    if not counts:
        raise _no_experts(name, config)
    if len(set(counts.values())) > 1:
        raise InputError(f"{name}: config.json counts experts in more than one way: { {'.'.join(k): v for k, v in counts.items()} }")  # fmt: skip
    experts = next(iter(counts.values()))
    axes = _expert_axes(one, _build_on_meta(with_expert_count(config, tuple(counts), 2 * experts), name), experts, name)
    if not axes:
        raise _no_experts(name, config)
    modules = _experts_modules(one, axes)
    if not modules:
        raise InputError(f"{name}: {config['model_type']!r} has no MoE layer in a form that is supported (moecover ls families names those that are proven)")  # fmt: skip
    decoder_layers = tuple(_layer_number(module) for module in modules)
    stray = next((key for key in axes if _layer_number(key) not in decoder_layers), None)
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
    tensors = _classify(checkpoint, one, axes, modules, experts)
    warnings: tuple[str, ...] = ()
    if topology.family not in PROVEN_FAMILIES:
        warnings = (f"family {topology.family!r} is not among the proven ones (moecover ls families): run `moecover verify` on the result",)  # fmt: skip
    return Structure(checkpoint, topology, tensors, axes, modules, tuple(counts), warnings)


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


def _check_unquantised(checkpoint: Checkpoint) -> None:
    quantised = next((e for e in checkpoint.tensors.values() if e.dtype not in (*FLOAT_TYPES, "I64")), None)
    if quantised or "quantization_config" in checkpoint.config:
        what = f"tensor {quantised.name} of {quantised.dtype}" if quantised else "quantization_config"
        raise InputError(f"{checkpoint.name}: quantised checkpoints are not supported yet ({what}). Prune the original and quantise the result")  # fmt: skip


def _layer_number(parameter: str) -> int:
    match = re.search(r"\.(\d+)\.", parameter)
    if match is None:
        raise InputError(f"{parameter} has experts but belongs to no numbered layer: not supported")
    return int(match[1])


def _experts_modules(model: torch.nn.Module, axes: dict[str, int]) -> tuple[str, ...]:
    """Modules named ``experts`` that hold expert-dependent parameters, in the order of the layers."""
    owners = {key.rpartition(".")[0] for key in axes}
    found = sorted((name for name in owners if name.rpartition(".")[2] == "experts"), key=_layer_number)
    return tuple(name for name in found if hasattr(model.get_submodule(name), "num_experts"))


def _classify(
    checkpoint: Checkpoint, model: torch.nn.Module, axes: dict[str, int], modules: tuple[str, ...], experts: int
) -> dict[str, ExpertTensor]:
    """The expert-dependent tensors on disk; checks every tensor's shape against the parameter that it fills."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    parameters = dict(model.state_dict())
    layer_of = {_layer_number(module): layer for layer, module in enumerate(modules)}
    tensors: dict[str, ExpertTensor] = {}
    filled: dict[str, int] = {}
    sources: dict[str, list[TensorEntry]] = {}
    for key, entry in checkpoint.tensors.items():
        target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if target not in parameters:
            if re.search(r"\.experts\.", key):
                raise InputError(f"{checkpoint.name}: tensor {key} belongs to experts that the model class does not have (a multi-token-prediction layer?): not supported")  # fmt: skip
            continue
        expected = tuple(parameters[target].shape)
        filled[target] = filled.get(target, 0) + math.prod(entry.shape)
        sources.setdefault(target, []).append(entry)
        if target not in axes:
            continue
        layer = layer_of[_layer_number(target)]
        routed = target.rpartition(".")[0] in modules
        match = re.search(r"\.experts\.(\d+)\.", key)
        if match:
            if int(match[1]) >= experts:
                raise InputError(f"{checkpoint.name}: tensor {key} is of expert {match[1]}, config.json has {experts}")
            tensors[key] = ExpertTensor(layer, int(match[1]), None, routed)
        elif entry.shape == expected:
            tensors[key] = ExpertTensor(layer, None, axes[target], routed)
        else:
            raise _wrong_shape(checkpoint, entry, expected)
    _check_experts_alike(checkpoint, tensors)
    for key, parameter in parameters.items():
        if key in filled and filled[key] != parameter.numel():
            if len(sources[key]) == 1:
                raise _wrong_shape(checkpoint, sources[key][0], tuple(parameter.shape))
            raise InputError(f"{checkpoint.name}: {key} needs {parameter.numel()} numbers of shape {list(parameter.shape)}, the files hold {filled[key]}")  # fmt: skip
        if key not in filled and key in axes:
            raise InputError(f"{checkpoint.name}: nothing in the files fills {key} of shape {list(parameter.shape)}")
    return tensors


def _wrong_shape(checkpoint: Checkpoint, entry: TensorEntry, expected: tuple[int, ...]) -> InputError:
    return InputError(f"{checkpoint.name}: tensor {entry.name} in {entry.shard} has shape {list(entry.shape)}, config.json asks for {list(expected)}")  # fmt: skip


def _check_experts_alike(checkpoint: Checkpoint, tensors: dict[str, ExpertTensor]) -> None:
    """Every expert of every layer has the same tensors with the same shapes and types."""
    kinds: dict[str, TensorEntry] = {}
    for key, tensor in tensors.items():
        if tensor.expert is None:
            continue
        kind = re.sub(r"\.experts\.\d+\.", ".experts.*.", re.sub(r"\.\d+\.", ".#.", key, count=1))
        entry = checkpoint.tensors[key]
        first = kinds.setdefault(kind, entry)
        if (entry.shape, entry.dtype) != (first.shape, first.dtype):
            raise InputError(f"{checkpoint.name}: tensor {key} in {entry.shard} has shape {list(entry.shape)} of {entry.dtype}, {first.name} has {list(first.shape)} of {first.dtype}")  # fmt: skip
