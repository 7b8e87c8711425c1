"""Outputs of a model and manifests that agree with changed files, for the tests that compare checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moecover.files.hashing import file_hash, unsealed
from tests.conftest import random_corpus


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Logits on a random corpus."""
    with torch.inference_mode():
        return model(torch.from_numpy(random_corpus(seed=11).tokens)).logits


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a pruned checkpoint, without its seal, which would tell."""
    path = folder / "moecover.json"
    manifest = unsealed(json.loads(path.read_text()), required=False)
    change(manifest)
    path.write_text(json.dumps(manifest))


def rehash(folder: Path, name: str) -> None:
    """Make the manifest agree with a changed file, so that only the outputs can tell."""
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: file_hash(folder / name)}))
