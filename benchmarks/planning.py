"""Planning on the profile of a large model: 61 layers x 256 experts x 5 corpora, random statistics.

    python -m benchmarks.planning

For every method that plans from the sums alone, with one budget and with three: prints the seconds inside the process,
from the command line to the written plan (reading the profile included), and those of the whole process with its
start-up.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from moecover.checkpoints.topology import Topology
from moecover.cli.main import main as moecover
from moecover.profiling.artifact import Profile
from moecover.profiling.statistics import COUNTS, PARTS, STATISTICS

LAYERS, EXPERTS, CORPORA = 61, 256, 5


def make_profile(folder: Path) -> Path:
    """Write a profile in the shape of DeepSeek-V3."""
    rng = np.random.default_rng(0)
    topology = Topology("deepseek_v3", tuple(range(3, 3 + LAYERS)), EXPERTS, 8, 7168, 3 + LAYERS, 8, 4)

    def statistics(*shape: int) -> dict[str, np.ndarray]:
        return {
            n: rng.integers(1, 10**6, size=shape) if n in COUNTS else rng.gamma(0.5, size=shape) for n in STATISTICS
        }

    names = [f"corpus{i}" for i in range(CORPORA)]
    made = {name: statistics(LAYERS, EXPERTS) for name in names}
    parts = {
        name: {
            n: np.stack([v * i // PARTS if n in COUNTS else v * i / PARTS for i in range(1, PARTS)])
            for n, v in s.items()
        }
        for name, s in made.items()
    }
    records = {name: [{"sha256": name}] for name in names}
    model = {"name": "random", "fingerprint": "random"}
    Profile(topology, made, records, model, {}, parts).save(folder)
    return folder


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_profile(Path(scratch) / "profile")
        size = (folder / "profile.safetensors").stat().st_size / 1e6
        print(f"{LAYERS} layers x {EXPERTS} experts x {CORPORA} corpora, profile of {size:.0f} MB")
        for method in ("tb-coverage", "pooled", "random"):
            for keep, out in (("128", "plan.json"), ("64,128,192", "plans")):
                command = ["plan", str(folder), "--method", method, "--keep", keep]
                command += ["-o", str(Path(scratch) / out), "-q"]
                if method != "random":
                    command += ["--saliency", "reap"]
                seconds = []
                for _ in range(3):
                    start = time.perf_counter()
                    assert moecover([*command, "--json"]) == 0
                    seconds.append(time.perf_counter() - start)
                start = time.perf_counter()
                subprocess.run([sys.executable, "-m", "moecover", *command], check=True, stdout=subprocess.DEVNULL)
                whole = time.perf_counter() - start
                print(
                    f"{method:12} keep {keep:11} {min(seconds):5.2f} s, whole process {whole:5.2f} s", file=sys.stderr
                )


if __name__ == "__main__":
    main()
