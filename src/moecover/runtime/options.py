"""Keyword arguments of every job that runs a model; a small module, since jobs that run none name them too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from moecover.errors import InputError, arg


class RunOptions(TypedDict, total=False):
    """Keyword arguments of every job that runs a model.

    Attributes:
        batch_size: sequences per forward pass; each job has its own default.
        dtype: torch dtype by name (``bfloat16``, ``float16``, ``float32``); None or ``auto`` for the checkpoint's.
        device: torch device by name; None or ``auto`` for a GPU where there is one.
        device_map: ``auto``, ``balanced`` or another way of accelerate's to put a model on several devices, a JSON file
            with devices by name of a module, or such a mapping; instead of ``device``. A model that they do not hold is
            refused.
        memory_limit: memory that may be used, in bytes or as text (``"4GB"``); None for nine tenths of what is free. A
            model that does not fit runs layer by layer.
        revision: branch, tag or commit of a hub model.
    """

    batch_size: int | None
    dtype: str | None
    device: str | None
    device_map: str | Path | Mapping[str, str | int] | None
    memory_limit: int | str | None
    revision: str | None


def check_live(model: object, options: Mapping[str, object]) -> None:
    """Refuse keyword arguments on how a model is opened where one is given that is open already.

    Args:
        model: the live model, None where there is none.
        options: as given.

    Raises:
        InputError: names the argument.
    """
    names = ("dtype", "device", "device_map", "memory_limit", "revision")
    if model is not None and (stray := [name for name in names if options.get(name) is not None]):
        raise InputError(f"{arg(stray[0])} says how a model is opened, the one in {arg('model')} is open already")


def check_known(options: Mapping[str, object], kind: type) -> None:
    """Refuse keyword arguments that a job does not take, as Python does for those that are spelled out.

    Args:
        options: as given.
        kind: a TypedDict.

    Raises:
        TypeError: names the argument.
    """
    known = {name for base in (kind, *kind.__mro__) for name in getattr(base, "__annotations__", {})}
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}. Known: {', '.join(sorted(known))}")
