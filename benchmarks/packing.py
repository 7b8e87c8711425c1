"""Text read per second and memory of packing, against `datasets` alone, for files of 10 MB to 1 GB.

    python -m benchmarks.packing [--sizes 10 100 1000] [--rounds 3] [--folder DIR]

The files hold the shipped corpora's documents over and over, as .txt and as .jsonl. For each, in processes of their
own: "read" goes through all rows as `profile` reads a corpus, `datasets` through the same rows of the same file as a
stream; "pack" draws the default sample of 128 blocks of 2,048 tokens with the shipped model's tokenizer. Prints
megabytes a second, the ratio of the two readers in one run (medians over rounds), and the peak of memory above that of
an interpreter that has imported the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "src/moecover/assets"
MEGABYTE = 1_000_000
WORK = """
import json, resource, sys, time
from pathlib import Path
import datasets
from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import read_structure
from moecover.corpora.formats import file_rows
from moecover.corpora.packing import load_corpus
from moecover.corpora.tokenizer import load_tokenizer

what, path = sys.argv[1], Path(sys.argv[2])
structure = read_structure(shipped_model("qwen2-moe-tiny"))
load_tokenizer(structure.checkpoint.path)("warm")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start, size = peak(), time.perf_counter(), 0
if what == "read":
    size = sum(len(row["text"]) for row in file_rows(path))
elif what == "datasets":
    kind, more = ("json", {}) if path.suffix == ".jsonl" else ("text", {"sample_by": "line"})
    for row in datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True, **more):
        size += len(row["text"])
elif what == "pack":
    size = int(load_corpus("x", path, structure=structure).num_tokens)
print(json.dumps([time.perf_counter() - start, size, peak() - before]))
"""


def make_file(path: Path, size: int) -> None:
    """Write documents over and over until there are so many bytes."""
    names = ("encyclopedia.jsonl", "web.jsonl")
    lines = [line for name in names for line in (ASSETS / "corpora" / name).read_text().split("\n") if line]
    rows = lines if path.suffix == ".jsonl" else [json.loads(line)["text"] for line in lines]
    block = ("\n".join(rows) + "\n").encode()
    with path.open("wb") as file:
        for _ in range(max(1, round(size / len(block)))):
            file.write(block)


def measured(what: str, path: Path) -> tuple[float, int, int]:
    """Seconds, size and peak of memory of one process."""
    made = subprocess.run([sys.executable, "-c", WORK, what, path], check=True, capture_output=True, text=True)
    seconds, size, peak = json.loads(made.stdout.strip().split("\n")[-1])
    return seconds, size, peak


def row(path: Path, rounds: int) -> str:
    """The figures of one file as a row of the table."""
    found = {what: [measured(what, path) for _ in range(rounds)] for what in ("read", "datasets", "pack")}
    seconds = {what: statistics.median(one[0] for one in rows) for what, rows in found.items()}
    peak = {what: max(one[2] for one in rows) / MEGABYTE for what, rows in found.items()}
    size = path.stat().st_size / MEGABYTE
    return (
        f"| {path.suffix} | {size:.0f} | {size / seconds['read']:.0f} | {size / seconds['datasets']:.0f} "
        f"| {seconds['datasets'] / seconds['read']:.2f} | {peak['read']:.0f} | {peak['datasets']:.0f} "
        f"| {seconds['pack']:.1f} | {peak['pack']:.0f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000], help="of the files, in MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    heading = ("file", "MB", "read, MB/s", "datasets, MB/s", "ratio", "read, MB of memory", "datasets", "pack, s", "MB")
    print(f"| {' | '.join(heading)} |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for suffix in (".jsonl", ".txt"):
            for size in args.sizes:
                path = Path(folder) / f"text-{size}{suffix}"
                make_file(path, size * MEGABYTE)
                print(row(path, args.rounds), flush=True)
                path.unlink()


if __name__ == "__main__":
    main()
