"""The cost of running layer by layer: against the same pass without statistics, and against the same pass in memory.

    python -m benchmarks.streaming FOLDER [--blocks 16] [--length 2048] [--rounds 3]    a checkpoint of any size
    python -m benchmarks.streaming --curves SCRATCH [--shape qwen1.5-moe-a2.7b]         models of 2, 4 and 8 layers

Two corpora of random tokens, batches of one block. Every pass runs in its own process; they alternate. With FOLDER:
`profile` layer by layer over a plain streamed pass (both read the checkpoint once), and its peak resident memory. With
--curves: a streamed over an in-memory pass (with and without the time to load the model), memory over the number of
layers, time over the number of tokens. `python -m benchmarks.full_size` makes checkpoints.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.full_size import SHAPES, make

PASS = """
import functools, sys, time
import numpy as np
from moecover.corpora.packing import make_corpus
from moecover.runtime.loading import load_model
from moecover.corpora.batches import batches
from moecover.profiling.run import profile
from moecover.runtime.loading import backbone_of
from moecover.runtime.layerwise import run
from moecover.runtime.streaming import streamed
from moecover.checkpoints.structure import read_structure
import torch

what, folder, blocks, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
structure = read_structure(folder)
tokens = np.random.default_rng(0).integers(0, structure.checkpoint.config["vocab_size"], size=(blocks, length))
corpora = [make_corpus(n, t, np.ones_like(t, dtype=bool), {}) for n, t in zip("ab", np.array_split(tokens, 2))]
inputs = [one for corpus in corpora for one in batches(corpus, 1)]
started = time.perf_counter()
if what == "memory":
    model = load_model(structure)
    ready = time.perf_counter()
    with torch.inference_mode():
        for one in inputs:
            backbone_of(model)(**one, use_cache=False)
else:
    with streamed(structure) as stream:
        ready = time.perf_counter()
        if what == "profile":
            profile(structure, corpora, model=stream, batch_size=1)
        else:
            forward = functools.partial(backbone_of(stream.module), use_cache=False)
            run(stream, [functools.partial(forward, **one) for one in inputs], head=False)
ended = time.perf_counter()
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
print(ended - started, ended - ready, peak)
"""


def measure(what: str, folder: Path, blocks: int, length: int) -> tuple[float, float, float]:
    """Seconds with and without opening the model, and peak resident MiB, of one process."""
    command = [sys.executable, "-c", PASS, what, str(folder), str(blocks), str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    whole, alone, peak = map(float, done.stdout.split())
    return whole, alone, peak


def medians(rows: list[tuple[float, float, float]]) -> tuple[float, ...]:
    """The median of every column."""
    return tuple(map(statistics.median, zip(*rows, strict=True)))


def one_size(folder: Path, blocks: int, length: int, rounds: int) -> None:
    """Print the ratio of `profile` to a plain pass, both streamed."""
    kinds = ("plain", "profile")
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            found[kind].append(measure(kind, folder, blocks, length))
            print(f"{kind:8} {found[kind][-1][0]:7.1f} s   peak {found[kind][-1][2]:6.0f} MiB", flush=True)
    plain, ours = (medians(found[kind]) for kind in kinds)
    print(f"ratio {ours[0] / plain[0]:.3f}; peak {ours[2]:.0f} MiB, {ours[2] - plain[2]:+.0f} over the plain pass")


def compared(folder: Path, blocks: int, length: int, rounds: int) -> str:
    """A line that compares streamed with in-memory passes: ratio, time of `profile`, memory of both."""
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in ("memory", "plain", "profile")}
    for _ in range(rounds):
        for kind, rows in found.items():
            rows.append(measure(kind, folder, blocks, length))
    memory, plain, ours = (medians(rows) for rows in found.values())
    return (
        f"in memory {memory[0]:6.1f} s ({memory[1]:.1f} without loading), streamed {plain[0]:6.1f} s: ratio "
        f"{plain[0] / memory[0]:.3f} ({plain[0] / memory[1]:.3f} without loading); profile streamed {ours[0]:6.1f} s, "
        f"{1e3 * ours[0] / (blocks * length):.3f} ms a token; "
        f"peak {memory[2]:.0f} in memory, {ours[2]:.0f} MiB streamed"
    )


def over_layers(scratch: Path, shape: str, length: int, rounds: int) -> None:
    """Models of 2, 4 and 8 layers on the same tokens."""
    for layers in (2, 4, 8):
        folder = make(shape, scratch / f"{shape}-{layers}", layers=layers)
        print(f"{layers} layers, {4 * length} tokens: {compared(folder, 4, length, rounds)}", flush=True)


def over_tokens(scratch: Path, shape: str, length: int, rounds: int) -> None:
    """The model of 2 layers on increasing numbers of tokens."""
    folder = make(shape, scratch / f"{shape}-2", layers=2)
    for blocks in (4, 8, 16):
        print(f"2 layers, {blocks * length} tokens: {compared(folder, blocks, length, rounds)}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--curves", type=Path, metavar="SCRATCH")
    parser.add_argument("--shape", choices=SHAPES, default="qwen1.5-moe-a2.7b")
    args = parser.parse_args()
    if args.curves:
        over_layers(args.curves, args.shape, args.length, args.rounds)
        over_tokens(args.curves, args.shape, args.length, args.rounds)
    elif args.folder:
        one_size(args.folder, args.blocks, args.length, args.rounds)
    else:
        parser.error("give a checkpoint, or --curves SCRATCH")


if __name__ == "__main__":
    main()
