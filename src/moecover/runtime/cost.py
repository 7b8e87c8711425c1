"""What a pass over a model costs: reads headers, gives bytes of memory and disk, operations and seconds.

The formulas are explained in docs/scale.md.
"""

from __future__ import annotations

import functools
import math
import re
import time
from dataclasses import dataclass

from moecover.checkpoints.config_edit import SHARED_KEYS, first_number
from moecover.checkpoints.structure import Structure
from moecover.runtime.layerwise import PASSES
from moecover.text import duration_text

OVERHEAD = 900_000_000  # bytes: interpreter, torch, transformers with a model class, and prepared matrix products
PREPARED = 300_000_000  # of these: the matrix products, which are no larger than the model
COPIES = 4  # of the hidden states: before the first layer, now, and twice that in masks and allocators (measured)
THREAD = 100_000  # bytes that a pass takes beside its hidden states (measured)
ITEMSIZE = {"float32": 4, "float64": 8, "F32": 4, "F64": 8}  # of all other dtypes: 2


@dataclass(frozen=True)
class Cost:
    """The cost of a pass.

    Attributes:
        limit: bytes of memory that may be used.
        whole: bytes of memory with the whole model loaded.
        streamed: bytes of memory with one layer loaded at a time.
        hidden: bytes of the hidden states of all passes; ``streamed`` holds them `COPIES` times.
        read: bytes read from disk.
        flops: floating-point operations of the pass.
        layer: bytes of the largest decoder layer.
        by_layer: whether the model runs layer by layer.
        room: tokens whose hidden states fit into the limit, for passes that can run in parts.
    """

    limit: int
    whole: int
    streamed: int
    hidden: int
    read: int
    flops: float
    layer: int
    by_layer: bool
    room: int

    @property
    def spill(self) -> bool:
        """Whether the hidden states have to be kept in files."""
        return self.by_layer and self.streamed > self.limit

    @property
    def memory(self) -> int:
        """Bytes of memory that the pass takes."""
        if not self.by_layer:
            return self.whole
        return self.streamed - COPIES * self.hidden if self.spill else self.streamed

    @property
    def scratch(self) -> int:
        """Bytes of disk for the state that an interrupted pass resumes from, and for hidden states that do not fit."""
        return (3 if self.spill else 2) * self.hidden if self.by_layer else 0

    def line(self, seconds: float) -> str:
        """The estimate in words."""
        way = "layer by layer" if self.by_layer else "in memory"
        why = f" (the whole model needs {gb(self.whole)}, {gb(self.limit)} may be used)" if self.by_layer else ""
        scratch = f", {gb(self.scratch)} of scratch disk" if self.by_layer else ""
        return (
            f"running {way}{why}: about {gb(self.memory)} of memory{scratch}, {gb(self.read)} to read,"
            f" {self.flops / 1e12:,.1f} TFLOP, {duration_text(seconds)}"
        )


def gb(num_bytes: float) -> str:
    """A number of bytes in gigabytes, for a message."""
    return f"{num_bytes / 1e9:.1f} GB"


def itemsizes(structure: Structure, dtype: str) -> tuple[int, int]:
    """Bytes per number in the largest tensor on disk, and in memory for a dtype by name."""
    stored = max(structure.checkpoint.tensors.values(), key=lambda entry: entry.num_bytes).dtype
    on_disk = ITEMSIZE.get(stored, 2)
    return on_disk, on_disk if dtype == "auto" else ITEMSIZE.get(dtype, 2)


def _layer_bytes(structure: Structure) -> tuple[int, int]:
    """Bytes on disk of everything outside the decoder layers, and of the largest layer."""
    num_layers = structure.topology.num_layers
    layers = [0] * (num_layers + 1)
    for name, entry in structure.checkpoint.tensors.items():
        match = re.search(r"\.layers\.(\d+)\.", name)
        number = int(match[1]) if match else num_layers
        layers[min(number, num_layers)] += entry.num_bytes
    return layers.pop(), max(layers)


def _overhead(model_bytes: float, resident: int) -> int:
    """Bytes of libraries that are still to be loaded, and of the matrix products that they prepare for a model."""
    return int(max(0, OVERHEAD - PREPARED - resident) + min(PREPARED, OVERHEAD, model_bytes))


def expert_width(structure: Structure) -> float:
    """Channels of an expert, from its bytes on disk: three matrices between them and the hidden states."""
    return structure.expert_num_bytes / itemsizes(structure, "auto")[0] / (3 * structure.topology.hidden_size)


def cost(
    structure: Structure,
    *,
    tokens: int,
    batch_tokens: int,
    in_parts: tuple[int, int] = (0, 0),
    unit: int = 0,
    dtype: str = "auto",
    limit: int,
    head: bool = False,
    extra: int = 0,
    resident: int = 0,
) -> Cost:
    """Estimate the cost of a pass over text.

    Args:
        structure: the checkpoint; only its headers are needed.
        tokens: tokens of all corpora.
        batch_tokens: tokens of one forward pass.
        in_parts: tokens and number of further forward passes that can run in parts, see `layerwise.run_in_parts`.
        unit: tokens of passes that are never in different parts.
        dtype: torch dtype by name, ``auto`` for the checkpoint's.
        limit: bytes of memory that may be used.
        head: whether the language-model head runs.
        extra: bytes of memory that the caller needs in addition.
        resident: bytes of memory that this process has taken already: libraries that are loaded do not count again.
    """
    topology, checkpoint = structure.topology, structure.checkpoint
    on_disk, itemsize = itemsizes(structure, dtype)
    scale = itemsize / on_disk
    outside, largest = (size * scale for size in _layer_bytes(structure))
    vocabulary = (first_number(checkpoint.config, ("vocab_size",)) or 0) * topology.hidden_size * itemsize
    ends = outside if outside < 2 * vocabulary else max(outside - vocabulary, vocabulary)
    slots = topology.top_k + max(1, first_number(checkpoint.config, SHARED_KEYS) or 0)
    working = (
        batch_tokens
        * (slots * (3 * expert_width(structure) + 2 * topology.hidden_size) + 8 * topology.hidden_size)
        * itemsize
    )
    working += batch_tokens * vocabulary / topology.hidden_size * 2 if head else 0  # logits, and in float32
    overhead = _overhead(checkpoint.num_bytes * scale, resident)
    streamed = overhead + ends + largest + working + extra
    state, apart = topology.hidden_size * itemsize, THREAD * in_parts[1] / max(in_parts[0], 1)  # bytes per token
    room = max(int((limit - streamed) // (COPIES * state + apart)), batch_tokens, unit, 1)
    held = min(in_parts[0], room)
    hidden = max(tokens, held) * state
    streamed += COPIES * hidden + held * apart
    idle = structure.expert_total_bytes * (1 - topology.top_k / topology.num_experts)
    active = (checkpoint.num_bytes - idle) / on_disk - (0 if head else 2) * vocabulary / itemsize
    whole = int(overhead + checkpoint.num_bytes * scale + working) + extra
    reads = (tokens > 0) + math.ceil(max(in_parts[0] / room, in_parts[1] / PASSES)) if whole > limit else 1
    return Cost(
        limit=limit,
        whole=whole,
        streamed=int(streamed),
        hidden=hidden,
        read=max(1, reads) * checkpoint.num_bytes,
        flops=2.0 * (tokens + in_parts[0]) * max(active, 0.0),
        layer=int(largest),
        by_layer=whole > limit,
        room=room,
    )


@functools.cache
def arithmetic_speed(dtype: str, device: str) -> float:
    """Floating-point operations per second of a matrix product, from a short benchmark of this machine.

    A few rows first: processors without instructions for a dtype take a hundred times as long.

    Args:
        dtype: torch dtype by name; ``auto`` stands for bfloat16.
        device: torch device by name.
    """
    import torch

    kind, width = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype), 2048
    b = torch.ones(width, width, dtype=kind, device=device)
    speed = 0.0
    for rows in (16, 1024):
        a = torch.ones(rows, width, dtype=kind, device=device)
        started, rounds = time.perf_counter(), 0
        while rounds < 2 or time.perf_counter() - started < 0.1:
            (a @ b).flatten()[0].item()
            rounds += 1
        speed = rounds * 2 * rows * width * width / (time.perf_counter() - started)
        if rounds == 2:
            break
    return speed


def seconds_of(estimate: Cost, structure: Structure, *, dtype: str, device: str) -> float:
    """Estimate the duration of a pass in seconds, from a short benchmark of this machine's arithmetic and disk."""
    speed = arithmetic_speed(dtype, device)
    entry = max(structure.checkpoint.tensors.values(), key=lambda e: e.num_bytes)
    started, done = time.perf_counter(), 0
    with (structure.checkpoint.path / entry.shard).open("rb", buffering=0) as file:
        file.seek(entry.start)
        while done < entry.num_bytes and time.perf_counter() - started < 0.1:
            done += len(file.read(1 << 22))
    disk = done / max(time.perf_counter() - started, 1e-6)
    return estimate.read / max(disk, 1) + 4 * estimate.flops / speed  # a pass is slower than a plain matrix product
