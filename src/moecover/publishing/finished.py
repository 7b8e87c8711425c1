"""A finished pruned model on disk: reads its record and looks at its files, gives what a repository of it holds.

Only files that moecover wrote are in it: no lock, no part of a run, nothing that lies beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moecover.checkpoints.manifest import CARD, MANIFEST, changed_files, check_complete, read_manifest
from moecover.checkpoints.source import open_folder
from moecover.checkpoints.weight_files import inside
from moecover.errors import InputError
from moecover.files.hashing import sealed
from moecover.gguf.parts import is_gguf, open_gguf, stem_of
from moecover.pruning.card_names import public_command, short_name, with_repository
from moecover.pruning.gguf_writer import CARD_ENDING, KEPT
from moecover.text import listed


@dataclass(frozen=True)
class Finished:
    """What is uploaded.

    Attributes:
        files: on this machine, by the name in the repository.
        weights: the names among them that no other weights may stand beside; empty for GGUF files, which share one.
        card: the model card, with a placeholder for the repository.
        texts: further files by name, made for the repository.
    """

    files: dict[str, Path]
    weights: frozenset[str]
    card: str
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())

    def contents(self, repository: str) -> dict[str, Path | bytes]:
        """Every file by its name in a repository, the card with that repository's id."""
        texts = {**self.texts, CARD: with_repository(self.card, repository)}
        return {**self.files, **{name: text.encode() for name, text in texts.items()}}


def finished(path: Path) -> Finished:
    """A folder or GGUF file that `prune` or `shrink` finished.

    Args:
        path: the folder; of a GGUF model the file, of a split one its first part.

    Raises:
        InputError: it is not there, moecover did not finish writing it, or a file of a folder changed since then.
    """
    if is_gguf(path):
        return _gguf(path)
    if not (path / MANIFEST).is_file():
        what = f"holds no {MANIFEST}: moecover did not write it, or did not finish" if path.is_dir() else "is no folder"
        raise InputError(f"{path} {what}. Give a folder or a .gguf file that `moecover prune` or `shrink` finished")
    checkpoint = open_folder(path, name=str(path))
    manifest = read_manifest(checkpoint)
    check_complete(checkpoint, manifest)
    files = {name: path / name for name in manifest["files"]}
    changed = changed_files(checkpoint, manifest)
    changed += [name for name, file in files.items() if name not in changed and not inside(path, file)]
    if changed:
        raise InputError(
            f"{path} is not what moecover wrote: {listed(changed[:3])} changed or went. Prune again, or upload it with "
            "`hf upload`"
        )
    card = _read(files.pop(CARD, path / CARD))
    weights = frozenset({*checkpoint.shard_metadata, *filter(None, [checkpoint.index_name])})
    return Finished(files, weights, card, {MANIFEST: _public(manifest)})


def _gguf(path: Path) -> Finished:
    """A GGUF model: its files, and the card beside them as the repository's."""
    parts = open_gguf(path).parts
    if KEPT not in parts[0].fields:
        raise InputError(f"{path} has no {KEPT}: it was not written by `moecover prune`. Upload it with `hf upload`")
    card = path.with_name(stem_of(path) + CARD_ENDING)
    if not card.is_file():
        raise InputError(f"{card}, the model card of {path}, is missing: it is written last. Prune again")
    return Finished({part.path.name: part.path for part in parts}, frozenset(), _read(card))


def _read(card: Path) -> str:
    try:
        return card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{card} could not be read: {error}") from error


def _public(manifest: Mapping[str, Any]) -> str:
    """The record of a checkpoint without paths of this machine; whoever downloads it can verify all the same."""
    source = manifest["source"]
    model = str(source["name"]) if source.get("revision") else ""
    found = {**manifest, "command": public_command(str(manifest.get("command", "")), model)}
    for key in ("source", "original"):
        if isinstance(one := manifest.get(key), dict) and not one.get("revision"):
            found[key] = {**one, "name": short_name(str(one.get("name", "")))}
    if isinstance(name := manifest["plan"].get("model"), str) and name != model:
        found["plan"] = {**manifest["plan"], "model": short_name(name)}
    return json.dumps(sealed(found), indent=1) + "\n"
