"""A sample of the inputs of the experts: written by the profile, in calibration order, for searches that need it.

``inputs.safetensors`` beside the profile holds, for every corpus, the token ids of its first sequences and, for every
MoE layer, the hidden states of their tokens, in the order of the calibration batches. It is written during the pass,
one batch of one layer at a time, so that it needs no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.files.hashing import hash_of, unsealed
from moecover.files.reading import parse_json

if TYPE_CHECKING:
    import torch

FILE = "inputs.safetensors"
REMAKE = f"Profile again with {arg('keep_inputs')}"
SCHEMA = 2


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
        tensors: by name of a tensor of the file, the hash of its bytes.
    """

    path: Path
    corpora: tuple[str, ...]
    batch_tokens: dict[str, list[int]]
    model_fingerprint: str
    hashes: dict[str, str]
    batch_size: int
    tensors: dict[str, str]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the sample over all corpora."""
        return sum(sum(tokens) for tokens in self.batch_tokens.values())

    def layer(self, layer: int) -> list[torch.Tensor]:
        """Hidden states of a MoE layer in the model's dtype, one tensor ``[token, hidden]`` per calibration batch.

        Raises:
            InputError: they were changed since they were written.
        """
        import torch
        from safetensors import safe_open

        found = []
        with safe_open(self.path, framework="pt") as file:
            for corpus in self.corpora:
                tensor = file.get_tensor(name := f"{corpus}/{layer}")
                self._check(name, memoryview(tensor.view(torch.uint8).numpy()))
                found += list(tensor.split(self.batch_tokens[corpus]))
        return found

    def _check(self, name: str, content: memoryview) -> None:
        """Compare a tensor with its hash.

        Raises:
            InputError: it was changed since it was written.
        """
        if hash_of(content) != self.tensors[name]:
            raise InputError(f"{self.path}: tensor {name} was changed since it was written. {REMAKE}")

    def sequences(self) -> list[Corpus]:
        """The token ids of the sample, as one corpus for each of its corpora.

        Raises:
            InputError: they were changed since they were written.
        """
        from safetensors import safe_open

        found = []
        with safe_open(self.path, framework="np") as file:
            for corpus in self.corpora:
                ids, mask = (file.get_tensor(f"{corpus}/{name}") for name in ("tokens", "mask"))
                for name, array in (("tokens", ids), ("mask", mask)):
                    self._check(f"{corpus}/{name}", memoryview(array.tobytes()))
                found.append(Corpus(corpus, ids, mask.astype(bool), {}))
        return found


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


def num_bytes(sample: Sequence[Corpus], layers: int, hidden_size: int, itemsize: int) -> int:
    """Bytes of the hidden states of a sample on disk."""
    return sum(corpus.num_tokens for corpus in sample) * layers * hidden_size * itemsize


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
            about = unsealed(parse_json((file.metadata() or {}).get("moecover", "null")))
            if about["tensors"].keys() != set(file.keys()):
                raise ValueError("its tensors are not those that it names")
        if about["schema"] != SCHEMA:
            raise ValueError(f"schema {about['schema']}, this version reads {SCHEMA}")
        return Inputs(
            path=path,
            corpora=tuple(about["corpora"]),
            batch_tokens=about["batch_tokens"],
            model_fingerprint=about["model_fingerprint"],
            hashes=about["hashes"],
            batch_size=about["batch_size"],
            tensors=about["tensors"],
        )
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}. {REMAKE}") from error
