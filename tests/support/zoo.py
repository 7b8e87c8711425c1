"""A tiny random model of every type in the installed transformers that has routed experts.

`types` finds them: the causal language models whose configuration has a number of experts. `make_config` starts from
the defaults of the type's own class, replaces every size that it has under a name in `SMALL`, then applies what
`SPECIAL` holds for the type.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from moecover.checkpoints.config_edit import COUNT_KEYS
from moecover.checkpoints.deepseek.registration import register_deepseek
from moecover.checkpoints.model_class import auto_class

register_deepseek()

EXPERTS, TOP_K, LAYERS = 8, 2, 3
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "sliding_window": 16,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "shared_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 32,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "hc_mult": 2,
    "moe_hidden_size": 24,
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "adapter_out_dim": 32,
    "text_hidden_size": 32,
    "projection_hidden_dim": 32,
    "projection_intermediate_size": 32,
    "projector_hidden_size": 32,
    "downsample_hidden_size": 8,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "output_dim": 32,
    "max_source_positions": 64,
    "num_position_embeddings": 16,
    "mlp_dim": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "posemb_grid_size": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "global_head_dim": 8,
    "position_embedding_size": 16,
    "shared_experts_intermediate_size": 16,
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "chunk_size": 16,
}
MLPS = ["dense"] + ["sparse"] * (LAYERS - 1)
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
SAM = {"output_channels": 8, "downsample_channels": [16, 32], "image_size": 64}
PICTURES: dict[str, Any] = {  # for vision parts that are a type of their own
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
DOTS3 = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
TEXT_PARTS = {"kimi_k25": "deepseek_v3", "nemotron_h_omni": "nemotron_h"}  # types whose text part is another type
SPECIAL: dict[str, dict[str, Any]] = {
    "aria": {"vision_config": {"model_type": "idefics3_vision", **PICTURES}, "projector_patch_to_query_dict": {4: 4}},
    "beam": {"mlp_layer_types": MLPS},
    "deepseek_ocr2": {
        "vision_config": {"sam_config": SAM},
        "text_config": {"mlp_layer_types": MLPS, "num_experts_per_tok": TOP_K},
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_topk": 4,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe"],
    },
    "dots3_note": {"vision_config": {"pyramid_num_routed": [-1, 4, EXPERTS]}, "text_config": DOTS3},
    "dots3_note_text": DOTS3,
    "glm4v_moe": {"text_config": {"rope_parameters": ROTARY}},
    "glm5_next": {
        "text_config": {
            "mlp_layer_types": MLPS,
            "index_topk": 16,
            "index_kpool": 4,
            "qk_rope_head_dim": 0,
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        },
    },
    "granitemoehybrid": {"mamba_n_heads": 4, "layer_types": ["mamba", "attention", "mamba"]},
    "inkling_mm_model": {"vision_config": {"patch_size": 2, "n_layers": 2}},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "full_attention"]},
    "llama4": {
        "vision_config": {**PICTURES, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        "text_config": {"moe_layers": [1, 2], "intermediate_size_mlp": 24},
    },
    "llama4_text": {"moe_layers": [1, 2], "intermediate_size_mlp": 24},
    "mistral_large4": {"vision_config": {"model_type": "pixtral", **PICTURES}},
    "muse_spark": {
        "audio_config": {"num_hidden_layers": 1, "patch_sizes": [4], "hidden_sizes": [8], "depths": [1]},
        "text_config": {"mlp_layer_types": MLPS},
    },
    "qwen3_omni_moe_thinker": {"vision_config": {"deepstack_visual_indexes": [0]}},
    "step3p7": {
        "vision_config": {"image_size": 32},
        "text_config": {"mlp_layer_types": MLPS, "share_expert_dim": 16},
    },
    "kimi_k25": {"projection_hidden_size": 32, "vision_config": {"patch_size": 2, "num_hidden_layers": 1}},
    "nemotron_h_omni": {
        "vision_config": {"model_type": "radio", "max_img_size": 64, "video_temporal_patch_size": 2, **PICTURES},
        "vision_hidden_size": 32,
    },
    "unlimited_ocr": {"vision_config": {"sam_config": SAM}},
    "gemma4": {"text_config": {"enable_moe_block": True, "num_experts": EXPERTS}},
    "gemma4_text": {"enable_moe_block": True, "num_experts": EXPERTS},
    "bailing_hybrid": {"num_experts": EXPERTS, "num_experts_per_token": TOP_K, "num_expert_group": 2, "topk_group": 1},
    "kimi_linear": {"num_experts": EXPERTS, "num_experts_per_token": TOP_K},
    "kolibri1": {"num_experts": EXPERTS},
    "mellum": {"num_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS},
}


def types() -> list[str]:
    """Model types with routed experts, in alphabetical order."""
    classes = {name: CONFIG_MAPPING[name] for name in sorted(CONFIG_MAPPING.keys())}
    return [
        name
        for name, cls in classes.items()
        if auto_class(cls) is not None and (name in TEXT_PARTS or counts_experts(cls))
    ]


def other_types() -> list[str]:
    """Model types with a number of experts that are no language model, and no part of another type either."""
    classes = {name: CONFIG_MAPPING[name] for name in sorted(CONFIG_MAPPING.keys())}
    parts = {part for cls in classes.values() for part in parts_of(cls)}
    return [
        name for name, cls in classes.items() if auto_class(cls) is None and cls not in parts and counts_experts(cls)
    ]


def counts_experts(cls: type) -> bool:
    """Whether a configuration class, or one of its parts, has a number of experts."""
    return any(key in field_names(part) for part in (cls, *parts_of(cls)) for key in COUNT_KEYS)


def parts_of(cls: type) -> list[type]:
    """The configuration classes of the parts of a model, and of their parts."""
    return [sub for part in getattr(cls, "sub_configs", {}).values() for sub in (part, *parts_of(part))]


def field_names(cls: type) -> set[str]:
    """The names under which a configuration class has a value, aliases included."""
    fields = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    return fields | set(getattr(cls, "attribute_map", {}))


def make_config(name: str) -> PreTrainedConfig:
    """The small configuration of a model type."""
    cls = CONFIG_MAPPING[name]
    options = small_values(cls)
    if text := TEXT_PARTS.get(name):
        options["text_config"] = {"model_type": text, **small_values(CONFIG_MAPPING[text]), **SPECIAL.get(text, {})}
    for key, value in SPECIAL.get(name, {}).items():
        options[key] = merged(options.get(key), value)
    return cls(**options)


def merged(below: Any, above: Any) -> Any:
    """``above`` over ``below``; dicts are merged key by key."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{key: merged(below.get(key), value) for key, value in above.items()}}


def small_values(cls: type) -> dict[str, Any]:
    """The values of `SMALL` that a configuration class and its parts have, and `EXPERTS` for its number of experts."""
    names, mapped = field_names(cls), getattr(cls, "attribute_map", {})
    options = {k: v for k, v in SMALL.items() if k in names and k not in mapped}
    options |= {k: EXPERTS for k in COUNT_KEYS if k in names and k not in mapped}
    if "kv_lora_rank" in options:
        options["num_key_value_heads"] = options["num_attention_heads"]  # latent attention has no groups
    for part, sub in getattr(cls, "sub_configs", {}).items():
        if dataclasses.is_dataclass(sub):
            options[part] = small_values(sub)
    return options


def make_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of a type with uneven routing, in float32 and evaluation mode."""
    torch.manual_seed(seed)
    config = make_config(name)
    multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING  # saved with all its parts, as on the hub
    auto = AutoModelForImageTextToText if multimodal else auto_class(type(config))
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith(".tid2eid"):  # experts by token id, each once
                tensor.copy_(torch.rand(len(tensor), EXPERTS).argsort(dim=1)[:, : tensor.shape[1]])
            if not tensor.is_floating_point() or "inv_freq" in key:
                continue
            if "correction" in key or "expert_bias" in key:
                tensor.normal_(0, 0.3)
            elif key.endswith((".gate.weight", ".router.weight")):
                tensor.normal_(0, 1.0)
            elif tensor.dim() > 1:
                tensor.normal_(0, 0.15)
    return model.eval()
