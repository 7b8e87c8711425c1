"""A sample of the inputs of the experts: written by the profile, in calibration order, for searches that need it.

``inputs.safetensors`` beside the profile holds, for every corpus, the token ids of its first sequences and, for every
MoE layer, the hidden states of their tokens, in the order of the calibration batches. It is written during the pass,
one batch of one layer at a time, so that it needs no memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.files.atomic import kept_file, new_file

if TYPE_CHECKING:
    import torch

FILE = "inputs.safetensors"
SCHEMA = 1
SAFETENSORS_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Inputs:
    """The sample on disk.

    Attributes:
        path: the file.
        corpora: names of the corpora, in calibration order.
        batch_tokens: by corpus, number of tokens of every calibration batch (padding not counted).
        model_fingerprint: fingerprint of the model that was profiled.
        hashes: by corpus, sha256 of the whole corpus of which the sample is the beginning.
        batch_size: sequences per batch.
    """

    path: Path
    corpora: tuple[str, ...]
    batch_tokens: dict[str, list[int]]
    model_fingerprint: str
    hashes: dict[str, str]
    batch_size: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the sample over all corpora."""
        return sum(sum(tokens) for tokens in self.batch_tokens.values())

    def layer(self, layer: int) -> list[torch.Tensor]:
        """Hidden states of a MoE layer in the model's dtype, one tensor ``[token, hidden]`` per calibration batch."""
        from safetensors import safe_open

        found = []
        with safe_open(self.path, framework="pt") as file:
            for corpus in self.corpora:
                found += list(file.get_tensor(f"{corpus}/{layer}").split(self.batch_tokens[corpus]))
        return found

    def sequences(self) -> list[Corpus]:
        """The token ids of the sample, as one corpus for each of its corpora."""
        from safetensors import safe_open

        with safe_open(self.path, framework="np") as file:
            return [
                Corpus(c, file.get_tensor(f"{c}/tokens"), file.get_tensor(f"{c}/mask").astype(bool), {})
                for c in self.corpora
            ]


def sample_of(corpora: Sequence[Corpus], tokens: int, *, argument: str = "keep_inputs") -> list[Corpus]:
    """The first sequences of every corpus: at most ``tokens`` tokens, divided evenly, with at least one sequence each.

    Args:
        corpora: the whole corpora.
        tokens: number of tokens over all corpora.
        argument: name of the argument that ``tokens`` comes from, for messages.

    Raises:
        InputError: ``tokens`` is less than one sequence of every corpus.
    """
    share, taken = tokens // len(corpora), []
    for corpus in corpora:
        lengths = corpus.mask.sum(1)
        rows = int((np.cumsum(lengths) <= share).sum())
        if rows == 0:
            least = sum(int(c.mask[0].sum()) for c in corpora)
            raise InputError(
                f"{arg(argument, tokens)}: {share} tokens a corpus are less than the first sequence of "
                f"{corpus.name} ({lengths[0]}"
                f" tokens). Give {max(least, int(lengths[0]) * len(corpora))} or more"
            )
        taken.append(Corpus(corpus.name, corpus.tokens[:rows], corpus.mask[:rows], corpus.record))
    return taken


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


def num_bytes(sample: Sequence[Corpus], layers: int, hidden_size: int, itemsize: int) -> int:
    """Bytes of the hidden states of a sample on disk."""
    return sum(corpus.num_tokens for corpus in sample) * layers * hidden_size * itemsize


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
    needed = num_bytes(sample, layers, hidden_size, itemsize)
    nearest = next(p for p in (path.parent.absolute(), *path.parent.absolute().parents) if p.exists())
    if needed > (free := shutil.disk_usage(nearest).free):
        raise InputError(
            f"{arg('keep_inputs')} needs {needed / 1e9:.2f} GB at {path}, {free / 1e9:.2f} GB are free."
            " Keep fewer tokens"
        )
    about = {
        "schema": SCHEMA,
        "corpora": [c.name for c in sample],
        "batch_tokens": {c.name: _batch_tokens(c, batch_size) for c in sample},
        "batch_size": batch_size,
        "model_fingerprint": model_fingerprint,
        "hashes": {c.name: c.record["sha256"] for c in sample},
    }
    layout, starts, ids = _Layout({"moecover": json.dumps(about)}), dict[tuple[str, int], int](), []
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


def _batch_tokens(corpus: Corpus, batch_size: int) -> list[int]:
    """Number of tokens of every batch."""
    return [int(corpus.mask[i : i + batch_size].sum()) for i in range(0, len(corpus.tokens), batch_size)]


class _Layout:
    """The header of a safetensors file whose tensors are written later."""

    def __init__(self, metadata: dict[str, str]) -> None:
        self._entries: dict[str, object] = {"__metadata__": metadata}
        self._end = 0

    def place(self, name: str, dtype: str, shape: Sequence[int], itemsize: int) -> int:
        """Reserve the next bytes for a tensor; returns its start, counted from the end of the header."""
        start, self._end = self._end, self._end + math.prod(shape) * itemsize
        self._entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, self._end]}
        return start

    def header(self) -> bytes:
        """The header with its length in front, padded to a multiple of 8 bytes."""
        text = json.dumps(self._entries).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def open_inputs(folder: Path) -> Inputs | None:
    """The sample in the folder of a profile, None where there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {}).get("moecover", "null"))
        if about["schema"] != SCHEMA:
            raise ValueError(f"schema {about['schema']}, this version reads {SCHEMA}")
        return Inputs(
            path=path,
            corpora=tuple(about["corpora"]),
            batch_tokens=about["batch_tokens"],
            model_fingerprint=about["model_fingerprint"],
            hashes=about["hashes"],
            batch_size=about["batch_size"],
        )
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}. Profile again with {arg('keep_inputs')}") from error
