"""Weights of one module at a time: reads tensors from the files into a model whose parameters have no memory yet.

The names and conversions are the library's own. What it only renames or stacks is read straight to its place; anything
else goes through its converter.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.header import TensorEntry
from moecover.checkpoints.names import read_names
from moecover.checkpoints.structure import Structure
from moecover.errors import MoecoverError

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip


Place = tuple[TensorEntry, tuple[Any, ...]]  # a stored tensor, and where in a parameter it goes


class Files:
    """The shards of a checkpoint, opened when first read; bytes go into memory of the reader's, never a mapping."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._descriptors = folder, dict[str, int]()

    def _descriptor(self, shard: str) -> int:
        if shard not in self._descriptors:
            self._descriptors[shard] = os.open(self._folder / shard, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[shard]

    def read_into(self, entry: TensorEntry, target: torch.Tensor) -> None:
        """Fill a contiguous tensor on the CPU, of the entry's type and size.

        Raises:
            MoecoverError: the file ends early or cannot be read.
        """
        import torch

        view = memoryview(target.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        at = entry.start
        try:
            while view:
                got = os.preadv(self._descriptor(entry.shard), [view[: 1 << 30]], at)
                if not got:
                    raise MoecoverError(f"{self._folder / entry.shard} ended at byte {at}, {entry.end} is needed: it changed while it was read")  # fmt: skip
                view, at = view[got:], at + got
        except OSError as error:
            raise MoecoverError(
                f"{self._folder / entry.shard} cannot be read at byte {at}: {error.strerror}"
            ) from error

    def read(self, entry: TensorEntry) -> torch.Tensor:
        """A tensor as it is stored."""
        import torch

        tensor = torch.empty(entry.shape, dtype=getattr(torch, TORCH_NAMES[entry.dtype]))
        self.read_into(entry, tensor)
        return tensor

    def will_need(self, entries: Iterable[TensorEntry]) -> None:
        """Have the system read ahead what comes next."""
        for entry in entries:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._descriptor(entry.shard), entry.start, entry.num_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the shards."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


class _Lazy:
    """A tensor on disk in the form in which the library's converter asks for it."""

    def __init__(self, files: Files, entry: TensorEntry) -> None:
        self._files, self._entry = files, entry

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._files.read(self._entry)[index]

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        return self._entry.dtype


class Weights:
    """Fills and empties parts of a model on ``meta``; a part is everything whose name begins in one way.

    Args:
        structure: the checkpoint.
        model: of its class, see `streaming.skeleton`.
        prefixes: of the names of the parts; everything else is the part ``""``.
        device: where filled parts lie.
        ahead: read the part that comes next in a thread, into memory beside the filled one's; without it, as on a CPU, the
            system is asked to read it into its cache.
    """

    def __init__(
        self, structure: Structure, model: torch.nn.Module, prefixes: Iterable[str], device: str, *, ahead: bool
    ) -> None:
        self._model, self._device, self._ahead = model, device, ahead
        self._coming: tuple[str, threading.Thread, dict[str, torch.Tensor | Exception]] | None = None
        self._entries, self._files = structure.checkpoint.tensors, Files(structure.checkpoint.path)
        self._state = {k: v.to("meta") for k, v in model.state_dict().items()}
        self._names = read_names(structure.checkpoint, model)
        # Found once: a tap of the recording may stand where a module of the experts is.
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

    def num_bytes(self, prefix: str) -> int:
        """Bytes that a part takes on disk."""
        return sum(self._entries[key].num_bytes for key in self._parts[prefix])

    def will_need(self, prefix: str) -> None:
        """Begin to read a part that comes next."""
        if not self._ahead:
            self._files.will_need(self._entries[key] for key in self._parts[prefix])
            return
        read: dict[str, torch.Tensor | Exception] = {}

        def work() -> None:
            for parameter, places in self._plan(prefix)[0].items():
                try:
                    read[parameter] = self._read(parameter, places)
                except Exception as error:  # raised when its turn has come
                    read[parameter] = error
                    return

        thread = threading.Thread(target=work, name="next layer", daemon=True)
        thread.start()
        self._coming = prefix, thread, read

    def _taken(self, prefix: str) -> dict[str, torch.Tensor | Exception]:
        """What was read ahead of a part."""
        if self._coming is None:
            return {}
        (coming, thread, read), self._coming = self._coming, None
        thread.join()
        return read if coming == prefix else {}

    def missing(self) -> list[str]:
        """Parameters that nothing in the files fills."""
        found = {d.parameter for d in self._names.destinations.values()}
        if any(d.fills_several for d in self._names.destinations.values()):
            return []  # which ones these fill, the library's converter knows
        tied = getattr(self._model, "all_tied_weights_keys", {})
        return sorted(self._state.keys() - found - set(tied) - set(tied.values()))

    def load(self, prefix: str) -> None:
        """Fill a part.

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
        """Parameters of a part that are read straight to their place, with what goes where; names of all other tensors."""
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
        """Where in a parameter every tensor goes, when nothing else has to be done to it; else None."""
        shape, entries = tuple(self._state[parameter].shape), [self._entries[key] for key in keys]
        first = self._names.destinations[keys[0]]
        if first.converter is None:
            return [(entries[0], ())] if len(keys) == 1 and entries[0].shape == shape else None
        done = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in first.converter.operations]
        parts = list(first.converter.source_patterns)
        stacked = done in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
        if not stacked or first.fills_several or len(keys) != len(parts) * shape[0] or len(shape) < 2:
            return None
        width, counts, places = shape[1] // len(parts), [0] * len(parts), []
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
        pinned = self._ahead and self._device.startswith("cuda")  # a GPU fetches from it at its full speed
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
            device_map={"": self._device}, dtype=model.dtype, weight_mapping=self._names.transforms,
            dtype_plan=_dtype_plan(model),
        )  # fmt: skip
        lazy = {key: _Lazy(self._files, self._entries[key]) for key in keys}
        convert_and_load_state_dict_in_model(model, lazy, config)

    def free(self, prefix: str, *, again: bool = False) -> None:
        """Empty a part, if there is one of this name.

        Args:
            prefix: of the part.
            again: keep its memory for the next part of the same shapes (new memory costs as much as reading into it).
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
        give_back()

    def close(self) -> None:
        """Close the files."""
        self._taken("")
        self._files.close()


def _dtype_plan(model: Any) -> dict[str, torch.dtype]:
    """Parameters that the library keeps in another type than the model's, by pattern."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(model.dtype)
    return plan


def lean() -> None:
    """Have libraries keep less memory for later, as far as they have not begun to; the user's own settings stay.

    One arena for all threads (glibc), so that what one of them frees, the next one uses; and on a CPU half of the usual
    number of prepared matrix products, of which there is one for every number of tokens that an expert happens to get.
    """
    os.environ.setdefault("LRU_CACHE_CAPACITY", "512")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-8, 1)  # M_ARENA_MAX


def give_back() -> None:
    """Have the allocator hand freed memory back to the system, where it can (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
