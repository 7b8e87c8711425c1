"""Tiny checkpoints of `tests.support.tiny` as GGUF files that compute the same, written by the `gguf` package.

What llama.cpp's converter does for these families, in float32: names, keys, stacked experts, byte-level tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import quantize
from numpy.typing import NDArray
from safetensors.numpy import load_file

from moecover.errors import MoecoverError
from moecover.llama.library import missing

Tensors = dict[str, NDArray[np.float32]]
Pairs = Iterator[tuple[str, NDArray[np.float32]]]

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    **{f"mlp.{s}.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down") for s in ("shared_experts",)},
    **{f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
}
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def _block(number: int, tensors: Tensors, config: Mapping[str, Any]) -> Pairs:
    """The tensors of a decoder layer under llama.cpp's names."""
    for name, values in tensors.items():
        stem, _, ending = name.rpartition(".")
        if name == "mlp.gate.e_score_correction_bias":
            yield f"blk.{number}.exp_probs_b.bias", values
        elif stem in NAMES:
            flat = stem == "mlp.shared_expert_gate"
            yield f"blk.{number}.{NAMES[stem]}.{ending}", values.reshape(-1) if flat else values
        elif stem == "self_attn.kv_b_proj":
            heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
            both = values.reshape(heads, nope + config["v_head_dim"], -1)
            yield f"blk.{number}.attn_k_b.weight", np.ascontiguousarray(both[:, :nope].transpose(0, 2, 1))
            yield f"blk.{number}.attn_v_b.weight", np.ascontiguousarray(both[:, nope:])
    if "mlp.experts.gate_up_proj" in tensors:
        yield from _interleaved(number, tensors)
    for part in ("gate", "up", "down"):
        found = [n for n in tensors if n.startswith("mlp.experts.") and n.endswith(f".{part}_proj.weight")]
        if found:
            order = sorted(found, key=lambda n: int(n.split(".")[2]))
            yield f"blk.{number}.ffn_{part}_exps.weight", np.stack([tensors[n] for n in order])


def _interleaved(number: int, tensors: Tensors) -> Pairs:
    """Attention sinks, and stacked experts whose gate and up projections alternate: gpt_oss."""
    stem, stacked = f"blk.{number}.", {n.removeprefix("mlp.experts."): v for n, v in tensors.items()}
    yield f"{stem}attn_sinks.weight", tensors["self_attn.sinks"]
    for place, part in enumerate(("gate", "up")):
        both = stacked["gate_up_proj"][..., place::2].transpose(0, 2, 1)
        yield f"{stem}ffn_{part}_exps.weight", np.ascontiguousarray(both)
        yield f"{stem}ffn_{part}_exps.bias", np.ascontiguousarray(stacked["gate_up_proj_bias"][:, place::2])
    yield f"{stem}ffn_down_exps.weight", np.ascontiguousarray(stacked["down_proj"].transpose(0, 2, 1))
    yield f"{stem}ffn_down_exps.bias", stacked["down_proj_bias"]


def _keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """Keys of all families."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    rope = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 10000.0
    writer.add_rope_freq_base(float(rope))
    writer.add_expert_count(next(config[key] for key in EXPERTS if config.get(key)))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config.get("moe_intermediate_size") or config["intermediate_size"])


def _plain(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_head_count_kv(config["num_key_value_heads"])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head)
    writer.add_value_length(head)
    if window := config.get("sliding_window"):
        writer.add_sliding_window(window)
    if shared := config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(shared)


def _latent(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """Multi-head latent attention, router groups and a correction bias."""
    rank, rope, nope = config["kv_lora_rank"], config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    writer.add_head_count_kv(1)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(bool(config["norm_topk_prob"]))
    sigmoid = config["model_type"] == "deepseek_v3"
    kinds = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(kinds.SIGMOID if sigmoid else kinds.SOFTMAX)
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])


# What `make_checkpoint` is given, so that llama.cpp has a place for it: experts in every layer, a query rank.
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"mlp_only_layers": []},
    "olmoe": {"num_key_value_heads": 4},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "deepseek_v3": {"q_lora_rank": 8},
}
needs_llama = pytest.mark.skipif(bool(missing()), reason=f"llama.cpp cannot run here: {MoecoverError(missing())}")
ARCHITECTURES: dict[str, tuple[str, Callable[[gguf.GGUFWriter, Mapping[str, Any]], None]]] = {
    "qwen2_moe": ("qwen2moe", _plain),
    "qwen3_moe": ("qwen3moe", _plain),
    "olmoe": ("olmoe", _plain),
    "gpt_oss": ("gpt-oss", _plain),
    "deepseek_v3": ("deepseek2", _latent),
}


def _tokenizer(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """A byte-level BPE tokenizer, filled up with unused tokens."""
    parsed = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"] for token in parsed["added_tokens"] if token["special"]}
    tokens = sorted(parsed["model"]["vocab"], key=parsed["model"]["vocab"].__getitem__)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    missing = size - len(tokens)
    merges = [one if isinstance(one, str) else " ".join(one) for one in parsed["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *(f"[unused{i}]" for i in range(missing))])
    writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * missing])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens.index("<end>"))
    if begins := "<s>" in tokens:
        writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_add_bos_token(begins)
    if (template := folder / "chat_template.jinja").is_file():
        writer.add_chat_template(template.read_text())


def convert(folder: Path, path: Path, *, experts: str = "F32", parts: int = 1) -> Path:
    """Write a tiny checkpoint as a GGUF file, or as the parts of a split one; returns the first.

    Args:
        folder: from `tests.support.tiny.make_checkpoint`, of a family of `ARCHITECTURES`.
        path: the file.
        experts: block type of the experts' weights; all others are float32.
        parts: files.
    """
    config = json.loads((folder / "config.json").read_text())
    arch, more = ARCHITECTURES[config["model_type"]]
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: values.astype(np.float32) for name, values in load_file(file).items()}
    named = {OUTSIDE[name]: values for name, values in tensors.items() if name in OUTSIDE}
    for number in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        of_layer = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
        named |= dict(_block(number, of_layer, config))
        if arch == "gpt-oss":
            named[f"blk.{number}.post_attention_norm.weight"] = named.pop(f"blk.{number}.ffn_norm.weight")
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=-(-len(named) // parts) if parts > 1 else 0)
    _keys(writer, config)
    more(writer, config)
    _tokenizer(writer, folder, config["vocab_size"])
    for name, values in named.items():
        kind = gguf.GGMLQuantizationType[experts if "_exps." in name else "F32"]
        raw = values if kind == gguf.GGMLQuantizationType.F32 else quantize(values, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05d}.gguf")
