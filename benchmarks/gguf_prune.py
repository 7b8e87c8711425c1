"""Time and memory of pruning a GGUF file against `cp` of the bytes that it writes; reading its header against `gguf`.

    python -m benchmarks.gguf_prune [--gb 2] [--type Q4_K] [--retain 0.5] [--width W] [--rounds 5] [--folder .]

Writes a file of random bytes in the shape of Qwen3-30B-A3B (128 experts of 768 channels, hidden size 2048), with as
many layers as fit into ``--gb``, and 150,000 tokens and merges in its header. With ``--width``, the first W channels of
every kept expert stay: rows of gate and up projection, whole blocks of the down projection. Rounds alternate `prune` in
a process of its own and `cp` of its output, both with the files flushed to the disk. Prints medians and minima, the
ratio, the rise of the peak resident memory above a process that only imports, and the CPU seconds of both readers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

from moecover.gguf.header import read_header
from moecover.planning.artifact import LayerPlan, Plan

HIDDEN, WIDTH, EXPERTS, TOP_K, STRINGS = 2048, 768, 128, 8, 150_000
IMPORTS = """
import sys, time
from moecover.checkpoints.structure import read_structure
from moecover.planning.artifact import Plan
from moecover.pruning.gguf_writer import prune_gguf
from pathlib import Path
def peak(): return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) * 1024
"""
RUN = """
source, plan, output = sys.argv[1:]
started = time.perf_counter()
prune_gguf(read_structure(source), Plan.load(plan), Path(output))
print(time.perf_counter() - started, peak())
"""


def make_file(path: Path, layers: int, kind: str) -> Path:
    """Write a file of random bytes: one block of them, over and over."""
    quantised = gguf.GGMLQuantizationType[kind]
    numbers, size = gguf.GGML_QUANT_SIZES[quantised]
    writer = gguf.GGUFWriter(path, "qwen3moe", use_temp_file=False)
    writer.add_block_count(layers)
    writer.add_embedding_length(HIDDEN)
    writer.add_uint32("qwen3moe.expert_count", EXPERTS)
    writer.add_uint32("qwen3moe.expert_used_count", TOP_K)
    writer.add_uint32("qwen3moe.expert_feed_forward_length", WIDTH)
    writer.add_array("tokenizer.ggml.tokens", [f"token{i}" for i in range(STRINGS)])
    writer.add_array("tokenizer.ggml.merges", [f"a{i} b{i}" for i in range(STRINGS)])
    rng = np.random.default_rng(0)
    shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    blocks = {
        name: rng.integers(0, 256, (EXPERTS, rows, columns // numbers * size), dtype=np.uint8)
        for name, (rows, columns) in shapes.items()
    }
    for layer in range(layers):
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", np.zeros((EXPERTS, HIDDEN), np.float32))
        for name, values in blocks.items():
            writer.add_tensor(f"blk.{layer}.ffn_{name}_exps.weight", values, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_plan(path: Path, layers: int, keep: int, width: int | None) -> Path:
    """Write a plan that keeps experts at random."""
    rng = np.random.default_rng(1)
    rows = []
    for layer in range(layers):
        channels = [list(range(width))] * keep if width else []
        kept = sorted(rng.permutation(EXPERTS)[:keep].tolist())
        rows.append(LayerPlan(decoder_layer=layer, kept=kept, channels=channels))
    Plan(schema=1, keep=keep, width=width, layers=rows).save(path)
    return path


def pruned(source: Path, plan: Path, output: Path) -> tuple[float, int]:
    """Seconds and peak of memory of a process that prunes."""
    output.unlink(missing_ok=True)
    os.sync()
    made = subprocess.run(
        [sys.executable, "-c", IMPORTS + RUN, source, plan, output], check=True, capture_output=True, text=True
    )
    seconds, peak = made.stdout.split()
    return float(seconds), int(peak)


def copied(source: Path, output: Path) -> float:
    """Seconds of `cp` with the file flushed."""
    output.unlink(missing_ok=True)
    os.sync()
    started = time.perf_counter()
    subprocess.run(["cp", source, output], check=True)
    with output.open("rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - started


def readers(path: Path) -> str:
    """CPU seconds of reading the header, here and by the package."""
    started = time.process_time()
    read_header(path)
    ours = time.process_time() - started
    gguf.GGUFReader(path)
    return f"header: {ours:.3f} s, gguf {time.process_time() - started - ours:.1f} s of CPU"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gb", type=float, default=2.0, help="size of the file to make")
    parser.add_argument("--type", default="Q4_K", help="block type of the experts")
    parser.add_argument("--retain", type=float, default=0.5)
    parser.add_argument("--width", type=int, help="channels that stay of every kept expert (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(), help="disk to measure on")
    args = parser.parse_args()
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[args.type]]
    layers = max(1, round(args.gb * 1e9 / (3 * EXPERTS * WIDTH * HIDDEN // numbers * size)))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = make_file(Path(folder) / "source.gguf", layers, args.type)
        plan = make_plan(Path(folder) / "plan.json", layers, round(args.retain * EXPERTS), args.width)
        output, copy = Path(folder) / "half.gguf", Path(folder) / "copy.gguf"
        only = subprocess.run(
            [sys.executable, "-c", IMPORTS + "print(peak())"], check=True, capture_output=True, text=True
        )
        times: dict[str, list[float]] = {"prune": [], "cp": []}
        peaks = []
        for _ in range(args.rounds):
            with source.open("rb") as file:
                while file.read(1 << 20):
                    pass
            seconds, peak = pruned(source, plan, output)
            times["prune"].append(seconds)
            peaks.append(peak - int(only.stdout))
            times["cp"].append(copied(output, copy))
        ratios = [one / other for one, other in zip(times["prune"], times["cp"], strict=True)]
        print(f"{source.stat().st_size / 1e9:.2f} GB of {args.type}, {output.stat().st_size / 1e9:.2f} GB written")
        for name, found in times.items():
            print(f"{name}: {statistics.median(found):.2f} s, at least {min(found):.2f}")
        print(f"prune / cp: {statistics.median(ratios):.2f} (median of {args.rounds} rounds)")
        print(f"memory above imports: {max(peaks) / 2**20:.0f} MiB")
        print(readers(source))


if __name__ == "__main__":
    main()
