"""What a profile records of the model and of the pass."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from moecover.checkpoints.stamps import stamps
from moecover.checkpoints.structure import Structure


class ModelRecord(TypedDict):
    """The model of a profile."""

    name: str
    revision: str | None
    fingerprint: str
    files: NotRequired[dict[str, list[int]]]  # stamps of its weight files


def model_record(structure: Structure) -> ModelRecord:
    """What a profile records of its model."""
    checkpoint = structure.checkpoint
    return {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "fingerprint": structure.model_fingerprint,
        "files": stamps(structure),
    }


class Settings(TypedDict, total=False):
    """How a profile was made; empty where that is unknown."""

    batch_size: int
    dtype: str
    device: str
    experts: str
    threads: int
    versions: dict[str, str]


def torch_dtype(settings: Settings) -> str | None:
    """The dtype of a pass, by its name in torch; None where it is unknown, or llama.cpp ran a file as it is stored."""
    dtype = settings.get("dtype")
    return None if dtype is None or dtype.startswith("GGUF") else dtype
