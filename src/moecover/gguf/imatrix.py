"""Importance matrices of llama.cpp: reads an ``imatrix.gguf``, gives counts and sums of squares of the experts' inputs.

For a matrix NAME of the model there are ``NAME.in_sum2``, for every input channel the sum of its squares over tokens,
and ``NAME.counts``, the number of these tokens; of stacked experts each has a row for every expert.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moecover.errors import InputError
from moecover.gguf.header import MAGIC, Header, read_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

DOWN = re.compile(r"blk\.(\d+)\.ffn_down_exps\.weight\.counts")
SQUARES, COUNTS = ".in_sum2", ".counts"
REMEDY = "Make it with llama-imatrix (--output-format gguf)"


@dataclass(frozen=True)
class Imatrix:
    """What an importance matrix holds of routed experts.

    Attributes:
        path: the file.
        count: tokens routed to every expert, int64 ``[expert]``, by block.
        squares: of the inputs of every expert's down projection, the sum over these tokens, float64
            ``[expert, channel]``, by block.
        tokens: of the text; None where no other matrix has been counted.
        chunks: of text that were read, of ``chunk_size`` tokens; 0 where the file does not say.
        chunk_size: tokens of a chunk.
    """

    path: Path
    count: dict[int, NDArray[np.int64]]
    squares: dict[int, NDArray[np.float64]]
    tokens: int | None
    chunks: int
    chunk_size: int


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix.

    Raises:
        InputError: no such file, an older format, no importance matrix, of no routed experts, or damaged.
    """
    if not path.is_file():
        raise InputError(f"no file {path}")
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise InputError(
                f"{path} is no GGUF file. The older importance matrices (.dat) do not tell how many tokens an expert "
                f"was given: {REMEDY}"
            )
    header = read_header(path)
    if header.text("general.type") != "imatrix":
        raise InputError(f"{path} is no importance matrix: general.type is {header.text('general.type')!r}. {REMEDY}")
    blocks = sorted(int(found[1]) for name in header.tensors if (found := DOWN.fullmatch(name)))
    if not blocks:
        raise InputError(f"{path} holds no routed experts (blk.N.ffn_down_exps.weight{COUNTS}): of another model")
    count, squares = dict[int, "NDArray[np.int64]"](), dict[int, "NDArray[np.float64]"]()
    for block in blocks:
        name = f"blk.{block}.ffn_down_exps.weight"
        counts = _numbers(header, name + COUNTS).reshape(-1)
        squares[block] = _numbers(header, name + SQUARES)
        if (
            squares[block].ndim != 2
            or len(squares[block]) != len(counts)
            or counts.shape != count.get(blocks[0], counts).shape
        ):
            raise InputError(
                f"{path}: {name} has {len(counts)} counts and sums of shape {list(squares[block].shape)}, which do not "
                f"fit together. {REMEDY}"
            )
        count[block] = counts.astype(np.int64)
    others = [name for name in header.tensors if name.endswith(COUNTS) and "_exps." not in name]
    tokens = max((int(_numbers(header, name).max()) for name in others), default=None)
    chunks, size = (header.number(f"imatrix.{key}") or 0 for key in ("chunk_count", "chunk_size"))
    return Imatrix(path, count, squares, tokens, chunks, size)


def _numbers(header: Header, name: str) -> NDArray[np.float64]:
    """A tensor of 32-bit numbers.

    Raises:
        InputError: it is missing, has another type, or numbers that are negative or not finite.
    """
    info = header.tensors.get(name)
    if info is None or info.kind.name != "F32":
        what = "is missing" if info is None else f"has the type {info.kind.name}"
        raise InputError(f"{header.path}: {name} {what}. {REMEDY}")
    with header.path.open("rb") as file:
        file.seek(info.start)
        values = np.frombuffer(file.read(info.end - info.start), dtype="<f4").reshape(info.shape).astype(np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise InputError(f"{header.path}: {name} holds numbers that are negative or not finite. {REMEDY}")
    return values
