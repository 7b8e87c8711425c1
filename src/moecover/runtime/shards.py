"""The shards of a checkpoint: reads stored tensors straight into memory of the caller's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.header import TensorEntry
from moecover.errors import MoecoverError
from moecover.files.copying import advise

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class Files:
    """The shards of a checkpoint, opened when first read; bytes are copied into the caller's memory, never mapped."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._descriptors = folder, dict[str, int]()

    def _descriptor(self, shard: str) -> int:
        if shard not in self._descriptors:
            self._descriptors[shard] = os.open(self._folder / shard, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[shard]

    def read_into(self, entry: TensorEntry, target: torch.Tensor) -> None:
        """Fill a contiguous tensor on the CPU that has the entry's dtype and size.

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
                    raise MoecoverError(
                        f"{self._folder / entry.shard} ended at byte {at}, {entry.end} is needed: it changed while it"
                        " was read"
                    )
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
        """Ask the system to read tensors ahead."""
        for entry in entries:
            with contextlib.suppress(OSError):
                advise(self._descriptor(entry.shard), entry.start, entry.num_bytes, "WILLNEED")

    def close(self) -> None:
        """Close the shards."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


class LazyTensor:
    """A tensor on disk behind the interface that the converter of transformers expects."""

    def __init__(self, files: Files, entry: TensorEntry) -> None:
        self._files, self._entry = files, entry

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The tensor, or a part of it, read from the file."""
        return self._files.read(self._entry)[index]

    def get_shape(self) -> list[int]:
        """Shape as stored."""
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """Dtype as stored, by its safetensors name."""
        return self._entry.dtype
