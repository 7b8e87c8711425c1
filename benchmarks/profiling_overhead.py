"""Cost of recording: time of a forward pass with statistics over the same plain forward pass, in one run.

    python -m benchmarks.profiling_overhead [--repeats 21] [--batches 4] [--threads 2]

The two passes take turns, so that a noisy machine disturbs both; the ratio printed is that of the medians, and beside
it the median of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.shapes import VOCABULARY, make_model
from moecover.model import load_model
from moecover.recording import recording
from moecover.topology import read_structure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument(
        "--batches", type=int, default=4, help="batches of 4 x 512 tokens per turn, as in a small corpus"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = torch.randint(0, VOCABULARY, (4, 512), generator=torch.Generator().manual_seed(0))
    print(f"60 experts top-4, hidden 512, expert width 352, 4 layers, 4 x 512 tokens, {args.threads} threads")
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            structure = read_structure(make_model(Path(folder), getattr(torch, dtype)))
            model = load_model(structure)
            plain: list[float] = []
            recorded: list[float] = []
            for repeat in range(args.repeats + 3):
                start = time.perf_counter()
                for _ in range(args.batches):
                    model(tokens, use_cache=False)
                middle = time.perf_counter()
                with recording(model, structure) as recorder:
                    for _ in range(args.batches):
                        model(tokens, use_cache=False)
                        recorder.end_batch()
                end = time.perf_counter()
                if repeat >= 3:
                    plain.append((middle - start) / args.batches)
                    recorded.append((end - middle) / args.batches)
            ratio = statistics.median(recorded) / statistics.median(plain)
            paired = statistics.median(b / a for a, b in zip(plain, recorded, strict=True))
            print(
                f"{dtype:9} plain {1000 * statistics.median(plain):7.1f} ms   recorded {1000 * statistics.median(recorded):7.1f} ms"
                f"   ratio {ratio:.3f}   (neighbours {paired:.3f})"
            )


if __name__ == "__main__":
    main()
