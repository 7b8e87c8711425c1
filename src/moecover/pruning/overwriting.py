"""What an overwritten output loses: compares the files in the folder with the manifest that was written with them."""

from __future__ import annotations

import functools
from pathlib import Path

from moecover.checkpoints.manifest import MANIFEST, parsed_manifest
from moecover.errors import InputError
from moecover.files.atomic import explained, stamp
from moecover.files.hashing import file_hash

REMEDY = "Move it away, or choose another output"


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a pruned checkpoint that holds anything that this program did not write.

    Args:
        folder: a folder with a manifest.

    Raises:
        InputError: a file is not in the manifest, or has changed since; the message names it.
        MoecoverError: a file cannot be read.
    """
    hashes = parsed_manifest(folder / MANIFEST)["files"]
    with explained(f"looking at {folder}", left="Nothing was removed"):
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder).as_posix()
            if name == MANIFEST or (file.is_dir() and not file.is_symlink()):
                continue
            if name not in hashes:
                raise InputError(f"{file} was not written by moecover, and overwriting would remove it. {REMEDY}")
            if not file.is_file() or _hash_at(file, *stamp(file)) != hashes[name]:
                raise InputError(f"{file} has changed since moecover wrote it, and overwriting would lose it. {REMEDY}")


@functools.lru_cache(maxsize=1024)
def _hash_at(file: Path, size: int, modified: int) -> str:
    """The hash of a file, computed once while its size and time of change stay the same."""
    return file_hash(file)
