"""Model type deepseek, in the hub's format, against an independent float32 implementation of arXiv 2401.06066."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moecover.checkpoints.deepseek.configuration import DeepseekConfig
from moecover.checkpoints.deepseek.modeling import DeepseekForCausalLM
from moecover.checkpoints.deepseek.registration import register_deepseek
from moecover.checkpoints.structure import read_structure
from moecover.planning.run import plan
from moecover.profiling.run import profile
from moecover.pruning.writer import prune
from moecover.verification.verify import verify
from tests.conftest import random_corpus
from tests.support.tiny import make_tokenizer

HUB = {  # the keys of deepseek-ai/deepseek-moe-16b-base's config.json, small
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_type": "deepseek",
    "moe_intermediate_size": 16,
    "moe_layer_freq": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 300,
}
NOT_ARGUMENTS = {
    "auto_map",
    "torch_dtype",
    "transformers_version",
    "architectures",
    "model_type",
    "rope_scaling",
}


def hub_checkpoint(folder: Path, **changes: Any) -> Path:
    """Per-expert tensors, remote code that must not run, and rotary buffers, as the hub has them."""
    torch.manual_seed(0)
    config = HUB | changes
    arguments = {key: value for key, value in config.items() if key not in NOT_ARGUMENTS}
    model = DeepseekForCausalLM(DeepseekConfig(**arguments))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 1.0 if ".gate." in name else 0.15)
    model.save_pretrained(folder, save_original_format=True)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = 1e4 ** -(torch.arange(0, 8, 2) / 8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (folder / name).write_text(f"raise SystemExit({name!r} + ' was run')\n")
    make_tokenizer().save_pretrained(folder)
    return folder


def naive_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """The model from the paper's equations, one token and one expert at a time, on the tensors of the file."""
    w, c = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    heads, size = c["num_attention_heads"], c["hidden_size"] // c["num_attention_heads"]

    def rms(x: torch.Tensor, name: str) -> torch.Tensor:
        return w[name] * x / (x.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt()

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        gate = w[f"{name}.gate_proj.weight"] @ x
        return w[f"{name}.down_proj.weight"] @ (gate * torch.sigmoid(gate) * (w[f"{name}.up_proj.weight"] @ x))

    def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
        half = size // 2
        angle = position * c["rope_theta"] ** -(torch.arange(half) / half)
        a, b = x[:half], x[half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        q, k, v = (
            torch.stack([w[f"{name}.{p}_proj.weight"] @ row for row in x]).view(len(x), heads, size) for p in "qkv"
        )
        out = torch.zeros(len(x), heads, size)
        for h in range(heads):
            keys = torch.stack([rotate(k[t, h], t) for t in range(len(x))])
            for t in range(len(x)):
                scores = torch.softmax(keys[: t + 1] @ rotate(q[t, h], t) / math.sqrt(size), 0)
                out[t, h] = scores @ v[: t + 1, h]
        return out.flatten(1) @ w[f"{name}.o_proj.weight"].T

    def experts(x: torch.Tensor, name: str) -> torch.Tensor:
        scores = torch.softmax(w[f"{name}.gate.weight"] @ x, 0)
        best = scores.topk(c["num_experts_per_tok"]).indices.tolist()
        total = sum(scores[e] for e in best) if c["norm_topk_prob"] else 1.0
        routed = sum(scores[e] / total * mlp(x, f"{name}.experts.{e}") for e in best)
        return routed + mlp(x, f"{name}.shared_experts")

    found = []
    for row in tokens:
        x = w["model.embed_tokens.weight"][row]
        for layer in range(c["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + attention(rms(x, f"{name}.input_layernorm.weight"), f"{name}.self_attn")
            inner = rms(x, f"{name}.post_attention_layernorm.weight")
            block = experts if layer >= c["first_k_dense_replace"] else mlp
            x = x + torch.stack([block(one, f"{name}.mlp") for one in inner])
        found.append(rms(x, "model.norm.weight") @ w["lm_head.weight"].T)
    return torch.stack(found)


@pytest.mark.parametrize("normalised", [False, True])
def test_logits_equal_an_independent_implementation(tmp_path: Path, normalised: bool) -> None:
    register_deepseek()
    folder = hub_checkpoint(tmp_path / "m", norm_topk_prob=normalised)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.randint(0, 300, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = model(tokens).logits
    torch.testing.assert_close(found, naive_logits(folder, tokens), rtol=1e-4, atol=1e-5)


def test_the_hub_format_goes_in_and_comes_out(tmp_path: Path) -> None:
    """Names, auto_map and code stay; the count alone changes; the proof holds; no code is run."""
    folder = hub_checkpoint(tmp_path / "m")
    structure = read_structure(folder)
    assert structure.topology.decoder_layers == (1, 2)
    assert (structure.topology.num_experts, structure.topology.top_k) == (12, 3)
    chosen = plan(profile(structure, [random_corpus("a")]), keep=6)
    out = prune(structure, chosen, tmp_path / "out")
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, out))
    assert after == before | {"n_routed_experts": 6}
    kept = {
        name.replace(f".experts.{new}.", f".experts.{old}.")
        for row in chosen.layers
        for new, old in enumerate(row.kept)
        for name in load_file(out / "model.safetensors")
        if f"layers.{row.decoder_layer}.mlp.experts.{new}." in name
    }
    assert len(kept) == 2 * 6 * 3
    assert kept <= set(load_file(folder / "model.safetensors"))
    assert (out / "modeling_deepseek.py").read_bytes() == (folder / "modeling_deepseek.py").read_bytes()
    assert verify(folder, out)["equal"]


def test_a_scoring_function_that_the_published_code_has_not_is_refused() -> None:
    with pytest.raises(Exception, match="scoring_func 'sigmoid' is not known"):
        DeepseekConfig(scoring_func="sigmoid")


def test_other_spacings_of_sparse_layers(tmp_path: Path) -> None:
    folder = hub_checkpoint(tmp_path / "m", num_hidden_layers=5, moe_layer_freq=2)
    assert read_structure(folder).topology.decoder_layers == (2, 4)
    assert AutoConfig.from_pretrained(folder).num_experts == 12
