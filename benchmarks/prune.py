"""Time and memory of `prune` against `cp` of the bytes that it writes, on one disk, in alternation.

    python -m benchmarks.prune [--gb 2] [--model FOLDER] [--retain 0.5] [--width W] [--rounds 5] [--cold]
                              [--folder .]

Without ``--model``, writes a checkpoint of random bytes in the shape of Qwen1.5-MoE-A2.7B, with as many layers as fit
into ``--gb`` (27.2 for all 24; the vocabulary stays small). With ``--width``, W channels at random stay of every kept
expert: rows of gate and up projection, and strided columns of the down projection. Before every round, the files to be
read are brought into the page cache, or with ``--cold`` dropped from it; use ``--cold`` for more than fits into memory.
With ``--cold``, all free memory is also touched before every run: a virtual machine may have to ask its host for memory
that was free for long, which would slow down whichever runs first. Every `prune` runs in its own process. Prints the
median over the rounds and the minimum of:

- ``cp``: cp of the output folder, and the same with its files flushed to the disk as `prune` flushes them;
- ``cp of the source``: cp of as many of the source's shards as hold the output's bytes, scaled to those bytes. With
  ``--cold``, this is the baseline for `prune`: a virtual machine's host may still cache the output, which was just
  written, but not the source;
- ``prune``: the call, and the whole process;
- the ratios, and the rise of the peak resident memory of such a process above one that only imports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil

WIDTH, EXPERT_WIDTH, SHARED_WIDTH, EXPERTS, VOCABULARY = 2048, 1408, 5632, 60, 2000
IMPORTS = """
import os, sys, time
from pathlib import Path
import torch, transformers, transformers.models.qwen2_moe.modeling_qwen2_moe
from moecover.pruning.writer import prune
from moecover.planning.artifact import Plan
from moecover.checkpoints.structure import read_structure
def peak(): return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) * 1024
"""
RUN = """
source, plan, output = sys.argv[1:]
structure = read_structure(source)
started = time.perf_counter()
prune(structure, Plan.load(plan), output)
print(time.perf_counter() - started, peak())
"""
TOUCH = """
import mmap, sys
n = int(sys.argv[1])
memory = mmap.mmap(-1, n)
for at in range(0, n, 4096): memory[at] = 1
"""


def tensors(layers: int) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """File name and tensor shapes of every shard: one shard per layer, then the rest."""
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes: dict[str, tuple[int, ...]] = {
            at + "mlp.gate.weight": (EXPERTS, WIDTH),
            at + "mlp.shared_expert_gate.weight": (1, WIDTH),
        }
        for name, width in [(f"experts.{e}", EXPERT_WIDTH) for e in range(EXPERTS)] + [("shared_expert", SHARED_WIDTH)]:
            for part in ("gate_proj", "up_proj", "down_proj"):
                shapes[f"{at}mlp.{name}.{part}.weight"] = (WIDTH, width) if part == "down_proj" else (width, WIDTH)
        for part in "qkvo":
            shapes[f"{at}self_attn.{part}_proj.weight"] = (WIDTH, WIDTH)
            if part != "o":
                shapes[f"{at}self_attn.{part}_proj.bias"] = (WIDTH,)
        for part in ("input", "post_attention"):
            shapes[f"{at}{part}_layernorm.weight"] = (WIDTH,)
        yield f"model-{layer + 1:05}.safetensors", dict(sorted(shapes.items()))
    rest = {
        "lm_head.weight": (VOCABULARY, WIDTH),
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    yield f"model-{layers + 1:05}.safetensors", rest


def make_checkpoint(folder: Path, layers: int) -> Path:
    """Write a checkpoint of random bytes: one block of them, repeated."""
    folder.mkdir()
    config = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 5632,
        "moe_intermediate_size": EXPERT_WIDTH,
        "shared_expert_intermediate_size": SHARED_WIDTH,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    block = np.random.default_rng(0).bytes(16 << 20)
    weight_map: dict[str, str] = {}
    for shard, shapes in tensors(layers):
        header, position = dict[str, object](), 0
        for name, shape in shapes.items():
            end = position + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
            position, weight_map[name] = end, shard
        raw = json.dumps(header).encode()
        with (folder / shard).open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            while position:
                position -= file.write(block[: min(len(block), position)])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def prepare(folders: list[Path], *, cold: bool) -> None:
    """Bring the files into the page cache, or drop them from it, after pending writes have reached the disk."""
    os.sync()
    buffer = bytearray(1 << 20)
    for path in (p for folder in folders for p in folder.rglob("*") if p.is_file()):
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and file.readinto(buffer):
                pass
    if cold:
        subprocess.run([sys.executable, "-c", TOUCH, str(psutil.virtual_memory().available * 9 // 10)], check=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint to make")
    parser.add_argument("--model", type=Path, help="an existing checkpoint to use instead")
    parser.add_argument("--retain", type=float, default=0.5)
    parser.add_argument("--width", type=int, help="channels that stay of every kept expert (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the page cache")
    parser.add_argument("--folder", type=Path, default=Path(), help="scratch folder; twice the size is needed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        measure(Path(name), args)


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def plan_at_random(source: Path, retain: float, width: int | None, path: Path) -> None:
    """Write a plan that keeps a random share of the experts of every layer, and random channels of each."""
    from moecover.checkpoints.structure import read_structure
    from moecover.checkpoints.topology import Width
    from moecover.planning.artifact import LayerPlan, Plan
    from moecover.planning.keep import resolve_keep

    structure, chance = read_structure(source), np.random.default_rng(0)
    topology, channels = structure.topology, structure.width.channels if isinstance(structure.width, Width) else 0
    keep = resolve_keep(topology, keep=None, retain=retain)

    def some(number: int, count: int) -> list[int]:
        return sorted(map(int, chance.choice(number, count, replace=False)))

    layers = [LayerPlan(decoder_layer=d, kept=some(topology.num_experts, keep)) for d in topology.decoder_layers]
    for layer in layers if width is not None else ():
        layer.channels = [some(channels, width or 0) for _ in layer.kept]
    Plan(schema=1, keep=keep, width=width, layers=layers).save(path)


class Rounds:
    """The three runs that alternate, and the seconds of each.

    Attributes:
        times: seconds by what was timed.
        peaks: peak resident memory of every process of ours, in bytes.
    """

    def __init__(self, source: Path, work: Path, *, cold: bool) -> None:
        self.source, self.plan, self.cold = source, work / "plan.json", cold
        self.output, self.copy = work / "out", work / "copy"
        copies = ["cp", "cp, flushed", "cp of the source", "cp of the source, flushed"]
        self.times: dict[str, list[float]] = {name: [] for name in [*copies, "prune", "prune, whole process"]}
        self.peaks: list[int] = []

    def prune(self) -> None:
        """Prune in a new process."""
        shutil.rmtree(self.output, ignore_errors=True)
        prepare([self.source], cold=self.cold)
        started = time.perf_counter()
        command = [sys.executable, "-c", IMPORTS + RUN, str(self.source), str(self.plan), str(self.output)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        self.times["prune, whole process"].append(time.perf_counter() - started)
        seconds, peak = done.stdout.split()
        self.times["prune"].append(float(seconds))
        self.peaks.append(int(peak))

    def cp(self) -> None:
        """Copy what `prune` wrote."""
        shutil.rmtree(self.copy, ignore_errors=True)
        prepare([self.output], cold=self.cold)
        started = time.perf_counter()
        subprocess.run(["cp", "-r", self.output, self.copy], check=True)
        self.times["cp"].append(time.perf_counter() - started)
        subprocess.run(["sync", *self.copy.rglob("*")], check=True)
        self.times["cp, flushed"].append(time.perf_counter() - started)
        shutil.rmtree(self.copy)

    def cp_source(self) -> None:
        """Copy as many shards of the source as hold the output's bytes; seconds are scaled to those bytes."""
        wanted, shards, found = size(self.output), list[Path](), 0
        while found < wanted:
            shards.append(sorted(self.source.glob("*.safetensors"))[len(shards)])
            found += shards[-1].stat().st_size
        self.copy.mkdir()
        prepare([self.source], cold=self.cold)
        started = time.perf_counter()
        subprocess.run(["cp", *shards, self.copy], check=True)
        self.times["cp of the source"].append((time.perf_counter() - started) * wanted / found)
        subprocess.run(["sync", *self.copy.rglob("*")], check=True)
        self.times["cp of the source, flushed"].append((time.perf_counter() - started) * wanted / found)
        shutil.rmtree(self.copy)


RATIOS = [
    ("prune", "cp", "ratio to cp"),
    ("prune", "cp, flushed", "ratio to cp, both flushed"),
    ("prune", "cp of the source", "ratio to cp of the source"),
    ("prune", "cp of the source, flushed", "  both flushed"),
]


def measure(work: Path, args: argparse.Namespace) -> None:
    """Run everything in alternation in a scratch folder, and print."""
    source = args.model or make_checkpoint(work / "model", max(1, round(args.gb / 1.134)))
    plan_at_random(source, args.retain, args.width, work / "plan.json")
    rounds = Rounds(source, work, cold=args.cold)
    for _ in range(args.rounds):
        rounds.prune()
        rounds.cp()
        rounds.cp_source()
    gb, cache = size(rounds.output) / 1e9, "cold" if args.cold else "warm"
    command = [sys.executable, "-c", IMPORTS + "print(peak())"]
    imports = subprocess.run(command, check=True, capture_output=True, text=True)
    thin = f", {args.width} channels of every expert" if args.width is not None else ""
    print(f"{gb:.2f} GB written{thin}, {cache}, {args.rounds} rounds; seconds: median, least")
    times = rounds.times
    for name, seconds in times.items():
        print(f"  {name:30}{statistics.median(seconds):8.2f}{min(seconds):8.2f}")
    figures: list[Callable[[list[float]], float]] = [statistics.median, min]
    for one, other, label in RATIOS:
        print(f"  {label:30}" + "".join(f"{figure(times[one]) / figure(times[other]):8.2f}" for figure in figures))
    print(f"peak resident memory above the imports: {(max(rounds.peaks) - int(imports.stdout)) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
