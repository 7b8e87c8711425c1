"""Grids of `moecover compare` on tiny models: texts, tasks, and what a run folder holds."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

from moecover.cli.main import main
from tests.support.tiny import TEXT

WORDS = TEXT.split()


def write_text_file(path: Path, seed: int, words: int = 3000) -> Path:
    """A corpus of random rows of words."""
    rng = random.Random(seed)
    rows = [" ".join(rng.choice(WORDS) for _ in range(60)) for _ in range(words // 60)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def write_arc(folder: Path, seed: int = 0, questions: int = 8) -> Path:
    """Documents in the layout of ``--data-dir``."""
    rng = random.Random(seed)
    (folder / "arc_easy").mkdir(parents=True, exist_ok=True)
    for split in ("validation", "test"):
        rows = [
            {
                "id": str(i),
                "question": " ".join(rng.sample(WORDS, 4)),
                "answerKey": "AB"[rng.randrange(2)],
                "choices": {"text": rng.sample(WORDS, 2), "label": ["A", "B"]},
            }
            for i in range(questions)
        ]
        (folder / "arc_easy" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(path: Path, folder: Path, *more: str) -> int:
    """Exit status of the comparison of a configuration."""
    return main(["compare", str(path), "-o", str(folder), "-q", *more])


def start(path: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """The comparison of a configuration in a process of its own."""
    command = [sys.executable, "-m", "moecover", "compare", str(path), "-o", str(out), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of results.csv."""
    return list(csv.DictReader((folder / "results.csv").read_text().splitlines()))


def written(folder: Path) -> dict[str, int]:
    """Time of change of every cell."""
    return {p.name: (p / "cell.json").stat().st_mtime_ns for p in sorted((folder / "cells").iterdir())}


def finished(folder: Path) -> dict[str, int]:
    """Time of change of every cell, hidden folders left out, which a killed run leaves behind."""
    found = [p for p in (folder / "cells").iterdir() if not p.name.startswith(".")]
    return {p.name: (p / "cell.json").stat().st_mtime_ns for p in found}


def cells_of(out: Path) -> int:
    """How many cells there are."""
    return len(list((out / "cells").glob("[!.]*"))) if (out / "cells").is_dir() else 0
