"""The model that the benchmarks run: Qwen1.5-MoE's shape at a quarter of its width, random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

VOCABULARY = 2000


def make_model(folder: Path, dtype: torch.dtype) -> Path:
    """Write a checkpoint: 4 layers, 60 experts top-4, hidden 512, expert width 352, shared width 1408."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=1408,
        moe_intermediate_size=352,
        shared_expert_intermediate_size=1408,
        num_experts=60,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        max_position_embeddings=2048,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # routing as uneven as in a trained model
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(0, 0.05)
    model.to(dtype).save_pretrained(folder)
    return folder


def make_rows(path: Path, sequences: int, length: int) -> Path:
    """Write random token ids as a corpus of pre-tokenised rows."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, size=(sequences, length))
    path.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in tokens))
    return path
