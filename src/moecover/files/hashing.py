"""Hashes by which the program knows that what it reads back is what it wrote: of bytes, files, arrays and documents.

A JSON document that the program writes is sealed: one of its entries is the hash of all others.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import xxhash

from moecover.files.atomic import digest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HASH: Final = "xxh3_128"  # of bytes, as manifests call it
SEAL: Final = "sha256"  # the entry of a sealed document
HASH_DIGITS = 32
BUFFER_BYTES = 256 << 10  # fits the second-level cache: the hasher is a fifth faster than with megabytes


def hash_of(content: bytes | memoryview) -> str:
    """The hash of bytes (`HASH`), in hexadecimal."""
    return str(xxhash.xxh3_128_hexdigest(content))


def array_hash(array: NDArray[np.generic]) -> str:
    """The hash of an array: of its type, its shape and its bytes."""
    return hash_of(f"{array.dtype.str} {list(array.shape)} ".encode() + array.tobytes())


def feed(hasher: xxhash.xxh3_128, file: io.FileIO, stop: int = sys.maxsize) -> None:
    """Hash the file from its position to the position ``stop``, or to the end."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    while (left := stop - file.tell()) > 0 and (count := file.readinto(buffer[:left])):
        hasher.update(buffer[:count])


def file_hash(path: Path) -> str:
    """The hash of a file's bytes (`HASH`), in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    hasher = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        feed(hasher, file)
    return hasher.hexdigest()


def sealed(document: Mapping[str, object]) -> dict[str, object]:
    """The document with its hash as one more entry, last."""
    return {**document, SEAL: digest(json.loads(json.dumps(document)))}


def unsealed(document: object, *, required: bool = True) -> dict[str, Any]:
    """The document without its hash, after comparing them.

    Args:
        document: as it was read.
        required: whether a document without a hash is refused; one that people may write by hand is not.

    Raises:
        ValueError: no JSON object, no hash, or not the hash of the rest.
    """
    if not isinstance(document, dict):
        raise ValueError(f"it holds {type(document).__name__}, a JSON object is needed")
    content = {key: value for key, value in document.items() if key != SEAL}
    if SEAL not in document:
        if required:
            raise ValueError(f"it has no `{SEAL}`: an earlier version wrote it, or another program")
        return content
    if document[SEAL] != digest(content):
        raise ValueError(f"its `{SEAL}` is not that of its content: it was changed since it was written")
    return content
