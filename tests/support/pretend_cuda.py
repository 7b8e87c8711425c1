"""GPUs that are none: tensors that claim another device, compute on the CPU, and refuse what a GPU's tensors refuse.

Within `pretending` a tensor that is moved to ``cuda:0``, ``cuda:1`` (or ``mps``) says that it is there. Its operations
refuse tensors of another GPU and those of the CPU other than scalars, it has no numpy array, and on ``mps`` no float64.
What runs here runs on GPUs as far as devices go; numbers are those of the CPU.
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

FIRST_MOVES = "to", "cpu", "cuda"
BETWEEN = {"copy_", *FIRST_MOVES}  # tensors of two GPUs may meet in these
MOVES = BETWEEN | {"__getitem__", "__setitem__", "index_put_", "set_"}  # and tensors of a GPU those of the CPU in these
FIRST = "to", "new_tensor"


ANSWERS = {
    "mem_get_info": (10**11, 10**11),
    "memory_allocated": 0,
    "memory_reserved": 0,
    "max_memory_allocated": 0,
    "empty_cache": None,
    "synchronize": None,
    "get_device_capability": (9, 0),
    "get_device_name": "none",
    "device_count": 2,
    "current_device": 0,
    "get_rng_state": None,
    "set_rng_state": None,
}


class OnGpu(torch.Tensor):
    """A tensor that claims to be on a GPU, its ``place``."""

    place: torch.device
    scalar: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mode = _active[-1]
        return mode.__torch_function__(func, types, args, kwargs)


_active: list[Gpu] = []


class Gpu(TorchFunctionMode):
    """Every call of torch's, seen on its way; active in one thread."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        places = {t.place: t.scalar for t in tensors if isinstance(t, OnGpu)}
        here = min(places, key=places.__getitem__, default=None)  # a scalar's place matters least
        if name == "__get__":
            return self._attribute(func, args[0])
        if name == "_has_compatible_shallow_copy_type":  # a parameter that moves becomes a new one
            return False
        if here and name in ("numpy", "__array__"):
            raise TypeError(f"can't convert {here} device type tensor to numpy. Use Tensor.cpu() first.")
        away = [t for t in tensors if not isinstance(t, OnGpu) and t.dim() > 0 and not t.is_meta]
        others = [*(["cpu"] if away else []), *map(str, places)]
        if here and len(others) > 1 and (name not in MOVES or (len(places) > 1 and name not in BETWEEN)):
            raise RuntimeError(f"Expected all tensors to be on the same device, found {', '.join(others)} in {name}")
        where, args, kwargs = self._target(name, args, kwargs, here)
        kwargs.pop("pin_memory", None)
        if name == "histc":  # of whole numbers, a GPU alone has it
            args = [args[0].float(), *args[1:]]
        with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction():
            found = func(*args, **kwargs)
            if name in FIRST_MOVES and where != here:
                found = found.clone()  # in the memory of another device
        if name == "__set__":
            return found
        return tree_map(_plain, found) if where is None else tree_map(lambda value: self._moved(value, where), found)

    def _attribute(self, func: Any, tensor: torch.Tensor) -> Any:
        """An attribute of a tensor."""
        with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction():
            found = func.__call__(tensor)
        if not isinstance(tensor, OnGpu):
            return found
        if isinstance(found, torch.device):
            return tensor.place
        return self._moved(found, tensor.place)

    def _target(
        self, name: str, args: Any, kwargs: dict[str, Any], here: torch.device | None
    ) -> tuple[torch.device | None, Any, dict[str, Any]]:
        """The GPU that the result is on, None for the CPU, and the arguments without its name."""
        asked = kwargs.get("device")
        positional = list(args)
        if name in FIRST:
            for at, one in enumerate(positional[1:], 1):
                if isinstance(one, OnGpu):
                    asked = one.place
                elif isinstance(one, (str, torch.device)):
                    asked = one
                    positional[at] = torch.device("cpu") if not _is_meta(one) else one
        if name == "copy_":
            return getattr(args[0], "place", None), args, kwargs
        if name == "cpu":
            return None, args, kwargs
        if asked is None:
            return here, positional, kwargs
        if _is_meta(asked):
            return None, positional, kwargs
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        asked = torch.device(asked)
        return torch.device(self.kind, asked.index or 0) if asked.type == self.kind else None, positional, kwargs

    def _moved(self, value: Any, place: torch.device) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, OnGpu):
            if isinstance(value, OnGpu) and value.place != place:
                raise RuntimeError(f"a tensor on {value.place} came out of work on {place}")
            return value
        with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction():
            if value.is_meta:
                return value
            if place.type == "mps" and value.dtype == torch.float64:
                raise TypeError(
                    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
                )
            moved = value.as_subclass(OnGpu)
            moved.place, moved.scalar = place, value.dim() == 0
            return moved


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
    """Pretend that there are GPUs until the block ends, in all threads; gives the name of the first."""
    work = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with Gpu(kind):
            work(thread)

    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "run", run)
        for name, answer in ANSWERS.items():
            patched.setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
        patched.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        mode = Gpu(kind)
        _active.append(mode)
        try:
            with mode:
                yield f"{kind}:0"
        finally:
            _active.pop()
            torch.__future__.set_overwrite_module_params_on_conversion(before)
