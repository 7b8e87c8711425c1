"""The training script of the shipped model: runs, is killed, resumes. Slow: `make test-slow`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moecover.checkpoints.inspection import inspect
from moecover.corpora.sources import CORPORA

SCRIPT = Path(__file__).parents[1] / "training" / "train_tiny.py"
SMALL = (
    "--tokens 16384 --batch-size 8 --vocabulary 400 --hidden 32 --layers 1 --expert 8 --shared 16 --save-every 4 "
    "--threads 1"
)


def make_data(folder: Path) -> Path:
    """Write the project's own text in the layout that the script reads."""
    for name in ("wikitext2", "c4", "gutenberg", "gsm8k"):
        (folder / name).mkdir(parents=True)
    articles = list(CORPORA["encyclopedia"].documents(0))
    rows = "".join(json.dumps({"text": d}) + "\n" for d in CORPORA["web"].documents(0))
    for name in ("train.txt", "train_head.raw.txt", "test.txt"):
        (folder / "wikitext2" / name).write_text("".join(f" = {d.splitlines()[0]} = \n{d}" for d in articles))
    for name in ("c4/train_a.jsonl", "c4/validation.jsonl", "gutenberg/train.jsonl"):
        (folder / name).write_text(rows)
    questions = [{"question": d[:200], "answer": d[200:600]} for d in articles] * 20
    (folder / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return folder


def command(data: Path, out: Path, work: Path, *extra: str) -> list[str]:
    """The command line of a small run."""
    files = ["--data", str(data), "-o", str(out), "--work", str(work)]
    return [sys.executable, str(SCRIPT), *files, *SMALL.split(), *extra]


def train(data: Path, out: Path, work: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    """Run the script to its end."""
    return subprocess.run(command(data, out, work, *extra), capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    whole = train(data, tmp_path / "whole", tmp_path / "work")
    assert whole.returncode == 0, whole.stderr
    record = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert record["tokens"] == 16384
    assert inspect(tmp_path / "whole")["experts"] == 60
    # The state after the last step is saved: a second start only evaluates and writes the same weights.
    again = train(data, tmp_path / "again", tmp_path / "work")
    assert again.returncode == 0, again.stderr
    weights = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    # Killed midway, then resumed: the same weights.
    for name in ("options.json", "streams.npz"):
        (tmp_path / "cut").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "work" / name, tmp_path / "cut" / name)
    shutil.copytree(tmp_path / "work" / "tokenizer", tmp_path / "cut" / "tokenizer")
    process = subprocess.Popen(
        command(data, tmp_path / "cut-out", tmp_path / "cut"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 4:"):  # a state was saved
            process.kill()
            break
    process.wait()
    done = train(data, tmp_path / "cut-out", tmp_path / "cut")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cut-out" / "model.safetensors").read_bytes() == weights
    other = train(data, tmp_path / "other", tmp_path / "work", "--balance", "0.1")
    assert other.returncode != 0
    assert "belongs to a run with other options" in other.stderr
