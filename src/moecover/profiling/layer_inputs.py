"""A sample of what enters the experts: written by the profile, in calibration order, for searches that need it.

``inputs.safetensors`` beside the profile holds, for every corpus, the token ids of its first sequences and, for every
MoE layer, the hidden states of their tokens, in the calibration batches. It is written while the pass runs, one batch of
one layer at a time, so that it takes no memory.
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
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.corpora.packing import Corpus
from moecover.errors import InputError
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
        corpora: names, in calibration order.
        batch_tokens: by corpus, tokens of every calibration batch (padding not counted).
        model_fingerprint: of the model that ran.
        hashes: by corpus, sha256 of the whole corpus that the sample is the beginning of.
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
        """Tokens of the sample over all corpora."""
        return sum(sum(tokens) for tokens in self.batch_tokens.values())

    def layer(self, layer: int) -> list[torch.Tensor]:
        """Hidden states of a MoE layer, one tensor ``[token, hidden]`` a calibration batch, in the model's dtype."""
        from safetensors import safe_open

        found = []
        with safe_open(self.path, framework="pt") as file:
            for corpus in self.corpora:
                found += list(file.get_tensor(f"{corpus}/{layer}").split(self.batch_tokens[corpus]))
        return found

    def sequences(self) -> list[Corpus]:
        """The token ids of the sample, one corpus each."""
        from safetensors import safe_open

        with safe_open(self.path, framework="np") as file:
            return [
                Corpus(c, file.get_tensor(f"{c}/tokens"), file.get_tensor(f"{c}/mask").astype(bool), {})
                for c in self.corpora
            ]


def sample_of(corpora: Sequence[Corpus], tokens: int, *, flag: str = "--keep-inputs") -> list[Corpus]:
    """The first sequences of every corpus: together at most ``tokens``, shared evenly, each at least one sequence.

    Args:
        corpora: the whole ones.
        tokens: see above.
        flag: what the user calls it.

    Raises:
        InputError: fewer tokens than one sequence of every corpus.
    """
    share, taken = tokens // len(corpora), []
    for corpus in corpora:
        lengths = corpus.mask.sum(1)
        rows = int((np.cumsum(lengths) <= share).sum())
        if rows == 0:
            least = sum(int(c.mask[0].sum()) for c in corpora)
            raise InputError(f"{flag} {tokens}: {share} tokens a corpus are less than the first sequence of {corpus.name} ({lengths[0]} tokens). Give {max(least, int(lengths[0]) * len(corpora))} or more")  # fmt: skip
        taken.append(Corpus(corpus.name, corpus.tokens[:rows], corpus.mask[:rows], corpus.record))
    return taken


class Writer:
    """Writes the sample during the pass; see `writing`."""

    def __init__(self, descriptor: int, starts: dict[tuple[str, int], int], rows: dict[str, int]) -> None:
        self._descriptor, self._starts, self._rows = descriptor, starts, rows

    def rows(self, corpus: str) -> int:
        """Sequences of a corpus that belong to the sample."""
        return self._rows[corpus]

    def add(self, corpus: str, layer: int, first: int, hidden: torch.Tensor) -> None:
        """Write hidden states ``[token, hidden]`` of a MoE layer, the corpus's from token ``first`` on."""
        import torch

        data = hidden.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        os.pwrite(self._descriptor, data, self._starts[corpus, layer] + first * (len(data) // len(hidden)))


def num_bytes(sample: Sequence[Corpus], layers: int, hidden_size: int, itemsize: int) -> int:
    """Bytes that the hidden states of a sample take on disk."""
    return sum(corpus.num_tokens for corpus in sample) * layers * hidden_size * itemsize


@contextlib.contextmanager
def writing(
    path: Path, sample: Sequence[Corpus], *, layers: int, hidden_size: int, dtype: str, batch_size: int,
    model_fingerprint: str, draft: Path | None = None,
) -> Iterator[Writer]:  # fmt: skip
    """A writer for the sample; the file takes its name only when the block ends without an error.

    With ``draft``, the file is made there, and stays there for the next run when the block fails.

    Raises:
        InputError: not enough disk.
    """
    itemsize = 4 if dtype == "float32" else 2
    needed = num_bytes(sample, layers, hidden_size, itemsize)
    nearest = next(p for p in (path.parent.absolute(), *path.parent.absolute().parents) if p.exists())
    if needed > (free := shutil.disk_usage(nearest).free):
        raise InputError(f"--keep-inputs needs {needed / 1e9:.2f} GB at {path}, {free / 1e9:.2f} GB are free. Keep fewer tokens")  # fmt: skip
    batch_tokens = {
        c.name: [int(c.mask[i : i + batch_size].sum()) for i in range(0, len(c.tokens), batch_size)] for c in sample
    }
    about = {
        "schema": SCHEMA, "corpora": [c.name for c in sample], "batch_tokens": batch_tokens, "batch_size": batch_size,
        "model_fingerprint": model_fingerprint, "hashes": {c.name: c.record["sha256"] for c in sample},
    }  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {"moecover": json.dumps(about)}}
    at, starts, small = 0, {}, []

    def place(name: str, kind: str, shape: list[int], size: int) -> int:
        nonlocal at
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
        return at - size

    for corpus in sample:
        for name, array in (("tokens", corpus.tokens.astype("<i8")), ("mask", corpus.mask.astype("<i8"))):
            small.append((place(f"{corpus.name}/{name}", "I64", list(array.shape), array.nbytes), array.tobytes()))
        for layer in range(layers):
            shape = [corpus.num_tokens, hidden_size]
            starts[corpus.name, layer] = place(
                f"{corpus.name}/{layer}", SAFETENSORS_TYPES[dtype], shape, math.prod(shape) * itemsize
            )
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    with new_file(path) if draft is None else kept_file(path, draft) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        for start, content in small:
            os.pwrite(file.fileno(), content, first + start)
        writer = Writer(
            file.fileno(), {k: first + s for k, s in starts.items()}, {c.name: len(c.tokens) for c in sample}
        )
        yield writer


def open_inputs(folder: Path) -> Inputs | None:
    """The sample in a profile's folder, None where there is none.

    Raises:
        InputError: it is damaged.
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
            path, tuple(about["corpora"]), about["batch_tokens"], about["model_fingerprint"], about["hashes"],
            about["batch_size"],
        )  # fmt: skip
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}. Make the profile anew with --keep-inputs") from error
