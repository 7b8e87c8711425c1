"""Outputs of a model and manifests that agree with changed files, for the tests that compare checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from moecover.files.hashing import file_hash
from tests.conftest import random_corpus


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Logits on a random corpus."""
    with torch.inference_mode():
        return model(torch.from_numpy(random_corpus(seed=11).tokens)).logits


def rehash(folder: Path, name: str) -> None:
    """Make the manifest agree with a changed file, so that only the outputs can tell."""
    manifest = json.loads((folder / "moecover.json").read_text())
    manifest["files"][name] = file_hash(folder / name)
    (folder / "moecover.json").write_text(json.dumps(manifest))
