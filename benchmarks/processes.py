"""What sharing the work of a verb among processes brings on one machine: time and memory with 1, 2, ... processes.

    python -m benchmarks.processes [--processes 1 2] [--model MODEL] [--rounds 3] [--verbs NAME ...]

Every process has one thread, as torchrun starts them, so that two processes are two cores. The verbs run on a shipped
model (or MODEL) with shipped text; rounds alternate. Prints, for every verb, the median seconds of the whole command
(start included, and without it: less those of a profile of a few tokens), the ratio to one process, and the largest
resident memory of a process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from moecover.checkpoints.shipped import shipped_model

TEXT = ("--corpus", "encyclopedia", "--corpus", "web")
PORT = 29_700


def verbs(model: str, source: Path, output: Path) -> dict[str, list[str]]:
    """Command lines; ``source`` has what they read, ``output`` what they write."""
    sizes, written = (
        ["--sequences", "16", "--batch-size", "4"],
        ["--sequences", "8", "--length", "128", "--batch-size", "4"],
    )
    measured = ["--perplexity", "encyclopedia-heldout", "--perplexity", "web-heldout", "--windows", "16"]
    search = ["--method", "expert-sparsity", "--retain", "0.5", "--model", model]
    return {
        "start": ["profile", model, *TEXT, "--sequences", "1", "--length", "8", "-o", str(output / "profile")],
        "profile": ["profile", model, *TEXT, *sizes, "-o", str(output / "profile")],
        "evaluate": ["evaluate", model, *measured, "--batch-size", "4", "-o", str(output / "evaluation")],
        "plan": ["plan", str(source / "profile"), *search, "-o", str(output / "plan.json")],
        "generate": ["generate", model, *written, "-o", str(output / "own.jsonl")],
        "prune": ["prune", model, *TEXT, *sizes, "--retain", "0.5", "--repair", "ridge", "-o", str(output / "pruned")],
    }


def run(command: Sequence[str], processes: int) -> tuple[float, int]:
    """Seconds of a command, and the largest resident memory of one of its processes."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(PORT)]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), "-m", "moecover", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        text=True,
    )
    watched, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        for one in [watched, *watched.children(recursive=True)] if watched.is_running() else ():
            try:
                peak = max(peak, one.memory_info().rss)
            except psutil.Error:  # it has ended
                continue
        time.sleep(0.05)
    if process.returncode:
        assert process.stderr is not None
        sys.exit(f"{' '.join(command)}: {process.stderr.read()}")
    return time.perf_counter() - started, peak


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--model", default=str(shipped_model()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--verbs", nargs="+", help="some of the verbs")
    args = parser.parse_args()
    seconds: dict[tuple[str, int], list[float]] = {}
    peaks: dict[tuple[str, int], int] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        kept = [*TEXT, "--sequences", "8", "--keep-inputs", "1024", "-o", str(source / "profile")]
        run(["profile", args.model, *kept], 1)
        names = ["start", *(args.verbs or [name for name in verbs("", source, source) if name != "start"])]
        for number in range(args.rounds):
            for name in names:
                for processes in args.processes:
                    output = Path(folder) / f"{name}-{processes}-{number}"
                    output.mkdir()
                    took, peak = run(verbs(args.model, source, output)[name], processes)
                    print(f"{name}, {processes}: {took:.1f} s", file=sys.stderr, flush=True)
                    seconds.setdefault((name, processes), []).append(took)
                    peaks[name, processes] = max(peak, peaks.get((name, processes), 0))
    print("| verb | processes | s | without the start | over one process | MB a process |\n|---|" + "---:|" * 5)
    middle = {key: statistics.median(took) for key, took in seconds.items()}
    first = args.processes[0]
    for (name, processes), took in middle.items():
        work, alone = (middle[name, n] - middle["start", n] for n in (processes, first))
        cells = [name, str(processes), f"{took:.1f}"]
        cells += ["", ""] if name == "start" else [f"{work:.1f}", "" if processes == first else f"{work / alone:.2f}"]
        print(f"| {' | '.join(cells)} | {peaks[name, processes] / 1e6:,.0f} |")


if __name__ == "__main__":
    main()
