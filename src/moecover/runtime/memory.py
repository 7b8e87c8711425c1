"""Whether a model fits into memory, and what a pass will cost: reads headers and what the machine has, gives an estimate.

Everything is said before the long job starts. The formulas are in docs/scale.md.
"""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.checkpoints.config_edit import first_number
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError
from moecover.runtime.loading import check_device, load_model
from moecover.runtime.running import Running, running
from moecover.runtime.streaming import PASSES, streamed
from moecover.runtime.weights import lean
from moecover.text import duration_text

if TYPE_CHECKING:
    pass

OVERHEAD = 900_000_000  # bytes: interpreter, torch, transformers with a model class, prepared matrix products
COPIES = 4  # of the hidden states: before the first layer, now, and as much again in masks and what allocators hold (measured)
THREAD = 100_000  # bytes that a pass takes beside its hidden states (measured)
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
ITEMSIZE = {"float32": 4, "float64": 8, "F32": 4, "F64": 8}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``4GB``, ``512MiB`` or ``1000000``.

    Raises:
        InputError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get((match[2] or "B").upper()) if match else None
    if match is None or unit is None:
        raise InputError(f"{text!r} is no size. Give a number and a unit, such as 4GB or 512MiB")
    return int(float(match[1]) * unit)


def available_memory(device: str) -> int:
    """Bytes that a model may take on a device: what is free now, within the limits of the container."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


@dataclass(frozen=True)
class Cost:
    """What a pass takes.

    Attributes:
        limit: bytes of memory that it may take.
        whole: bytes of memory with the whole model in it.
        streamed: bytes of memory with one layer at a time.
        hidden: bytes of the hidden states of all passes, which are in ``streamed`` `COPIES` times.
        read: bytes that are read from disk.
        flops: floating-point operations of the pass.
        by_layer: whether it runs layer by layer.
        room: tokens whose hidden states fit into the limit, for passes that can be made in parts.
    """

    limit: int
    whole: int
    streamed: int
    hidden: int
    read: int
    flops: float
    by_layer: bool
    room: int

    @property
    def spill(self) -> bool:
        """Whether the hidden states have to lie in files."""
        return self.by_layer and self.streamed > self.limit

    @property
    def memory(self) -> int:
        """Bytes of memory that the way that was chosen needs."""
        if not self.by_layer:
            return self.whole
        return self.streamed - COPIES * self.hidden if self.spill else self.streamed

    @property
    def scratch(self) -> int:
        """Bytes of disk for what an interrupted pass goes on from, and for hidden states that do not fit."""
        return (3 if self.spill else 2) * self.hidden if self.by_layer else 0

    def line(self, seconds: float) -> str:
        """The estimate in words."""
        way = "layer by layer" if self.by_layer else "in memory"
        why = f" (the whole model needs {_gb(self.whole)}, {_gb(self.limit)} may be used)" if self.by_layer else ""
        scratch = f", {_gb(self.scratch)} of scratch disk" if self.by_layer else ""
        return f"running {way}{why}: about {_gb(self.memory)} of memory{scratch}, {_gb(self.read)} to read, {self.flops / 1e12:,.1f} TFLOP, {duration_text(seconds)}"  # fmt: skip


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def itemsizes(structure: Structure, dtype: str) -> tuple[int, int]:
    """Bytes of a number in the largest tensor on disk, and in memory with a dtype by name."""
    stored = max(structure.checkpoint.tensors.values(), key=lambda entry: entry.num_bytes).dtype
    on_disk = ITEMSIZE.get(stored, 2)
    return on_disk, on_disk if dtype == "auto" else ITEMSIZE.get(dtype, 2)


def cost(
    structure: Structure, *, tokens: int, batch_tokens: int, in_parts: tuple[int, int] = (0, 0), dtype: str = "auto",
    limit: int, head: bool = False, extra: int = 0,
) -> Cost:  # fmt: skip
    """What a pass over text takes.

    Args:
        structure: the checkpoint; its headers are enough.
        tokens: of all corpora.
        batch_tokens: of one forward pass.
        in_parts: tokens and forward passes beside them that need not be side by side, see `streaming.run_in_parts`.
        dtype: torch dtype by name, ``auto`` for the checkpoint's.
        limit: bytes of memory that may be used.
        head: whether the language-model head runs.
        extra: bytes of memory that the caller takes beside.
    """
    topology, checkpoint = structure.topology, structure.checkpoint
    on_disk, itemsize = itemsizes(structure, dtype)
    scale = itemsize / on_disk
    layers = [0] * (topology.num_layers + 1)
    for name, entry in checkpoint.tensors.items():
        match = re.search(r"\.layers\.(\d+)\.", name)
        inside = match is not None and int(match[1]) < topology.num_layers
        layers[int(match[1]) if match and inside else -1] += entry.num_bytes
    outside, largest = layers.pop() * scale, max(layers) * scale
    vocabulary = (first_number(checkpoint.config, ("vocab_size",)) or 0) * topology.hidden_size * itemsize
    ends = outside if outside < 2 * vocabulary else max(outside - vocabulary, vocabulary)
    width = structure.expert_num_bytes * scale / itemsize / (3 * topology.hidden_size)
    slots = topology.top_k + max(1, first_number(checkpoint.config, ("n_shared_experts", "num_shared_experts")) or 0)
    working = batch_tokens * (slots * (3 * width + 2 * topology.hidden_size) + 8 * topology.hidden_size) * itemsize
    working += batch_tokens * vocabulary / topology.hidden_size * 2 if head else 0  # logits, and in float32
    streamed = OVERHEAD + ends + largest + working + extra
    state, apart = topology.hidden_size * itemsize, THREAD * in_parts[1] / max(in_parts[0], 1)  # bytes a token
    room = max(int((limit - streamed) // (COPIES * state + apart)), batch_tokens, 1)
    held = min(in_parts[0], room)
    hidden = max(tokens, held) * state
    streamed += COPIES * hidden + held * apart
    idle = structure.expert_total_bytes * (1 - topology.top_k / topology.num_experts)
    active = (checkpoint.num_bytes - idle) / on_disk - (0 if head else 2) * vocabulary / itemsize
    whole = int(OVERHEAD + checkpoint.num_bytes * scale + working) + extra
    by_layer = whole > limit
    reads = (tokens > 0) + math.ceil(max(in_parts[0] / room, in_parts[1] / PASSES)) if by_layer else 1
    return Cost(
        limit, whole, int(streamed), hidden, max(1, reads) * checkpoint.num_bytes,
        2.0 * (tokens + in_parts[0]) * max(active, 0.0), by_layer, room,
    )  # fmt: skip


def seconds_of(estimate: Cost, structure: Structure, *, dtype: str, device: str) -> float:
    """How long a pass will take, from a short trial of this machine's arithmetic and disk."""
    import torch

    kind = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16
    a = torch.ones(1024, 2048, dtype=kind, device=device)
    b = torch.ones(2048, 2048, dtype=kind, device=device)
    a @ b
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        (a @ b).flatten()[0].item()
        rounds += 1
    speed = rounds * 2 * 1024 * 2048 * 2048 / (time.perf_counter() - started)
    entry = max(structure.checkpoint.tensors.values(), key=lambda e: e.num_bytes)
    started, done = time.perf_counter(), 0
    with (structure.checkpoint.path / entry.shard).open("rb", buffering=0) as file:
        file.seek(entry.start)
        while done < entry.num_bytes and time.perf_counter() - started < 0.1:
            done += len(file.read(1 << 22))
    disk = done / max(time.perf_counter() - started, 1e-6)
    return estimate.read / max(disk, 1) + 4 * estimate.flops / speed  # a pass reaches less than a plain product


@contextlib.contextmanager
def opened(
    structure: Structure, *, tokens: int, batch_tokens: int, in_parts: tuple[int, int] = (0, 0), dtype: str = "auto",
    device: str = "auto", memory_limit: int | None = None, head: bool = False, extra: int = 0, processes: int = 1,
    scratch: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Running]:  # fmt: skip
    """The model in memory where it fits, else layer by layer; says which, and what it will cost, before it starts.

    Args:
        structure: the checkpoint.
        tokens: of all passes.
        batch_tokens: of one pass.
        in_parts: see `cost`.
        dtype: torch dtype by name, ``auto`` for the checkpoint's.
        device: torch device by name.
        memory_limit: bytes of memory that may be used; default: nine tenths of what is free.
        head: whether the language-model head runs.
        extra: bytes of memory that the caller takes beside.
        processes: that share what is free on this machine.
        scratch: folder for the hidden states, where there is one; its disk is looked at.
        say: takes the line.

    Raises:
        InputError: not even one layer fits, the disk is too full, or what `load_model` and `streamed` raise.
    """
    device = check_device(dtype, device)
    limit = (
        memory_limit
        if memory_limit is not None
        else int(0.9 * available_memory(device) / (1 if device.startswith("cuda") else processes))
    )
    estimate = cost(structure, tokens=tokens, batch_tokens=batch_tokens, in_parts=in_parts, dtype=dtype, limit=limit, head=head, extra=extra)  # fmt: skip
    least = estimate.memory if scratch is not None else estimate.streamed
    if estimate.by_layer and least > limit:
        raise InputError(f"{structure.checkpoint.name}: one layer at a time still needs {_gb(least)} of memory, {_gb(limit)} may be used. Give a smaller --batch-size or --length, or a larger --memory-limit")  # fmt: skip
    if scratch is not None:
        nearest = next(folder for folder in (scratch.absolute(), *scratch.absolute().parents) if folder.exists())
        if (free := shutil.disk_usage(nearest).free) < estimate.scratch:
            raise InputError(f"{scratch} needs {_gb(estimate.scratch)} of scratch disk, {_gb(free)} are free. Give fewer --sequences, or an output on another disk")  # fmt: skip
    if estimate.by_layer:
        lean()
    if estimate.by_layer or estimate.read > 10**9:
        say(estimate.line(seconds_of(estimate, structure, dtype=dtype, device=device)))
    if estimate.by_layer:
        with streamed(structure, dtype=dtype, device=device, spill=estimate.spill, room=estimate.room) as stream:
            yield stream
        return
    say(f"loading {structure.checkpoint.name}")
    yield running(load_model(structure, dtype=dtype, device=device), structure)
