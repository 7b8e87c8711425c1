"""A GPU that is none: tensors that claim another device, compute on the CPU, and refuse what a GPU's tensors refuse.

Within `pretending` a tensor that is moved to ``cuda`` (or ``mps``) says that it is there. Its operations refuse tensors
of the CPU other than scalars, it has no numpy array, and on ``mps`` no float64. What runs here runs on a GPU as far as
devices go; numbers are those of the CPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

MOVES = {"copy_", "to", "cpu", "cuda", "__getitem__", "__setitem__", "index_put_", "set_"}  # they may meet the CPU
FIRST = "to", "new_tensor"


class OnGpu(torch.Tensor):
    """A tensor that claims to be on the GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mode = _active[-1]
        return mode.__torch_function__(func, types, args, kwargs)


_active: list[Gpu] = []


class Gpu(TorchFunctionMode):
    """Every call of torch's, seen on its way; active in one thread."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.device = torch.device(kind, 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        here = any(isinstance(t, OnGpu) for t in tensors)
        if name == "__get__":
            return self._attribute(func, args[0], here)
        if name == "_has_compatible_shallow_copy_type":  # a parameter that moves becomes a new one
            return False
        if here and name in ("numpy", "__array__"):
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")
        away = [t for t in tensors if not isinstance(t, OnGpu) and t.dim() > 0 and not t.is_meta]
        if here and away and name not in MOVES:
            raise RuntimeError(f"Expected all tensors to be on the same device, found {self.device} and cpu in {name}")
        where, args, kwargs = self._target(name, args, kwargs, here)
        kwargs.pop("pin_memory", None)
        if name == "histc":  # of whole numbers, a GPU alone has it
            args = [args[0].float(), *args[1:]]
        with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction():
            found = func(*args, **kwargs)
            if name in ("to", "cpu", "cuda") and where != here:
                found = found.clone()  # in the memory of another device
        if name == "__set__":
            return found
        return tree_map(self._moved, found) if where else tree_map(_plain, found)

    def _attribute(self, func: Any, tensor: torch.Tensor, here: bool) -> Any:
        """An attribute of a tensor."""
        with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction():
            found = func.__call__(tensor)
        if isinstance(found, torch.device) and here:
            return self.device
        return tree_map(self._moved, found) if here and isinstance(found, torch.Tensor) else found

    def _target(self, name: str, args: Any, kwargs: dict[str, Any], here: bool) -> tuple[bool, Any, dict[str, Any]]:
        """Whether the result is on the GPU, and the arguments without its name."""
        asked = kwargs.get("device")
        positional = list(args)
        if name in FIRST:
            for at, one in enumerate(positional[1:], 1):
                if isinstance(one, OnGpu):
                    asked = self.device
                elif isinstance(one, (str, torch.device)):
                    asked = one
                    positional[at] = torch.device("cpu") if not _is_meta(one) else one
        if name == "cpu":
            return False, args, kwargs
        if asked is None:
            return here, positional, kwargs
        if _is_meta(asked):
            return False, positional, kwargs
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        return torch.device(asked).type == self.device.type, positional, kwargs

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, OnGpu):
            return value
        with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction():
            if value.is_meta:
                return value
            if self.device.type == "mps" and value.dtype == torch.float64:
                raise TypeError(
                    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
                )
            return value.as_subclass(OnGpu)


def _plain(value: Any) -> Any:
    """A tensor on the CPU, of no class of ours."""
    if type(value) is not OnGpu:
        return value
    with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction():
        return value.as_subclass(torch.Tensor)


def _is_meta(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "meta"


@contextlib.contextmanager
def pretending(monkeypatch: pytest.MonkeyPatch, kind: str = "cuda") -> Iterator[str]:
    """Pretend that there is a GPU until the block ends, in all threads; gives its name."""
    work = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with Gpu(kind):
            work(thread)

    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "run", run)
        patched.setattr(torch.cuda, "mem_get_info", lambda device=None: (10**11, 10**11))
        patched.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
        patched.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patched.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        mode = Gpu(kind)
        _active.append(mode)
        try:
            with mode:
                yield f"{kind}:0"
        finally:
            _active.pop()
            torch.__future__.set_overwrite_module_params_on_conversion(before)
