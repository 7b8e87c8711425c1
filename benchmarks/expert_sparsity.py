"""Cost of the expert-sparsity search in one layer of real size: 60 experts top-4, hidden 2048, expert width 1408.

    python -m benchmarks.expert_sparsity [--tokens 2048] [--keep 15] [--dtypes float32,bfloat16]

Random weights. Prints the seconds for the whole layer (outputs of all experts, Gram matrices, greedy elimination down
to ``--keep``, the loss of the result) and the rise of the peak resident memory above the loaded model.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from moecover.checkpoints.structure import read_structure
from moecover.corpora.packing import make_corpus
from moecover.planning.run import plan_budgets
from moecover.profiling.artifact import Profile
from moecover.profiling.run import profile
from moecover.runtime.loading import load_model


def make_layer(folder: Path, dtype: torch.dtype) -> Path:
    """Write a one-layer checkpoint in the shape of Qwen1.5-MoE-A2.7B."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=2000,
        hidden_size=2048,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        intermediate_size=5632,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts=60,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        max_position_embeddings=2048,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.05 if "gate.weight" in name else 0.02)
    model.save_pretrained(folder)
    return folder


def peak_mib() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mib() -> float:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--keep", type=int, default=15)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    args = parser.parse_args()
    for dtype in args.dtypes.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            structure = read_structure(make_layer(Path(scratch) / "model", getattr(torch, dtype)))
            tokens = np.random.default_rng(0).integers(0, 2000, size=(args.tokens // 512, 512))
            corpus = make_corpus("random", tokens, np.ones(tokens.shape, dtype=bool), {})
            model, folder = load_model(structure), Path(scratch) / "profile"
            profile(structure, [corpus], model=model, batch_size=1, keep_inputs=(args.tokens, folder)).save(folder)
            made = Profile.load(folder)
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory resident now
            before, start = resident_mib(), time.perf_counter()
            (plan,) = plan_budgets(made, method="expert-sparsity", keeps=[args.keep], model=model, structure=structure)
            seconds = time.perf_counter() - start
            (layer,) = plan.layers
            print(
                f"{dtype:9} {layer.search} to {args.keep} of 60 on {layer.tokens} tokens: {seconds:6.1f} s a layer, "
                f"memory +{peak_mib() - before:.0f} MiB over {before:.0f} MiB, loss {layer.loss:.5g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
