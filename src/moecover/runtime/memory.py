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
from typing import Any

from moecover import rehearsal
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, arg
from moecover.runtime.cost import Cost, cost, gb, itemsizes, seconds_of
from moecover.runtime.devices import available_memory, check_device, has_own_memory, release
from moecover.runtime.distributed import shared_out, wait_for_all
from moecover.runtime.loading import load_model
from moecover.runtime.placement import placed
from moecover.runtime.running import Running, running
from moecover.runtime.streaming import streamed
from moecover.runtime.weights import limit_caches
from moecover.runtime.world import ALONE, World

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


def _check_pinned(name: str, estimate: Cost, device: str, here: World) -> None:
    """Refuse a device whose layers do not fit into the machine's memory on their way: one is read, one is copied."""
    if has_own_memory(device) and 2 * estimate.layer > (free := available_memory("cpu") // here.local_size):
        raise InputError(
            f"{name}: two layers at a time are read into memory of the machine on their way to {device},"
            f" {gb(2 * estimate.layer)}, and {gb(free)} are free. Give {arg('device', 'cpu')}, or free memory"
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
    device_map: str | dict[str, str] | None = None,
    memory_limit: int | None = None,
    head: bool = False,
    extra: int = 0,
    pace: float = 1.0,
    whole: str = "",
    here: World = ALONE,
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
        device_map: see `placement.parsed_map`; the model is in the memory of several devices, or refused.
        memory_limit: bytes of memory that may be used beside what this process has taken, of every device of a map;
            nine tenths of what is free by default.
        head: see `cost.cost`.
        extra: see `cost.cost`.
        pace: seconds of the work over those of a plain pass over as many tokens, for the estimate.
        whole: what to say where the model does not fit into the memory of every process, and has to; empty where it
            may run layer by layer.
        here: this process among those that share the work; those of one machine share its free memory.
        scratch: folder for the state of the pass, if there is one; its disk must have room.
        say: receives lines of log.

    Raises:
        InputError: not even one layer fits, the disk is too full, or what `load_model` and `streamed` raise.
    """
    shape: Any = {"tokens": tokens, "batch_tokens": batch_tokens, "unit": unit, "extra": extra}
    if device_map is not None:
        if here.local_size > 1:
            raise InputError(
                f"{arg('device_map')} gives the devices of a machine to one process, torchrun started {here.local_size}"
                " on it: start one a machine"
            )
        way: Any = {"dtype": dtype, "limit": memory_limit, "head": head, "in_parts": in_parts, "here": here, "say": say}
        with _spread(structure, device_map, shape, **way) as spread:
            yield spread
        return
    device = check_device(dtype, device)
    release(device)
    if memory_limit is None:
        memory_limit = int(0.9 * available_memory(device) / (1 if has_own_memory(device) else here.local_size))
    resident = 0 if has_own_memory(device) else _resident()
    estimate = cost(
        structure, in_parts=in_parts, dtype=dtype, head=head, resident=resident, limit=memory_limit, **shape
    )
    _check_room(structure.checkpoint.name, estimate, scratch, spills=device == "cpu")
    if whole and any(shared_out(here, range(here.size), lambda mine: [estimate.by_layer for _ in mine])):
        raise InputError(whole)
    if rehearsal.on():
        _rehearse(structure, estimate, pace * seconds_of(estimate, structure, dtype=dtype, device=device))
    wait_for_all(here)  # what the others load is not to be measured
    how: Any = {"dtype": dtype, "device": device}
    if estimate.by_layer:
        _check_pinned(structure.checkpoint.name, estimate, device, here)
        limit_caches()
    if estimate.by_layer or estimate.read > 10**9:
        say(estimate.line(pace * seconds_of(estimate, structure, dtype=dtype, device=device)))
    if estimate.by_layer:
        with streamed(structure, **how, spill=estimate.spill, room=estimate.room, world=here) as stream:
            yield stream
        return
    say(f"loading {structure.checkpoint.name}")
    yield running(load_model(structure, **how), structure, here)


def _rehearse(structure: Structure, estimate: Cost, seconds: float) -> None:
    """End a dry run with what the pass reads and takes."""
    way = "layer by layer" if estimate.by_layer else "in memory"
    rehearsal.ahead("read", structure.checkpoint.name, num_bytes=estimate.read)
    rehearsal.ahead("run", f"the model {way}", num_bytes=estimate.memory, seconds=seconds)
    rehearsal.stop()


@contextlib.contextmanager
def _spread(
    structure: Structure,
    device_map: str | dict[str, str],
    shape: Any,
    *,
    dtype: str,
    limit: int | None,
    head: bool,
    in_parts: tuple[int, int],
    here: World,
    say: Callable[[str], None],
) -> Iterator[Running]:
    """A model over several devices; see `opened`."""
    estimate = cost(structure, dtype=dtype, head=head, in_parts=in_parts, limit=UNITS["TB"] ** 2, **shape)
    on_disk, itemsize = itemsizes(structure, dtype)
    working = estimate.whole - structure.checkpoint.num_bytes * itemsize // on_disk
    if rehearsal.on():
        rehearsal.ahead("run", "the model on several devices")
    places = placed(structure, device_map, dtype=dtype, limit=limit, working=working, here=here)
    say(places.line(estimate))
    rehearsal.stop()
    say(f"loading {structure.checkpoint.name}")
    yield running(load_model(structure, dtype=dtype, device_map=places.devices), structure, here)
