"""Tiny GGUF files of llama.cpp's architectures with random bytes, written by the `gguf` package from its own tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES
from numpy.typing import NDArray

from moecover.planning.artifact import LayerPlan, Plan

ARCH_OF = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
EXPERTS, HIDDEN, WIDTH, TOP_K = 6, 32, 64, 2
LAYERS = (1, 2)  # block 0 is dense
Shapes = dict[str, tuple[int, ...]]

# What the tables do not say: how tensors with an expert axis end, and their shapes, slowest axis first.
OF_EXPERTS: Shapes = {
    "ffn_gate_exps": (EXPERTS, WIDTH, HIDDEN),
    "ffn_up_exps": (EXPERTS, WIDTH, HIDDEN),
    "ffn_down_exps": (EXPERTS, HIDDEN, WIDTH),
    "ffn_gate_up_exps": (EXPERTS, 2 * WIDTH, HIDDEN),
    "ffn_gate_inp": (EXPERTS, HIDDEN),
    "exp_probs_b": (EXPERTS,),
}
BIASES: Shapes = {
    "ffn_gate_exps.bias": (EXPERTS, WIDTH),
    "ffn_up_exps.bias": (EXPERTS, WIDTH),
    "ffn_down_exps.bias": (EXPERTS, HIDDEN),
    "ffn_gate_inp.bias": (EXPERTS,),
}


def shapes_of(arch: str, *, layers: Sequence[int] = LAYERS) -> Shapes:
    """Every tensor that the tables have for an architecture, in a model whose block 0 is dense."""
    names = [TENSOR_NAMES[tensor] for tensor in MODEL_TENSORS[ARCH_OF[arch]]]
    shapes: Shapes = {}
    for number in (0, *layers):
        for name in (name for name in names if "{bid}" in name):
            kind = name.removeprefix("blk.{bid}.")
            if kind in OF_EXPERTS and number == 0:
                continue
            ending = ".bias" if kind == "exp_probs_b" else ".weight"
            matrix = "ffn" in kind and "norm" not in kind
            default = (40, HIDDEN) if matrix else (HIDDEN,)
            shapes[f"blk.{number}.{kind}{ending}"] = OF_EXPERTS.get(kind, default)
    return {"token_embd.weight": (50, HIDDEN), **shapes, "output_norm.weight": (HIDDEN,)}


def random_blocks(shape: Sequence[int], kind: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random bytes of a tensor of some type, as the package takes quantised ones: rows in bytes."""
    block, size = GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return rng.integers(0, 256, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8)


def write_gguf(
    path: Path,
    arch: str,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    types: Mapping[str, str] | None = None,
    keys: Mapping[str, int] | None = None,
    alignment: int | None = None,
    parts: int = 1,
    strings: Mapping[str, str] | None = None,
    finite: bool = False,
    seed: int = 0,
) -> Path:
    """Write a file, or the parts of a split one; returns the first.

    Args:
        path: the file.
        arch: architecture.
        shapes: of the tensors; None for those of `shapes_of`.
        types: block type of the tensors whose name contains the key; ``F32`` for all others.
        keys: integers of the architecture by key, in place of those of this model or besides them; None leaves out.
        alignment: of the tensor data; None for the default.
        parts: files.
        strings: further keys.
        finite: quantise numbers instead of taking random bytes, which may be no numbers.
        seed: of the bytes.
    """
    rng = np.random.default_rng(seed)
    shapes = shapes_of(arch) if shapes is None else shapes
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=-(-len(shapes) // parts) if parts > 1 else 0)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(3)
    writer.add_embedding_length(HIDDEN)
    for key, value in ({"expert_count": EXPERTS, "expert_used_count": TOP_K} | dict(keys or {})).items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_uint32(f"{arch}.expert_feed_forward_length", WIDTH)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "größe", "専門家", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_string("general.name", "tiny ü")
    for key, text in (strings or {}).items():
        writer.add_string(key, text)
    for name, shape in shapes.items():
        kind = next((kind for part, kind in (types or {}).items() if part in name), "F32")
        raw: NDArray[Any] = random_blocks(shape, kind, rng)
        if kind == "F32" or finite:
            raw = rng.standard_normal(shape, dtype=np.float32)
        if finite:
            raw = gguf.quants.quantize(raw, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05d}.gguf")


def tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape (slowest axis first) and bytes of every tensor, as the package reads them."""
    return {
        t.name: (t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), np.asarray(t.data).tobytes())
        for t in gguf.GGUFReader(path).tensors
    }


def fields_of(path: Path) -> dict[str, Any]:
    """The keys with their values, as the package reads them, without its own entries."""
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def plan_for(kept: Sequence[Sequence[int]], *, layers: Sequence[int] = LAYERS, **options: Any) -> Plan:
    """A plan by hand."""
    rows = [LayerPlan(decoder_layer=n, kept=list(ids)) for n, ids in zip(layers, kept, strict=True)]
    return Plan(schema=1, keep=len(kept[0]), layers=rows, **options)
