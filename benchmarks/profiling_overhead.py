"""Cost of profiling: time of a forward pass with statistics as a ratio to the same plain forward pass, in one run.

    python -m benchmarks.profiling_overhead [--repeats 21] [--batches 4] [--threads 2]

Three passes alternate, so that noise on the machine affects all of them alike: the plain one (``model(tokens)``), the
same with recording on, and the pass of `moecover profile` (recording on, no language-model head, running sums kept).
Each ratio is one of medians, followed by the median of the ratios within each round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.shapes import VOCABULARY, make_model
from moecover.checkpoints.structure import read_structure
from moecover.corpora.packing import make_corpus
from moecover.profiling.channels import width_of
from moecover.profiling.hooks import recording
from moecover.profiling.run import profile
from moecover.profiling.sums import Sums
from moecover.runtime.loading import load_model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument(
        "--batches", type=int, default=4, help="batches of 4 x 512 tokens per pass, as in a small corpus"
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
            rows = tokens.repeat(args.batches, 1).numpy()
            corpus = make_corpus("random", rows, np.ones(rows.shape, dtype=bool), {})
            seconds: list[tuple[float, float, float]] = []
            for repeat in range(args.repeats + 3):
                start = time.perf_counter()
                for _ in range(args.batches):
                    model(tokens, use_cache=False)
                middle = time.perf_counter()
                sums = Sums(structure.topology, torch.device("cpu"), args.batches, width_of(model, structure))
                with recording(model, structure) as taps:
                    for batch in range(args.batches):
                        model(tokens, use_cache=False)
                        sums.add(taps, 0, batch)
                end = time.perf_counter()
                profile(structure, [corpus], model=model, batch_size=4)
                last = time.perf_counter()
                if repeat >= 3:
                    seconds.append((middle - start, end - middle, last - end))
            plain, recorded, profiled = (
                statistics.median(column) / args.batches for column in zip(*seconds, strict=True)
            )
            for name, value, index in (("recorded", recorded, 1), ("profile", profiled, 2)):
                paired = statistics.median(row[index] / row[0] for row in seconds)
                print(
                    f"{dtype:9} plain {1000 * plain:7.1f} ms   {name:8} {1000 * value:7.1f} ms   "
                    f"ratio {value / plain:.3f}   (neighbours {paired:.3f})"
                )


if __name__ == "__main__":
    main()
