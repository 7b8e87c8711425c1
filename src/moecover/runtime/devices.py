"""The devices of this machine: which one is taken, what is free on it, and what it cannot do.

Any device that torch knows can be asked for: CUDA and ROCm (``cuda``), Intel (``xpu``), Apple (``mps``), those of
plugins. What differs between them is here; without float64, sums are kept on the CPU and searches and repairs are
refused.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from typing import TYPE_CHECKING, Any

from moecover.errors import InputError, arg
from moecover.runtime.cgroups import free_in_cgroups
from moecover.runtime.loadable import DTYPES
from moecover.signals import held

if TYPE_CHECKING:
    import torch

AUTOMATIC = ("cuda", "xpu")  # what ``auto`` looks for, in this order


def kind_of(device: str) -> str:
    """The kind of a device: ``cuda:1`` is of kind ``cuda``."""
    return device.partition(":")[0]


def _module(device: str) -> Any:
    """The module of torch for a kind of device, None where there is none."""
    import torch

    return getattr(torch, kind_of(device), None)


def check_device(dtype: str, device: str) -> str:
    """Check a dtype and resolve a device.

    Args:
        dtype: one of `DTYPES`.
        device: a torch device by name; ``auto`` is the first GPU, else the CPU.

    Returns:
        The device by name, never ``auto``.

    Raises:
        InputError: unknown dtype, or a device that this machine does not have.
    """
    with held():
        import torch

    if dtype not in DTYPES:
        raise InputError(f"unknown {arg('dtype', dtype)}. Allowed: {', '.join(DTYPES)}")
    if device == "auto":
        device = next((kind for kind in AUTOMATIC if _module(kind).is_available()), "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ModuleNotFoundError) as error:
        raise InputError(f"{arg('device', device)} is not available: {str(error).splitlines()[0]}") from error
    return device


def has_own_memory(device: str) -> bool:
    """Whether a device has memory of its own, apart from that of the machine."""
    return hasattr(_module(device), "mem_get_info")


def available_memory(device: str) -> int:
    """Bytes that are free on a device now; of the machine's memory, within the limits of its control groups."""
    if has_own_memory(device):
        return int(_module(device).mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    within = free_in_cgroups()
    return free if within is None else min(free, within)


def release(device: str) -> None:
    """Give back what a model that is gone has left in the device's cache, before another one is measured or loaded."""
    if hasattr(_module(device), "empty_cache"):
        gc.collect()  # modules and their hooks refer to each other
        _module(device).empty_cache()


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; tried once for each kind."""
    return device.type == "cpu" or _tried(device.type)


@functools.cache
def _tried(kind: str) -> bool:
    import torch

    try:
        return bool((torch.ones(1, dtype=torch.float64, device=kind) + 1).sum().item() == 2)
    except (TypeError, RuntimeError):
        return False


def check_float64(device: torch.device, what: str) -> None:
    """Refuse work that needs float64 on a device that has none.

    Raises:
        InputError: names the work and the device.
    """
    if not has_float64(device):
        raise InputError(
            f"{what} computes in float64, which {arg('device', device.type)} does not have. Give {arg('device', 'cpu')}"
        )


def kinds_here() -> list[str]:
    """The kinds of devices beside the CPU that this machine has."""
    modules = {kind: _module(kind) for kind in (*AUTOMATIC, "mps")}
    return [kind for kind, module in modules.items() if module is not None and module.is_available()]


def name_of(device: torch.device) -> str:
    """The device by the name of its model, where torch tells that."""
    module = _module(device.type)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else str(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes of its own memory that torch took at most, None where there is none."""
    module = _module(device.type)
    return int(module.max_memory_allocated(device)) if hasattr(module, "max_memory_allocated") else None


def own_generators() -> contextlib.AbstractContextManager[None]:
    """Random numbers, of the CPU and of all GPUs in use, that are the caller's again when the block ends."""
    import torch

    kind = next((kind for kind in AUTOMATIC if _module(kind).is_initialized()), None)
    if kind is None:
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=range(_module(kind).device_count()), device_type=kind)
