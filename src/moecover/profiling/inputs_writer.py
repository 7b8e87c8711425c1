"""Writes a sample of the inputs of the experts during a pass: inputs.safetensors, see `layer_inputs`.

The header is written first, with zeros for the tensors' hashes, the tensors in whatever order the pass gives them, and
at the end the header again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import xxhash

from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.files.atomic import kept_file, new_file
from moecover.files.hashing import HASH_DIGITS, feed, sealed
from moecover.profiling.layer_inputs import SCHEMA, num_bytes

if TYPE_CHECKING:
    import torch

SAFETENSORS_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class _Entry(TypedDict):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class Writer:
    """Writes the sample during the pass; see `writing`."""

    def __init__(self, descriptor: int, starts: dict[tuple[str, int], int], rows: dict[str, int]) -> None:
        self._descriptor, self._starts, self._rows = descriptor, starts, rows

    def rows(self, corpus: str) -> int:
        """Number of sequences of a corpus that belong to the sample."""
        return self._rows[corpus]

    def add(self, corpus: str, layer: int, first: int, hidden: torch.Tensor) -> None:
        """Write hidden states ``[token, hidden]`` of a MoE layer.

        Args:
            corpus: name of the corpus.
            layer: index of the MoE layer.
            first: index of the first token within the corpus.
            hidden: the hidden states.
        """
        import torch

        data = hidden.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        os.pwrite(self._descriptor, data, self._starts[corpus, layer] + first * (len(data) // len(hidden)))


@contextlib.contextmanager
def writing(
    path: Path,
    sample: Sequence[Corpus],
    *,
    layers: int,
    hidden_size: int,
    dtype: str,
    batch_size: int,
    model_fingerprint: str,
    draft: Path | None = None,
) -> Iterator[Writer]:
    """Write the sample during a pass; the file gets its name only when the block ends without an error.

    Args:
        path: the file.
        sample: from `sample_of`.
        layers: number of MoE layers.
        hidden_size: width of the hidden states.
        dtype: torch dtype of the hidden states, by name.
        batch_size: sequences per calibration batch.
        model_fingerprint: fingerprint of the model.
        draft: where the file is written, and kept for the next run if the block fails; a temporary file by default.

    Raises:
        InputError: there is not enough disk space.
    """
    itemsize = 4 if dtype == "float32" else 2
    _check_disk(path, num_bytes(sample, layers, hidden_size, itemsize))
    about = {
        "schema": SCHEMA,
        "corpora": [c.name for c in sample],
        "batch_tokens": {c.name: _batch_tokens(c, batch_size) for c in sample},
        "batch_size": batch_size,
        "model_fingerprint": model_fingerprint,
        "hashes": {c.name: c.record["sha256"] for c in sample},
    }
    layout, starts, ids = _Layout(about), dict[tuple[str, int], int](), []
    for corpus in sample:
        for name, array in (("tokens", corpus.tokens.astype("<i8")), ("mask", corpus.mask.astype("<i8"))):
            ids.append((layout.place(f"{corpus.name}/{name}", "I64", array.shape, 8), array.tobytes()))
        for layer in range(layers):
            shape = (corpus.num_tokens, hidden_size)
            starts[corpus.name, layer] = layout.place(
                f"{corpus.name}/{layer}", SAFETENSORS_TYPES[dtype], shape, itemsize
            )
    header = layout.header()
    with new_file(path) if draft is None else kept_file(path, draft) as file:
        file.write(header)
        file.flush()
        for start, content in ids:
            os.pwrite(file.fileno(), content, len(header) + start)
        rows = {corpus.name: len(corpus.tokens) for corpus in sample}
        yield Writer(file.fileno(), {key: len(header) + start for key, start in starts.items()}, rows)
        os.pwrite(file.fileno(), layout.header(file.name), 0)


def _check_disk(path: Path, needed: int) -> None:
    """Refuse a file for which there is not enough disk space."""
    nearest = next(p for p in (path.parent.absolute(), *path.parent.absolute().parents) if p.exists())
    if needed > (free := shutil.disk_usage(nearest).free):
        raise InputError(
            f"{arg('keep_inputs')} needs {needed / 1e9:.2f} GB at {path}, {free / 1e9:.2f} GB are free."
            " Keep fewer tokens"
        )


def _batch_tokens(corpus: Corpus, batch_size: int) -> list[int]:
    """Number of tokens of every batch."""
    return [int(corpus.mask[i : i + batch_size].sum()) for i in range(0, len(corpus.tokens), batch_size)]


class _Layout:
    """The header of a safetensors file whose tensors are written later.

    Args:
        about: the document of its metadata; the hashes of the tensors are added.
    """

    def __init__(self, about: dict[str, object]) -> None:
        self._about = about
        self._entries: dict[str, _Entry] = {}
        self._end = 0

    def place(self, name: str, dtype: str, shape: Sequence[int], itemsize: int) -> int:
        """Reserve the next bytes for a tensor; returns its start, counted from the end of the header."""
        start, self._end = self._end, self._end + math.prod(shape) * itemsize
        self._entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": (start, self._end)}
        return start

    def header(self, path: str | None = None) -> bytes:
        """The header with its length in front, padded to a multiple of 8 bytes.

        Args:
            path: the file once its tensors are written, for their hashes; before, zeros take their place.
        """
        hashes = dict.fromkeys(self._entries, "0" * HASH_DIGITS)
        if path is not None:
            with Path(path).open("rb", buffering=0) as file:
                begin = 8 + int.from_bytes(file.read(8), "little")
                for name, entry in self._entries.items():
                    start, end = entry["data_offsets"]
                    file.seek(begin + start)
                    feed(hasher := xxhash.xxh3_128(), file, begin + end)
                    hashes[name] = hasher.hexdigest()
        document = json.dumps(sealed({**self._about, "tensors": hashes}))
        text = json.dumps({"__metadata__": {"moecover": document}, **self._entries}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text
