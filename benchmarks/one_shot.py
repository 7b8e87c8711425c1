"""One-shot prune against load, plain forward pass and save_pretrained, both as whole processes, in one run.

    python -m benchmarks.one_shot [--repeats 5]

Both read the same model and the same 8 x 512 tokens from disk and write a checkpoint; they alternate. `moecover prune`
starts, reads, profiles, plans and writes half of the experts; the other process does what any script has to: load, run
the tokens once and save. Prints the wall time and the peak resident memory of both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.shapes import make_model, make_rows

PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
rows = torch.tensor([json.loads(line)["input_ids"] for line in open(sys.argv[2])])
with torch.inference_mode():
    for batch in rows.split(4):
        model(batch, use_cache=False)
model.save_pretrained(sys.argv[3])
"""


def measure(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MiB of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"failed with status {status}: {' '.join(command)}")
    return wall, usage.ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            model = make_model(folder / "model", getattr(torch, dtype))
            rows, out = make_rows(folder / "rows.jsonl", 8, 512), folder / "out"
            ours = ["moecover", "prune", str(model), "--corpus", f"rows={rows}", "--retain", "0.5"]
            commands = {
                "plain": [sys.executable, "-c", PLAIN, str(model), str(rows), str(out)],
                "moecover": [sys.executable, "-m", *ours, "--batch-size", "4", "-o", str(out)],
            }
            results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
            for repeat in range(args.repeats + 1):
                for name, command in commands.items():
                    result = measure(command)
                    shutil.rmtree(out)
                    if repeat:  # the first round fills the page cache
                        results[name].append(result)
            wall = {name: statistics.median(w for w, _ in rs) for name, rs in results.items()}
            memory = {name: statistics.median(m for _, m in rs) for name, rs in results.items()}
            for name in commands:
                print(f"{dtype:9} {name:9} {wall[name]:6.2f} s   peak {memory[name]:7.0f} MiB")
            time_ratio, memory_ratio = (of["moecover"] / of["plain"] for of in (wall, memory))
            print(f"{dtype:9} ratio     {time_ratio:6.2f}     memory {memory_ratio:6.2f}")


if __name__ == "__main__":
    main()
