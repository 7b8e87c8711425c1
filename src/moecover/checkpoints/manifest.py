"""The manifest of a pruned checkpoint, moecover.json: its name, how it is read, whether the files are still as it says."""

from __future__ import annotations

import json
from typing import Any

from moecover.checkpoints.source import Checkpoint
from moecover.errors import InputError
from moecover.files.copying import HASH, file_hash

MANIFEST = "moecover.json"


def read_manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    """The moecover.json of a checkpoint that this program wrote.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = checkpoint.path / MANIFEST
    if not path.is_file():
        raise InputError(f"{checkpoint.name} holds no {MANIFEST}: it was not written by `moecover prune`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["plan"], manifest["files"], manifest["source"]["name"], manifest["source"]["fingerprint"]
        if manifest["hash"] != HASH:
            raise ValueError(f"its hashes are {manifest['hash']}, {HASH} is known")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error!r}. Prune again") from error
    return manifest  # type: ignore[no-any-return]


def changed_files(checkpoint: Checkpoint, manifest: dict[str, Any]) -> list[str]:
    """Names of the files whose hash is not the manifest's, or that are missing."""
    files = {name: checkpoint.path / name for name in manifest["files"]}
    return [name for name, path in files.items() if not path.is_file() or file_hash(path) != manifest["files"][name]]
