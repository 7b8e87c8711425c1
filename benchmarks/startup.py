"""Start-up cost of the commands: wall seconds of whole processes, beside an interpreter that does nothing.

    python -m benchmarks.startup [--rounds 7] [--folder DIR]

`inspect` and `prune --plan` run on the shipped model, and `inspect` also on the headers of Qwen1.5-MoE-A2.7B (4,659
tensors in eight sparse files): "first" with an empty structure cache, "later" with the one that the first run left. The
commands alternate; prints the median over the rounds, its difference to the interpreter's, and which of the large
libraries are loaded at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.full_size import SHAPES, tensors

SHIPPED = Path(__file__).parents[1] / "src/moecover/assets/models/qwen2-moe-tiny"
LARGE = ("torch", "transformers", "datasets", "huggingface_hub", "matplotlib", "scipy", "pydantic", "numpy", "rich")
WHICH = """
import sys
from moecover.cli.main import main
try: main(sys.argv[1:])
except SystemExit: pass
print(*(name for name in {large} if name in sys.modules), file=sys.stderr)
"""


def make_headers(shape: str, folder: Path) -> Path:
    """Write a checkpoint of real size in sparse files: configuration, index and headers, no weights."""
    files, config = SHAPES[shape]
    rows = [(name, dimensions, 2 * math.prod(dimensions)) for name, dimensions, _ in tensors(config)]
    folder.mkdir()
    share, weight_map = -(-len(rows) // files), {}
    for number in range(files):
        shard, header, position = f"model-{number:05}.safetensors", {}, 0
        for name, dimensions, size in rows[number * share : (number + 1) * share]:
            header[name] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [position, position + size]}
            position, weight_map[name] = position + size, shard
        raw = json.dumps(header).encode()
        with (folder / shard).open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + position)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def seconds(command: list[str], cache: Path) -> float:
    """Wall time of one process."""
    started = time.perf_counter()
    done = subprocess.run(command, env=os.environ | {"MOECOVER_CACHE": str(cache)}, capture_output=True, check=False)
    taken = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr.decode()}")
    return taken


def main() -> None:
    """Run the commands in alternation and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the system's temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        folder = Path(made)
        qwen, cache, out = make_headers("qwen1.5-moe-a2.7b", folder / "qwen"), folder / "cache", folder / "out"
        profile, plan = folder / "profile", folder / "plan.json"
        moecover = [sys.executable, "-m", "moecover"]
        texts = ["--corpus", "web", "--corpus", "encyclopedia", "--sequences", "4"]
        seconds([*moecover, "profile", str(SHIPPED), *texts, "-o", str(profile)], cache)
        seconds([*moecover, "plan", str(profile), "--retain", "0.5", "-o", str(plan)], cache)
        verbs = {
            "--help": ["--help"],
            **{f"ls {what}": ["ls", what] for what in ("methods", "saliencies", "corpora", "families")},
            "inspect, first": ["inspect", str(SHIPPED)],
            "inspect, later": ["inspect", str(SHIPPED)],
            "inspect Qwen1.5-MoE, first": ["inspect", str(qwen)],
            "inspect Qwen1.5-MoE, later": ["inspect", str(qwen)],
            "plan": ["plan", str(profile), "--retain", "0.5", "-o", str(plan)],
            "explain": ["explain", str(plan)],
            "prune --plan, first": ["prune", str(SHIPPED), "--plan", str(plan), "-o", str(out)],
            "prune --plan, later": ["prune", str(SHIPPED), "--plan", str(plan), "-o", str(out)],
        }
        times: dict[str, list[float]] = {name: [] for name in ("python -c pass", *verbs)}
        for _ in range(args.rounds):
            times["python -c pass"].append(seconds([sys.executable, "-c", "pass"], cache))
            for name, words in verbs.items():
                shutil.rmtree(out, ignore_errors=True)
                if name.endswith("first"):
                    shutil.rmtree(cache, ignore_errors=True)
                times[name].append(seconds([*moecover, *words], cache))
        bare = statistics.median(times["python -c pass"])
        print(f"{'':30}{'median s':>9}{'over bare':>11}  loaded")
        print(f"{'python -c pass':30}{bare:9.3f}")
        for name, words in verbs.items():
            shutil.rmtree(cache if name.endswith("first") else out, ignore_errors=True)
            shutil.rmtree(out, ignore_errors=True)
            done = subprocess.run(
                [sys.executable, "-c", WHICH.format(large=LARGE), *words],
                env=os.environ | {"MOECOVER_CACHE": str(cache)},
                capture_output=True,
                check=True,
                text=True,
            )
            loaded, median = done.stderr.strip().split("\n")[-1], statistics.median(times[name])
            print(f"{name:30}{median:9.3f}{median - bare:11.3f}  {loaded}")


if __name__ == "__main__":
    main()
