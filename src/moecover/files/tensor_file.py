"""Files of numpy tensors that the program writes for itself: safetensors, with a hash of every tensor.

The metadata entry ``moecover`` holds a sealed JSON document: what the tensors are, and their hashes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.files.hashing import array_hash, sealed, unsealed
from moecover.files.reading import parse_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KEY = "moecover"
HASHES = "tensors"  # the entry of the document that holds the tensors' hashes


def tensor_bytes(tensors: Mapping[str, NDArray[np.generic]], document: Mapping[str, object]) -> bytes:
    """The content of a file.

    Args:
        tensors: by name.
        document: JSON-ready; may not have an entry `HASHES`.
    """
    import numpy as np
    from safetensors.numpy import save

    stored = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}  # in C order
    hashes = {name: array_hash(tensor) for name, tensor in stored.items()}
    return bytes(save(stored, metadata={KEY: json.dumps(sealed({**document, HASHES: hashes}))}))


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The document and the tensors of a file, compared with their hashes.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not what `tensor_bytes` made, or was changed since.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            document = unsealed(parse_json((file.metadata() or {}).get(KEY, "null"), finite=True))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError) as error:  # the latter for dtypes that numpy does not have
        raise ValueError(str(error)) from error
    hashes = document.pop(HASHES, None)
    if not isinstance(hashes, dict) or hashes.keys() != tensors.keys():
        raise ValueError("its tensors are not those that it names")
    if changed := [name for name, tensor in tensors.items() if array_hash(tensor) != hashes[name]]:
        raise ValueError(f"tensor {changed[0]} was changed since it was written")
    return document, tensors
