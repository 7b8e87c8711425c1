"""A tiny random model of every type of the installed transformers that has routed experts.

`types` finds them: the causal language models whose configuration counts experts. A configuration is the class's own
defaults made small: every size that it has by one of the names in `SMALL`, then what `SPECIAL` says of the type.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moecover.config_json import COUNT_KEYS
from moecover.topology import auto_class

EXPERTS, TOP_K, LAYERS = 8, 2, 3
SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 64, "num_experts_per_tok": TOP_K, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "sliding_window": 16, "moe_topk": TOP_K, "moe_k": TOP_K, "top_k_experts": TOP_K, "shared_intermediate_size": 16,
    "n_group": 2, "topk_group": 1, "embed_dim": 32, "depth": 2, "num_heads": 4, "out_hidden_size": 32,
    "linear_head_dim": 8, "linear_num_heads": 4, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dbrx": {
        "ffn_config": {"moe_num_experts": EXPERTS, "moe_top_k": TOP_K, "ffn_hidden_size": 16, "hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        "d_model": 32,
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": 64,
    },
    "granitemoehybrid": {"mamba_n_heads": 4, "layer_types": ["mamba", "attention", "mamba"]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4": {"text_config": {"enable_moe_block": True, "num_experts": EXPERTS}},
    "gemma4_text": {"enable_moe_block": True, "num_experts": EXPERTS},
    "bailing_hybrid": {"num_experts": EXPERTS, "num_experts_per_token": TOP_K, "num_expert_group": 2, "topk_group": 1},
    "kimi_linear": {"num_experts": EXPERTS, "num_experts_per_token": TOP_K},
    "kolibri1": {"num_experts": EXPERTS},
    "mellum": {"num_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS},
}


UNPROVEN = {
    "aria": "its part for pictures takes gigabytes as configured here",
    "dbrx": "its tiny configuration does not run",
    "deepseek_ocr2": "its tiny vision part does not build",
    "deepseek_v4": "its first layers route by a hash of the token",
    "diffusion_gemma": "two groups of experts in a layer",
    "doge": "experts are rows of an embedding",
    "dots3_note": "its tiny configuration does not build",
    "dots3_note_text": "its tiny configuration does not build",
    "ernie4_5_vl_moe": "experts of two widths",
    "glm4v_moe": "its tiny rotary sections do not fit",
    "glm5_next": "its tiny configuration does not build",
    "inkling2": "its tiny configuration does not build",
    "inkling_mm_model": "rows of the router for shared experts",
    "inkling_text": "rows of the router for shared experts",
    "jetmoe": "experts of a kind of its own",
    "llama4": "experts run densely, their weight is on the input",
    "llama4_text": "experts run densely, their weight is on the input",
    "longcat_flash": "experts that do nothing behind the others",
    "mistral_large4": "its parts for pictures take gigabytes as configured here",
    "muse_spark": "its tiny configuration does not build",
    "qwen3_omni_moe_thinker": "its parts for sound and pictures take gigabytes as configured here",
    "step3p7": "its tiny configuration does not build",
    "unlimited_ocr": "its tiny vision part does not build",
    "zaya": "a class of the router that skips the experts",
}  # fmt: skip


def types() -> list[str]:
    """Model types with routed experts, alphabetical."""
    found = []
    for name in sorted(CONFIG_MAPPING.keys()):
        cls = CONFIG_MAPPING[name]
        if auto_class(cls) is None:
            continue
        names = _names(cls)
        parts = [names, *(_names(sub) for sub in getattr(cls, "sub_configs", {}).values())]
        if any(key in part for part in parts for key in COUNT_KEYS):
            found.append(name)
    return found


def _names(cls: type) -> set[str]:
    fields = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    return fields | set(getattr(cls, "attribute_map", {}))


def make_config(name: str) -> PreTrainedConfig:
    """The small configuration of a type."""
    cls = CONFIG_MAPPING[name]
    options = _small(cls)
    for key, value in SPECIAL.get(name, {}).items():
        options[key] = {**options[key], **value} if isinstance(value, dict) and key in options else value
    return cls(**options)


def _small(cls: type) -> dict[str, Any]:
    names, mapped = _names(cls), getattr(cls, "attribute_map", {})
    options = {k: v for k, v in SMALL.items() if k in names and k not in mapped}
    options |= {k: EXPERTS for k in COUNT_KEYS if k in names and k not in mapped}
    if "kv_lora_rank" in options:
        options["num_key_value_heads"] = options["num_attention_heads"]  # latent attention has no groups
    for part, sub in getattr(cls, "sub_configs", {}).items():
        if dataclasses.is_dataclass(sub):
            options[part] = _small(sub)
    return options


def make_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A model with uneven routing."""
    torch.manual_seed(seed)
    config = make_config(name)
    model = auto_class(type(config)).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or "inv_freq" in key:
                continue
            if "correction" in key or "expert_bias" in key:
                tensor.normal_(0, 0.3)
            elif key.endswith((".gate.weight", ".router.weight")):
                tensor.normal_(0, 1.0)
            elif tensor.dim() > 1:
                tensor.normal_(0, 0.15)
    return model.eval()
