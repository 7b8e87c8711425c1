"""The manifest of a pruned checkpoint, moecover.json: reads it, and checks the files against it."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from moecover.checkpoints.source import Checkpoint
from moecover.errors import InputError
from moecover.files.hashing import HASH, file_hash, unsealed
from moecover.files.reading import read_json

MANIFEST, CARD = "moecover.json", "README.md"
Manifest = dict[str, Any]  # JSON, written by `pruning.writer`


def read_manifest(checkpoint: Checkpoint) -> Manifest:
    """The moecover.json of a checkpoint that this program wrote.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = checkpoint.path / MANIFEST
    if not path.is_file():
        raise InputError(f"{checkpoint.name} holds no {MANIFEST}: it was not written by `moecover prune`")
    return parsed_manifest(path)


def parsed_manifest(path: Path) -> Manifest:
    """The manifest in a file.

    Raises:
        InputError: it is damaged.
    """
    try:
        manifest = unsealed(read_json(path), required=False)  # earlier versions sealed none
        _check(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error!r}. Prune again") from error
    found: Manifest = manifest
    return found


def _check(manifest: Any) -> None:
    """Check the types of everything that is read from a manifest.

    Raises:
        ValueError: a value has another form than `pruning.writer` writes; other errors of Python's too.
    """
    _require(isinstance(manifest, dict), "it is no JSON object")
    _require(manifest["hash"] == HASH, f"its hashes are {manifest['hash']!r}, {HASH} is known")
    source = manifest["source"]
    for name, value in (("plan", manifest["plan"]), ("files", manifest["files"]), ("source", source)):
        _require(isinstance(value, dict), f"{name} is no JSON object")
    for name in ("name", "fingerprint"):
        _require(isinstance(source[name], str), f"{name} of source is no text")
    for name, digest in manifest["files"].items():
        _require(_is_inside(name), f"files names {name!r}, which lies outside the folder")
        _require(
            isinstance(digest, str) and re.fullmatch("[0-9a-f]{32}", digest) is not None,
            f"the hash of {name} is {digest!r}, 32 hexadecimal digits are needed",
        )
    _require(manifest.get("mtp", "drop") in ("drop", "prune"), "mtp is neither drop nor prune")
    _require(isinstance(manifest.get("repair", {}), dict), "repair is no JSON object")
    for layer in manifest.get("experts", []):
        _require(type(layer["decoder_layer"]) is int, "a decoder_layer of experts is no integer")
        rows = layer["old_to_new"].items()
        _require(all(old.isdecimal() and type(new) is int for old, new in rows), "an old_to_new has other ids")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return name != "" and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def check_complete(checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Refuse a manifest without hashes of the files that a loader reads the model from.

    Raises:
        InputError: config.json, the index or a shard has none.
    """
    needed = ["config.json", *filter(None, [checkpoint.index_name]), *checkpoint.shard_metadata]
    if missing := [name for name in needed if name not in manifest["files"]]:
        raise InputError(
            f"{checkpoint.path / MANIFEST} is damaged: it has no hash of {', '.join(missing[:3])}, so that nothing "
            "shows whether the files are those that were written. Prune again"
        )


def changed_files(checkpoint: Checkpoint, manifest: Manifest) -> list[str]:
    """Names of the files that are missing or whose hash differs from the manifest's; the card may have been edited."""
    files = {name: checkpoint.path / name for name in manifest["files"]}
    return [
        name
        for name, path in files.items()
        if not path.is_file() or (name != CARD and file_hash(path) != manifest["files"][name])
    ]
