"""How forward passes run on this machine: the arguments that every job with a model takes, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from moecover.errors import InputError, arg
from moecover.runtime.loading import check_device
from moecover.runtime.memory import parse_size


@dataclass(frozen=True)
class Passes:
    """How forward passes run.

    Attributes:
        batch_size: sequences per forward pass.
        dtype: torch dtype by name, ``auto`` for the checkpoint's.
        device: torch device by name, ``auto`` for a GPU where there is one.
        memory_limit: bytes of memory that may be used; None for nine tenths of what is free.
    """

    batch_size: int
    dtype: str = "auto"
    device: str = "auto"
    memory_limit: int | None = None


def passes(
    *,
    batch_size: int | None,
    dtype: str | None = None,
    device: str | None = None,
    memory_limit: int | str | None = None,
    default_batch_size: int = 4,
) -> Passes:
    """The arguments of a job as `Passes`, defaults filled in.

    Raises:
        InputError: a value out of range, an unknown dtype, a size that cannot be read, or a device that is not available.
    """
    check_positive(batch_size=batch_size)
    dtype, device = dtype or "auto", device or "auto"
    check_device(dtype, device)
    limit = parse_size(memory_limit) if isinstance(memory_limit, str) else memory_limit
    return Passes(batch_size or default_batch_size, dtype, device, limit)


def check_positive(**counts: int | None) -> None:
    """Refuse counts below 1; None stands for a default.

    Raises:
        InputError: names the argument.
    """
    check_least(1, **counts)


def check_least(least: int, **counts: int | None) -> None:
    """Refuse counts below a bound; None stands for a default.

    Raises:
        InputError: names the argument.
    """
    for name, value in counts.items():
        if value is not None and value < least:
            raise InputError(f"{arg(name, value)} is out of range: {least} or more")
