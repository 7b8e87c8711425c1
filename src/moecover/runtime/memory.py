"""Whether a model fits into memory and what a pass costs: reads headers and the machine's resources, gives an estimate.

Everything is said before the long job starts. The formulas are explained in docs/scale.md.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moecover.checkpoints.config_edit import first_number
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, arg
from moecover.runtime.layerwise import PASSES
from moecover.runtime.loading import check_device, load_model
from moecover.runtime.running import Running, running
from moecover.runtime.streaming import streamed
from moecover.runtime.weights import limit_caches
from moecover.text import duration_text

OVERHEAD = 900_000_000  # bytes: interpreter, torch, transformers with a model class, cached matrix products
COPIES = 4  # of the hidden states: before the first layer, now, and twice that in masks and allocators (measured)
THREAD = 100_000  # bytes that a pass takes beside its hidden states (measured)
ITEMSIZE = {"float32": 4, "float64": 8, "F32": 4, "F64": 8}  # of all other dtypes: 2
UNITS = {unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))}
UNITS |= {unit: 1024**power for power, unit in enumerate(("KIB", "MIB", "GIB", "TIB"), 1)}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``4GB``, ``512MiB`` or ``1000000``.

    Raises:
        InputError: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get((match[2] or "B").upper()) if match else None
    if match is None or unit is None:
        raise InputError(f"{text!r} is no size. Give a number and a unit, such as 4GB or 512MiB")
    return int(float(match[1]) * unit)


def available_memory(device: str) -> int:
    """Bytes that are free on a device now, within the limits of the container."""
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
    """The cost of a pass.

    Attributes:
        limit: bytes of memory that may be used.
        whole: bytes of memory with the whole model loaded.
        streamed: bytes of memory with one layer loaded at a time.
        hidden: bytes of the hidden states of all passes; ``streamed`` holds them `COPIES` times.
        read: bytes read from disk.
        flops: floating-point operations of the pass.
        by_layer: whether the model runs layer by layer.
        room: tokens whose hidden states fit into the limit, for passes that can run in parts.
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
        why = f" (the whole model needs {_gb(self.whole)}, {_gb(self.limit)} may be used)" if self.by_layer else ""
        scratch = f", {_gb(self.scratch)} of scratch disk" if self.by_layer else ""
        return (
            f"running {way}{why}: about {_gb(self.memory)} of memory{scratch}, {_gb(self.read)} to read,"
            f" {self.flops / 1e12:,.1f} TFLOP, {duration_text(seconds)}"
        )


def _gb(num_bytes: float) -> str:
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


def cost(
    structure: Structure,
    *,
    tokens: int,
    batch_tokens: int,
    in_parts: tuple[int, int] = (0, 0),
    dtype: str = "auto",
    limit: int,
    head: bool = False,
    extra: int = 0,
) -> Cost:
    """Estimate the cost of a pass over text.

    Args:
        structure: the checkpoint; only its headers are needed.
        tokens: tokens of all corpora.
        batch_tokens: tokens of one forward pass.
        in_parts: tokens and number of further forward passes that can run in parts, see `layerwise.run_in_parts`.
        dtype: torch dtype by name, ``auto`` for the checkpoint's.
        limit: bytes of memory that may be used.
        head: whether the language-model head runs.
        extra: bytes of memory that the caller needs in addition.
    """
    topology, checkpoint = structure.topology, structure.checkpoint
    on_disk, itemsize = itemsizes(structure, dtype)
    scale = itemsize / on_disk
    outside, largest = (size * scale for size in _layer_bytes(structure))
    vocabulary = (first_number(checkpoint.config, ("vocab_size",)) or 0) * topology.hidden_size * itemsize
    ends = outside if outside < 2 * vocabulary else max(outside - vocabulary, vocabulary)
    width = structure.expert_num_bytes * scale / itemsize / (3 * topology.hidden_size)
    slots = topology.top_k + max(1, first_number(checkpoint.config, ("n_shared_experts", "num_shared_experts")) or 0)
    working = batch_tokens * (slots * (3 * width + 2 * topology.hidden_size) + 8 * topology.hidden_size) * itemsize
    working += batch_tokens * vocabulary / topology.hidden_size * 2 if head else 0  # logits, and in float32
    streamed = OVERHEAD + ends + largest + working + extra
    state, apart = topology.hidden_size * itemsize, THREAD * in_parts[1] / max(in_parts[0], 1)  # bytes per token
    room = max(int((limit - streamed) // (COPIES * state + apart)), batch_tokens, 1)
    held = min(in_parts[0], room)
    hidden = max(tokens, held) * state
    streamed += COPIES * hidden + held * apart
    idle = structure.expert_total_bytes * (1 - topology.top_k / topology.num_experts)
    active = (checkpoint.num_bytes - idle) / on_disk - (0 if head else 2) * vocabulary / itemsize
    whole = int(OVERHEAD + checkpoint.num_bytes * scale + working) + extra
    reads = (tokens > 0) + math.ceil(max(in_parts[0] / room, in_parts[1] / PASSES)) if whole > limit else 1
    return Cost(
        limit=limit,
        whole=whole,
        streamed=int(streamed),
        hidden=hidden,
        read=max(1, reads) * checkpoint.num_bytes,
        flops=2.0 * (tokens + in_parts[0]) * max(active, 0.0),
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


def _check_room(name: str, estimate: Cost, scratch: Path | None) -> None:
    """Refuse a pass for which memory or the scratch disk is too small."""
    least = estimate.memory if scratch is not None else estimate.streamed
    if estimate.by_layer and least > estimate.limit:
        raise InputError(
            f"{name}: one layer at a time still needs {_gb(least)} of memory, {_gb(estimate.limit)} may be used. Give a"
            f" smaller {arg('batch_size')} or {arg('length')}, or a larger {arg('memory_limit')}"
        )
    if scratch is None:
        return
    nearest = next(folder for folder in (scratch.absolute(), *scratch.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(nearest).free) < estimate.scratch:
        raise InputError(
            f"{scratch} needs {_gb(estimate.scratch)} of scratch disk, {_gb(free)} are free. Give fewer"
            f" {arg('sequences')}, or an output on another disk"
        )


@contextlib.contextmanager
def opened(
    structure: Structure,
    *,
    tokens: int,
    batch_tokens: int,
    in_parts: tuple[int, int] = (0, 0),
    dtype: str = "auto",
    device: str = "auto",
    memory_limit: int | None = None,
    head: bool = False,
    extra: int = 0,
    processes: int = 1,
    scratch: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Running]:
    """Open a model, in memory where it fits, else layer by layer; says which, and the cost, before it starts.

    Args:
        structure: the checkpoint.
        tokens: see `cost`.
        batch_tokens: see `cost`.
        in_parts: see `cost`.
        dtype: torch dtype by name, ``auto`` for the checkpoint's.
        device: torch device by name, ``auto`` for the first GPU, else the CPU.
        memory_limit: bytes of memory that may be used; nine tenths of what is free by default.
        head: see `cost`.
        extra: see `cost`.
        processes: number of processes that share the free memory of this machine.
        scratch: folder for the state of the pass, if there is one; its disk must have room.
        say: receives lines of log.

    Raises:
        InputError: not even one layer fits, the disk is too full, or what `load_model` and `streamed` raise.
    """
    device = check_device(dtype, device)
    if memory_limit is None:
        sharing = 1 if device.startswith("cuda") else processes
        memory_limit = int(0.9 * available_memory(device) / sharing)
    shape = {"tokens": tokens, "batch_tokens": batch_tokens, "limit": memory_limit, "extra": extra}
    estimate = cost(structure, in_parts=in_parts, dtype=dtype, head=head, **shape)
    _check_room(structure.checkpoint.name, estimate, scratch)
    if estimate.by_layer:
        limit_caches()
    if estimate.by_layer or estimate.read > 10**9:
        say(estimate.line(seconds_of(estimate, structure, dtype=dtype, device=device)))
    if estimate.by_layer:
        with streamed(structure, dtype=dtype, device=device, spill=estimate.spill, room=estimate.room) as stream:
            yield stream
        return
    say(f"loading {structure.checkpoint.name}")
    yield running(load_model(structure, dtype=dtype, device=device), structure)
