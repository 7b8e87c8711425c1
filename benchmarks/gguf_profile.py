"""Cost of profiling a GGUF model: time of a pass with statistics as a ratio to the plain pass of llama.cpp, in one run.

    python -m benchmarks.gguf_profile [--type Q8_0] [--repeats 7] [--threads 2] [--libllama PATH]

On a random qwen3moe of 60 experts. Three passes over the same tokens alternate: the plain one, whose logits are asked
for at every token; the same without the language-model head, which profiling does not run either; and the pass of
`moecover profile`. Ratios are medians of those within each round. The column norms of the down projections, taken once
a profile, are outside.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import quantize

from moecover.checkpoints.structure import read_structure
from moecover.llama.library import load
from moecover.llama.model import Session, opened
from moecover.llama.tensors import Tensors
from moecover.profiling.gguf_taps import GgufTaps, width_in
from moecover.profiling.sums import Sums

LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH, HEADS, VOCABULARY, TOKENS = 4, 60, 4, 512, 352, 8, 32_000, 2048


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the model's tensors."""
    yield from (("token_embd.weight", (VOCABULARY, HIDDEN)), ("output.weight", (VOCABULARY, HIDDEN)))
    yield "output_norm.weight", (HIDDEN,)
    for number in range(LAYERS):
        stem, head = f"blk.{number}.", HIDDEN // HEADS
        yield from ((f"{stem}{name}.weight", (HIDDEN,)) for name in ("attn_norm", "ffn_norm"))
        yield from ((f"{stem}{name}.weight", (head,)) for name in ("attn_q_norm", "attn_k_norm"))
        yield from ((f"{stem}attn_{n}.weight", (HIDDEN, HIDDEN)) for n in ("q", "k", "v", "output"))
        yield f"{stem}ffn_gate_inp.weight", (EXPERTS, HIDDEN)
        yield from ((f"{stem}ffn_{n}_exps.weight", (EXPERTS, WIDTH, HIDDEN)) for n in ("gate", "up"))
        yield f"{stem}ffn_down_exps.weight", (EXPERTS, HIDDEN, WIDTH)


def make_model(path: Path, kind: str) -> Path:
    """Write a random model whose experts are of a block type."""
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "qwen3moe")
    writer.add_context_length(TOKENS)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_value_length(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_expert_feed_forward_length(WIDTH)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    for name, shape in shapes():
        values = rng.standard_normal(shape, dtype=np.float32) / shape[-1] ** 0.5 if len(shape) > 1 else np.ones(shape)
        stored = gguf.GGMLQuantizationType[kind if "_exps." in name else "F32"]
        raw = np.ascontiguousarray(values, np.float32)
        writer.add_tensor(name, raw if stored.name == "F32" else quantize(raw, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def seconds(session: Session, tokens: np.ndarray, taps: GgufTaps | None = None, sums: Sums | None = None) -> float:
    """Time of one pass."""
    start = time.perf_counter()
    for _ in session.run(tokens):
        if taps is not None and sums is not None:
            sums.add(taps.taps, 0, 0)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--type", default="Q8_0", help="block type of the experts: F32, F16, BF16, Q8_0, Q4_0 ...")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--libllama", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    library, tokens = load(args.libllama), np.random.default_rng(1).integers(0, VOCABULARY, TOKENS)
    tensors = Tensors(library)

    def headless(tensor: object, ask: bool) -> bool:
        return ask and tensors.name(tensor) == b"result_norm"

    with tempfile.TemporaryDirectory() as folder:
        structure = read_structure(make_model(Path(folder) / "m.gguf", args.type))
        taps = GgufTaps(library, structure)
        sums = Sums(structure.topology, torch.device("cpu"), 1, width_in(structure))
        with (
            opened(Path(folder) / "m.gguf", library, on_cpu=True) as model,
            model.session(TOKENS, threads=args.threads) as plain,
            model.session(TOKENS, threads=args.threads, watch=headless) as no_head,
            model.session(TOKENS, threads=args.threads, watch=taps.recorder) as profiled,
        ):
            rounds = [
                (seconds(plain, tokens), seconds(no_head, tokens), seconds(profiled, tokens, taps, sums))
                for _ in range(args.repeats + 1)
            ][1:]
    shape = f"{EXPERTS} experts top-{TOP_K} of {args.type}, {TOKENS} tokens, {args.threads} threads"
    print(f"llama.cpp {library.version}, {shape}")
    for name, index in (("plain pass", 0), ("without the head", 1)):
        ratio = statistics.median(row[2] / row[index] for row in rounds)
        base = statistics.median(row[index] for row in rounds)
        print(f"{name:17} {1000 * base:7.1f} ms   profile over it {ratio:.3f}")


if __name__ == "__main__":
    main()
