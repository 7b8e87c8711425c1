"""How a model runs on this machine: keyword arguments of every job with a model, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from moecover.errors import InputError, arg
from moecover.runtime.devices import check_device
from moecover.runtime.memory import parse_size
from moecover.runtime.options import RunOptions
from moecover.runtime.placement import DeviceMap, parsed_map


@dataclass(frozen=True)
class Passes:
    """How forward passes run.

    Attributes:
        batch_size: sequences per forward pass.
        dtype: torch dtype by name, ``auto`` for the checkpoint's.
        device: torch device by name, ``auto`` for a GPU where there is one.
        device_map: see `placement.parsed_map`; None for one device.
        memory_limit: bytes of memory that may be used; None for nine tenths of what is free.
    """

    batch_size: int
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | dict[str, str] | None = None
    memory_limit: int | None = None


def passes(options: RunOptions, *, batch_size: int = 4) -> Passes:
    """A job's options as `Passes`.

    Args:
        options: as given.
        batch_size: the job's default.

    Raises:
        InputError: a value out of range, an unknown dtype, a size that cannot be parsed, or an unavailable device.
    """
    check_least(1, batch_size=options.get("batch_size"))
    dtype, device = options.get("dtype") or "auto", options.get("device") or "auto"
    check_device(dtype, device)
    limit = options.get("memory_limit")
    return Passes(
        options.get("batch_size") or batch_size,
        dtype,
        device,
        checked_map(options.get("device_map"), options.get("device")),
        parse_size(limit) if isinstance(limit, str) else limit,
    )


def checked_map(asked: DeviceMap | None, device: str | None) -> str | dict[str, str] | None:
    """A device map as `placement.parsed_map` gives it, None where none is asked for.

    Raises:
        InputError: there is a device beside it, or what `parsed_map` raises.
    """
    if asked is None:
        return None
    if device not in (None, "auto"):
        raise InputError(f"{arg('device', device)} and {arg('device_map')} both say where the model runs. Give one")
    return parsed_map(asked)


def check_least(least: int, **counts: int | None) -> None:
    """Refuse counts below a bound; None stands for a default.

    Raises:
        InputError: names the argument.
    """
    for name, value in counts.items():
        if value is not None and value < least:
            raise InputError(f"{arg(name, value)} is out of range: {least} or more")
