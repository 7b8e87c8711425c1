"""Tiny random checkpoints in the hub's format, one per family, seeded.

`FAMILIES` are the model types that most tests run on, `OTHERS` types with special routing; both hold what their
configurations add to `COMMON`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES = {
    # A dense first layer: the MoE layer index is not the decoder index.
    "qwen2_moe": {
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 12,
        "shared_expert_intermediate_size": 24,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "mixtral": {"num_hidden_layers": 2, "intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2},
    "olmoe": {
        "num_hidden_layers": 2,
        "intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    },
}
# Router groups and a correction bias.
GROUPED = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
}
OTHERS = {
    "deepseek_v3": {**GROUPED, "norm_topk_prob": True},
    "deepseek_v2": {**GROUPED, "topk_method": "group_limited_greedy"},
    "gpt_oss": {"num_hidden_layers": 2, "intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {"num_hidden_layers": 2, "intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2},
}
TEXT = "The river rises in the hills, turns south past the old mill and falls into the sea. 0123456789\n"


def make_tokenizer(*, begins: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 300 tokens, trained on `TEXT`; ``<end>`` ends and pads.

    Args:
        begins: whether its post-processor puts a BOS token, ``<s>``, before a text, as those of Gemma and Llama do.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>", "<s>"] if begins else ["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    own = {"bos_token": "<s>"} if begins else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", **own)


def make_checkpoint(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: bool = False,
    **config: object,
) -> Path:
    """Write a checkpoint with its tokenizer; routing is uneven, and experts are separate tensors, as on the hub.

    Args:
        folder: where to write; returned.
        family: a key of `FAMILIES` or `OTHERS`.
        seed: of the random weights.
        dtype: of the weights.
        shards: whether to split the weights into files of at most 40 kB.
        **config: overrides of the configuration.
    """
    torch.manual_seed(seed)
    parsed = AutoConfig.for_model(family, **{**COMMON, **{**FAMILIES, **OTHERS}[family], **config})
    model = AutoModelForCausalLM.from_config(parsed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".gate.weight", ".router.weight")):
                parameter.normal_(0, 1.0)
            elif parameter.dim() > 1 or "bias" in name:
                parameter.normal_(0, 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.3)  # large enough to change the choice of most tokens
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB" if shards else "1GB", save_original_format=True)
    # save_pretrained names qwen3_moe's number of experts differently from the hub's files: restore the hub's key.
    raw = json.loads((folder / "config.json").read_text())
    if family == "qwen3_moe":
        raw["num_experts"] = raw.pop("num_local_experts", raw.get("num_experts"))
    raw["rms_norm_eps"] = 1e-6
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    make_tokenizer().save_pretrained(folder)
    return folder
