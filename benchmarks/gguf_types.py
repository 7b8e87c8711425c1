"""What llama-quantize makes of a GGUF file in F32, without an importance matrix: the type of every tensor, as data.

The mixtures that users know by name are llama.cpp's `llama_tensor_get_type` (src/llama-quant.cpp, v0.5.0), for
architectures with experts. Any other name is one block type for all matrices (``llama-quantize --pure``). Numbers are
rounded by ggml itself, in the library that the optional dependency brings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moecover.gguf.header import Header, read_header
from moecover.gguf.types import BY_NAME, TYPE_NUMBERS
from moecover.gguf.writing import head_bytes, padding
from moecover.llama.library import Library, load

UNTOUCHED = ("_norm.weight", "ffn_gate_inp.weight")  # parts of names of matrices that stay F32
LAYER = re.compile(r"blk\.(\d+)\.")
QUANTIZE = """
size_t ggml_quantize_chunk(int type, const float * src, void * dst, int64_t start, int64_t nrows, int64_t n_per_row,
    const float * imatrix);
"""


class Place(NamedTuple):
    """Where a tensor is.

    Attributes:
        layer: its block.
        layers: number of blocks.
        experts: of a layer.
        grouped: query heads for a key head.
    """

    layer: int
    layers: int
    experts: int
    grouped: int


def more_bits(place: Place) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    eighth = place.layers // 8
    return place.layer < eighth or place.layer >= 7 * place.layers // 8 or (place.layer - eighth) % 3 == 2


def always(place: Place) -> bool:
    """Every layer."""
    return True


def eight(place: Place) -> bool:
    """Models of eight experts, which are taken for Mixtral-8x7B."""
    return place.experts == 8


def grouped(place: Place) -> bool:
    """Attention values that four query heads or more share."""
    return place.grouped >= 4


class Rule(NamedTuple):
    """A tensor that a mixture does not store in its own type.

    Attributes:
        mixes: the mixtures.
        parts: of the tensor's name, any of them.
        kind: its block type.
        where: the layers.
    """

    mixes: tuple[str, ...]
    parts: tuple[str, ...]
    kind: str
    where: Callable[[Place], bool]


MIXES = {
    "Q2_K": "Q2_K",
    "Q3_K_M": "Q3_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
    "IQ4_XS": "IQ4_XS",
}
ALL = tuple(MIXES)
VALUES = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")
RULES = (  # the first that fits; those of one layer only (a sixteenth of them, the first two) are written out
    Rule(ALL, VALUES, "Q8_0", eight),
    Rule(ALL, ("attn_k.weight",), "Q8_0", eight),
    Rule(("Q2_K", "Q3_K_M", "Q4_K_M", "IQ4_XS"), ("attn_output.weight",), "Q5_K", eight),
    Rule(("Q2_K",), VALUES, "Q4_K", grouped),
    Rule(("Q2_K",), (*VALUES, "ffn_down", "attn_output.weight"), "Q3_K", always),
    Rule(("Q3_K_M",), VALUES, "Q5_K", lambda place: place.layer < 2),
    Rule(("Q3_K_M",), ("ffn_down",), "Q5_K", lambda place: place.layer < place.layers // 16),
    Rule(("Q3_K_M",), (*VALUES, "ffn_down", "attn_output.weight"), "Q4_K", always),
    Rule(("Q4_K_M", "Q5_K_M"), (*VALUES, "ffn_down"), "Q6_K", more_bits),
    Rule(("IQ4_XS",), VALUES, "Q5_K", grouped),
    Rule(("IQ4_XS",), ("ffn_down",), "Q5_K", lambda place: place.layer < place.layers // 8),
)
# Where a row is no multiple of 256; F16 where it is none of 32.
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}


def kind_of(name: str, shape: tuple[int, ...], wanted: str, header: Header) -> str:
    """The block type in which a tensor is stored.

    Args:
        name: of the tensor.
        shape: slowest axis first.
        wanted: one of `MIXES`, or a block type.
        header: of the file.
    """
    if math.prod(shape[:-1]) == 1 or not name.endswith("weight") or any(part in name for part in UNTOUCHED):
        return "F32"
    kind = MIXES.get(wanted, wanted)
    head = "output.weight" if "output.weight" in header.tensors else "token_embd.weight"
    if wanted in MIXES and name == head:
        kind = "Q6_K" if shape[-1] % BY_NAME[kind].block == 0 else "Q8_0"
    elif found := LAYER.match(name):
        arch = header.text("general.architecture")
        heads, keys = (header.number(f"{arch}.attention.{key}") or 1 for key in ("head_count", "head_count_kv"))
        layers, experts = (header.number(f"{arch}.{key}") or 0 for key in ("block_count", "expert_count"))
        place = Place(int(found[1]), layers, experts, heads // keys)
        fitting = (
            one.kind for one in RULES if wanted in one.mixes and any(p in name for p in one.parts) and one.where(place)
        )
        kind = next(fitting, kind)
    if shape[-1] % BY_NAME[kind].block:
        kind = FALLBACKS.get(kind, kind)
    return kind if shape[-1] % BY_NAME[kind].block == 0 else "F16"


def _rounded(library: Library, values: NDArray[np.float32], kind: str) -> bytes:
    """Rows of numbers in a block type, by ggml."""
    columns = values.shape[-1]
    row = columns // BY_NAME[kind].block * BY_NAME[kind].num_bytes
    data = np.empty(values.size // columns * row, dtype=np.uint8)
    source, target = (library.ffi.from_buffer(f"{c} *", a) for c, a in (("float", values), ("char", data)))
    number = TYPE_NUMBERS[kind]
    written = library.lib.ggml_quantize_chunk(
        number, source, target, 0, values.size // columns, columns, library.ffi.NULL
    )
    assert written == data.size
    return data.tobytes()


def quantise(source: Path, output: Path, wanted: str) -> Path:
    """Write a file of one part, in F32, as a mixture or in a block type."""
    library, header = load(), read_header(source)
    library.ffi.cdef(QUANTIZE, override=True)
    rows, data = [], []
    with source.open("rb") as file:
        for info in header.tensors.values():
            file.seek(info.start)
            values = np.frombuffer(file.read(info.end - info.start), dtype="<f4").reshape(info.shape)
            kind = kind_of(info.name, info.shape, wanted, header)
            raw = values.tobytes() if kind == "F32" else _rounded(library, values, kind)
            rows.append((info.name, kind, info.shape, len(raw)))
            data.append(raw + bytes(padding(len(raw), header.alignment)))
    with output.open("wb") as out:
        out.write(head_bytes(header, rows, numbers={}, added={}))
        out.writelines(data)
    return output
