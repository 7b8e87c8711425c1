"""Random checkpoints of full size with the real configurations, sharded as on the hub.

    python -m benchmarks.full_size qwen1.5-moe-a2.7b DIR [--layers N]      28.6 GB in 8 files
    python -m benchmarks.full_size deepseek-moe-16b DIR [--layers N]       32.8 GB in 7 files

Weights are normal, with standard deviations that keep activations near 1; those of the routers are larger, so that
routing is as uneven as in a trained model. All are slices, at random offsets, of one pool of random numbers, so the
speed of the disk decides how long a full-size model takes. ``--layers`` makes a model of fewer layers, for measurements
over the size.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

POOL = 1 << 27  # random numbers
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "qwen1.5-moe-a2.7b": (
        8,
        {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 151643,
            "eos_token_id": 151643,
        },
    ),
    "deepseek-moe-16b": (
        7,
        {
            "architectures": ["DeepseekForCausalLM"],
            "model_type": "deepseek",
            "vocab_size": 102400,
            "hidden_size": 2048,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "norm_topk_prob": False,
            "scoring_func": "softmax",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "attention_bias": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 100000,
            "eos_token_id": 100001,
        },
    ),
}


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, shape and standard deviation of every tensor; 0 stands for ones, a negative value for zeros."""
    hidden, vocabulary, qwen = config["hidden_size"], config["vocab_size"], config["model_type"] == "qwen2_moe"

    def linear(name: str, rows: int, columns: int, gain: float = 1.0) -> tuple[str, tuple[int, ...], float]:
        return f"{name}.weight", (rows, columns), gain / math.sqrt(columns)

    def mlp(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...], float]]:
        yield linear(f"{name}.gate_proj", width, hidden)
        yield linear(f"{name}.up_proj", width, hidden)
        yield linear(f"{name}.down_proj", hidden, width)

    yield "model.embed_tokens.weight", (vocabulary, hidden), 1.0
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield linear(f"{layer}.self_attn.{name}", hidden, hidden)
            if qwen and name != "o_proj":
                yield f"{layer}.self_attn.{name}.bias", (hidden,), -1.0
        if not qwen and number < config["first_k_dense_replace"]:
            yield from mlp(f"{layer}.mlp", config["intermediate_size"])
        else:
            experts = config["num_experts" if qwen else "n_routed_experts"]
            yield linear(f"{layer}.mlp.gate", experts, hidden, gain=1.5)
            for expert in range(experts):
                yield from mlp(f"{layer}.mlp.experts.{expert}", config["moe_intermediate_size"])
            if qwen:
                yield from mlp(f"{layer}.mlp.shared_expert", config["shared_expert_intermediate_size"])
                yield linear(f"{layer}.mlp.shared_expert_gate", 1, hidden)
            else:
                yield from mlp(
                    f"{layer}.mlp.shared_experts", config["n_shared_experts"] * config["moe_intermediate_size"]
                )
        yield f"{layer}.input_layernorm.weight", (hidden,), 0.0
        yield f"{layer}.post_attention_layernorm.weight", (hidden,), 0.0
    yield "model.norm.weight", (hidden,), 0.0
    yield linear("lm_head", vocabulary, hidden)


def make(shape: str, folder: Path, *, layers: int | None = None) -> Path:
    """Write a checkpoint to a new folder; a folder with a finished one is returned unchanged."""
    if (folder / "config.json").exists():
        return folder
    shards, config = SHAPES[shape]
    full = config["num_hidden_layers"]
    config = {**config, "num_hidden_layers": layers or full}
    torch.manual_seed(0)
    pool = torch.randn(POOL).bfloat16()
    rows = list(tensors(config))
    total = 2 * sum(math.prod(row[1]) for row in rows)
    shards = max(1, round(shards * config["num_hidden_layers"] / full))
    folder.mkdir(parents=True, exist_ok=True)
    weight_map, held, size, number = {}, dict[str, torch.Tensor](), 0, 1
    for name, dimensions, spread in rows:
        count = math.prod(dimensions)
        if spread <= 0:
            value = torch.full(dimensions, float(spread == 0), dtype=torch.bfloat16)
        else:
            start = int(torch.randint(0, max(1, POOL - count), ()).item())
            parts = (
                [pool[start : start + count]] if count <= POOL else [pool] * (count // POOL) + [pool[: count % POOL]]
            )
            value = (torch.cat(parts) * spread).view(dimensions)
        held[name], size = value, size + 2 * count
        weight_map[name] = f"model-{number:05}-of-{shards:05}.safetensors"
        if (size >= total * number / shards and number < shards) or name == rows[-1][0]:
            save_file(held, folder / weight_map[name], metadata={"format": "pt"})
            print(f"{folder / weight_map[name]}: {size / 1e9:.1f} of {total / 1e9:.1f} GB", flush=True)
            held, number = {}, number + 1
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def main() -> None:
    """Write the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    args = parser.parse_args()
    make(args.shape, args.folder, layers=args.layers)


if __name__ == "__main__":
    main()
