"""The manifest of a pruned checkpoint, moecover.json: reads it, and checks the files against it."""

from __future__ import annotations

from typing import Any

from moecover.checkpoints.source import Checkpoint
from moecover.errors import InputError
from moecover.files.hashing import HASH, file_hash
from moecover.files.reading import read_json

MANIFEST = "moecover.json"
Manifest = dict[str, Any]  # JSON, written by `pruning.writer`


def read_manifest(checkpoint: Checkpoint) -> Manifest:
    """The moecover.json of a checkpoint that this program wrote.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = checkpoint.path / MANIFEST
    if not path.is_file():
        raise InputError(f"{checkpoint.name} holds no {MANIFEST}: it was not written by `moecover prune`")
    try:
        manifest: Manifest = read_json(path)
        manifest["plan"], manifest["files"], manifest["source"]["name"], manifest["source"]["fingerprint"]
        if manifest["hash"] != HASH:
            raise ValueError(f"its hashes are {manifest['hash']}, {HASH} is known")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error!r}. Prune again") from error
    return manifest


def changed_files(checkpoint: Checkpoint, manifest: Manifest) -> list[str]:
    """Names of the files that are missing or whose hash differs from the manifest's."""
    files = {name: checkpoint.path / name for name in manifest["files"]}
    return [name for name, path in files.items() if not path.is_file() or file_hash(path) != manifest["files"][name]]
