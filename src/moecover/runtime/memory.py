"""Opens a model for a pass, in memory where it fits, else layer by layer: reads the machine's free memory and a cost.

What does not fit is refused before the long job starts.
"""

from __future__ import annotations

import contextlib
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, arg
from moecover.runtime.cgroups import free_in_cgroups
from moecover.runtime.cost import Cost, cost, gb, seconds_of
from moecover.runtime.loading import check_device, load_model
from moecover.runtime.running import Running, running
from moecover.runtime.streaming import streamed
from moecover.runtime.weights import limit_caches

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
    """Bytes that are free on a device now, within the limits of the process's control groups."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    within = free_in_cgroups()
    return free if within is None else min(free, within)


def _resident() -> int:
    """Bytes of memory that this process has taken already."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _check_room(name: str, estimate: Cost, scratch: Path | None, *, spills: bool) -> None:
    """Refuse a pass for which memory or the scratch disk is too small; only a CPU's hidden states can lie in files."""
    least = estimate.memory if scratch is not None and spills else estimate.streamed
    if estimate.by_layer and least > estimate.limit:
        enough = math.ceil(least / 1e7) / 100  # in GB, rounded up: what the advice says has to do
        raise InputError(
            f"{name}: one layer at a time still needs {enough:.2f} GB of memory, {estimate.limit / 1e9:.2f} GB may be "
            f"used. Give {arg('memory_limit', f'{enough:.2f}GB')} or more, on a machine that has as much"
        )
    if scratch is None:
        return
    nearest = next(folder for folder in (scratch.absolute(), *scratch.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(nearest).free) < estimate.scratch:
        raise InputError(
            f"{scratch} needs {gb(estimate.scratch)} of scratch disk, {gb(free)} are free. Give fewer"
            f" {arg('sequences')}, or an output on another disk"
        )


@contextlib.contextmanager
def opened(
    structure: Structure,
    *,
    tokens: int,
    batch_tokens: int,
    in_parts: tuple[int, int] = (0, 0),
    unit: int = 0,
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
        tokens: see `cost.cost`.
        batch_tokens: see `cost.cost`.
        in_parts: see `cost.cost`.
        unit: see `cost.cost`.
        dtype: torch dtype by name, ``auto`` for the checkpoint's.
        device: torch device by name, ``auto`` for the first GPU, else the CPU.
        memory_limit: bytes of memory that may be used beside what this process has taken; nine tenths of what is free
            by default.
        head: see `cost.cost`.
        extra: see `cost.cost`.
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
    resident = 0 if device.startswith("cuda") else _resident()
    shape = {"tokens": tokens, "batch_tokens": batch_tokens, "unit": unit, "limit": memory_limit, "extra": extra}
    estimate = cost(structure, in_parts=in_parts, dtype=dtype, head=head, resident=resident, **shape)
    _check_room(structure.checkpoint.name, estimate, scratch, spills=device == "cpu")
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
