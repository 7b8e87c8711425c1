"""Modules that run something else than their own forward until a block ends.

A module may have a forward of its instance already: hooks of accelerate, which carry tensors from device to device, are
such ones. It is given back as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def with_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run ``forward`` instead of a module's own until the block ends."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        give_back(module, own)


def give_back(module: torch.nn.Module, own: Callable[..., Any] | None) -> None:
    """Give a module the forward of its instance that it had, or that of its class where it had none."""
    if own is None:
        vars(module).pop("forward", None)
    else:
        module.forward = own
