"""Weights of one part of a model at a time: reads tensors from the files into parameters that are on ``meta``.

Names and conversions are those of transformers. Tensors that it only renames or stacks are read straight into place;
everything else goes through its converter.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.header import TensorEntry
from moecover.checkpoints.names import read_names
from moecover.checkpoints.structure import Structure
from moecover.runtime.devices import has_own_memory
from moecover.runtime.shards import TORCH_NAMES, Files, LazyTensor

if TYPE_CHECKING:
    import torch

Index = tuple[int | slice, ...]
Place = tuple[TensorEntry, Index]  # a stored tensor, and which part of a parameter it fills


class Weights:
    """Loads and frees parts of a model on ``meta``; a part is everything whose name has the same prefix.

    Args:
        structure: the checkpoint.
        model: its model without weights, see `streaming.skeleton`.
        prefixes: name prefixes of the parts, without the dot; everything else is the part ``""``.
        device: where loaded parts are.
        ahead: read the next part in a thread, into memory of its own; without it, as on a CPU, the system is asked to
            read it into its cache.
    """

    def __init__(
        self, structure: Structure, model: torch.nn.Module, prefixes: Iterable[str], device: str, *, ahead: bool
    ) -> None:
        self._model, self._device, self._ahead = model, device, ahead
        self._coming: tuple[str, threading.Thread, dict[str, torch.Tensor | Exception]] | None = None
        self._entries, self._files = structure.checkpoint.tensors, Files(structure.checkpoint.path)
        self._state = {k: v.to("meta") for k, v in model.state_dict().items()}
        self._names = read_names(structure.checkpoint, model)
        # Looked up once: while experts are recorded, a tap may take the place of one of their modules.
        self._owners = {k: (model.get_submodule(k.rpartition(".")[0]), k.rpartition(".")[2]) for k in self._state}
        self._spare: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
        self._dtypes = [(re.compile(glob.replace("*", ".*")), dtype) for glob, dtype in _dtype_plan(model).items()]
        names = tuple(f"{prefix}." for prefix in prefixes)
        self._parts: dict[str, list[str]] = {name: [] for name in (*names, "")}
        pattern = re.compile("|".join(map(re.escape, names)))
        for key, destination in self._names.destinations.items():
            if destination.parameter in self._state:
                match = pattern.match(destination.parameter)
                self._parts[match[0] if match else ""].append(key)

    def will_need(self, prefix: str) -> None:
        """Start to read the next part."""
        if not self._ahead:
            self._files.will_need(self._entries[key] for key in self._parts[prefix])
            return
        read: dict[str, torch.Tensor | Exception] = {}

        def work() -> None:
            for parameter, places in self._plan(prefix)[0].items():
                try:
                    read[parameter] = self._read(parameter, places)
                except Exception as error:  # raised when the part is loaded
                    read[parameter] = error
                    return

        thread = threading.Thread(target=work, name="next layer", daemon=True)
        thread.start()
        self._coming = prefix, thread, read

    def _taken(self, prefix: str) -> dict[str, torch.Tensor | Exception]:
        """What was read ahead of a part, by parameter."""
        if self._coming is None:
            return {}
        (coming, thread, read), self._coming = self._coming, None
        thread.join()
        return read if coming == prefix else {}

    def missing(self) -> list[str]:
        """Names of parameters that nothing in the files fills."""
        found = {d.parameter for d in self._names.destinations.values()}
        if any(d.fills_several for d in self._names.destinations.values()):
            return []  # only the converter knows which ones these fill
        tied = getattr(self._model, "all_tied_weights_keys", {})
        return sorted(self._state.keys() - found - set(tied) - set(tied.values()))

    def load(self, prefix: str) -> None:
        """Load a part.

        Raises:
            MoecoverError: a file cannot be read.
        """
        direct, others = self._plan(prefix)
        read = self._taken(prefix)
        for parameter, places in direct.items():
            found = read.pop(parameter, None)
            if isinstance(found, Exception):
                raise found
            self._put(parameter, self._read(parameter, places) if found is None else found)
        if others:
            self._convert(others)

    def _plan(self, prefix: str) -> tuple[dict[str, list[Place]], list[str]]:
        """Parameters of a part that are read straight into place, by name; names of all other stored tensors."""
        sources: dict[str, list[str]] = {}
        for key in self._parts[prefix]:
            sources.setdefault(self._names.destinations[key].parameter, []).append(key)
        direct, others = dict[str, list[Place]](), list[str]()
        for parameter, keys in sources.items():
            places = self._places(parameter, keys)
            if places is None:
                others += keys
            else:
                direct[parameter] = places
        return direct, others

    def _places(self, parameter: str, keys: list[str]) -> list[Place] | None:
        """Which part of a parameter every tensor fills; None where the converter is needed."""
        shape, entries = tuple(self._state[parameter].shape), [self._entries[key] for key in keys]
        first = self._names.destinations[keys[0]]
        if first.converter is None:
            return [(entries[0], ())] if len(keys) == 1 and entries[0].shape == shape else None
        done = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in first.converter.operations]
        parts = list(first.converter.source_patterns)
        stacked = done in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
        if not stacked or first.fills_several or len(keys) != len(parts) * shape[0] or len(shape) < 2:
            return None
        width, counts, places = shape[1] // len(parts), [0] * len(parts), list[Place]()
        for key, entry in zip(keys, entries, strict=True):
            part = parts.index(str(self._names.destinations[key].pattern))
            if entry.shape != (width, *shape[2:]):
                return None
            places.append((entry, (counts[part], slice(part * width, (part + 1) * width))))
            counts[part] += 1
        return places if set(counts) == {shape[0]} else None

    def _read(self, parameter: str, places: list[Place]) -> torch.Tensor:
        """A parameter in memory."""
        import torch

        empty = self._state[parameter]
        dtype = next((d for pattern, d in self._dtypes if pattern.search(parameter)), empty.dtype)
        spare = self._spare.get((empty.shape, dtype))
        pinned = self._ahead and has_own_memory(self._device)  # which is filled from it at its full speed
        whole = spare.pop() if spare else torch.empty(empty.shape, dtype=dtype, pin_memory=pinned)
        for entry, index in places:
            place = whole[index] if index else whole
            if TORCH_NAMES.get(entry.dtype) == str(dtype).removeprefix("torch.") and place.is_contiguous():
                self._files.read_into(entry, place)
            else:
                place.copy_(self._files.read(entry))
        return whole

    def _put(self, parameter: str, whole: torch.Tensor) -> None:
        value = whole.to(self._device)
        if value is not whole:  # copied to another device
            self._spare.setdefault((whole.shape, whole.dtype), []).append(whole)
        self._set(parameter, value)

    def _set(self, parameter: str, value: torch.Tensor) -> None:
        import torch

        owner, leaf = self._owners[parameter]
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)

    def _convert(self, keys: list[str]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        model: Any = self._model
        config = LoadStateDictConfig(
            device_map={"": self._device},
            dtype=model.dtype,
            weight_mapping=self._names.transforms,
            dtype_plan=_dtype_plan(model),
        )
        lazy = {key: LazyTensor(self._files, self._entries[key]) for key in keys}
        convert_and_load_state_dict_in_model(model, lazy, config)

    def free(self, prefix: str, *, again: bool = False) -> None:
        """Free a part, if there is one with this prefix.

        Args:
            prefix: of the part, with its dot.
            again: keep the memory for the next part with the same shapes (new memory costs as much as reading into it).
        """
        if prefix not in self._parts:
            return
        if not again:
            self._spare.clear()
        for parameter, empty in self._state.items():
            if not parameter.startswith(prefix):
                continue
            owner, leaf = self._owners[parameter]
            value = owner._parameters.get(leaf, owner._buffers.get(leaf))
            if again and value is not None and value.device.type == "cpu":
                self._spare.setdefault((value.shape, value.dtype), []).append(value.detach())
            self._set(parameter, empty)
        return_freed()

    def close(self) -> None:
        """Close the files."""
        self._taken("")
        self._files.close()


def _dtype_plan(model: Any) -> dict[str, torch.dtype]:
    """Parameters that transformers keeps in another dtype than the model's, by name pattern."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(model.dtype)
    return plan


def limit_caches() -> None:
    """Make libraries cache less memory, as far as their caches are still empty; the user's own settings are kept.

    One arena for all threads (glibc), so that memory freed by one is reused by the next; and on a CPU half of the usual
    number of cached oneDNN primitives, of which there is one for every number of tokens that an expert receives.
    """
    os.environ.setdefault("LRU_CACHE_CAPACITY", "512")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-8, 1)  # M_ARENA_MAX


def return_freed() -> None:
    """Return freed memory to the system, where the allocator can (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
