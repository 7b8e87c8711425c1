"""Tensors of a graph that llama.cpp computes: reads and writes their numbers, as numpy arrays, on a CPU in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.errors import MoecoverError
from moecover.gguf.types import BLOCK_TYPES
from moecover.llama.layouts import F16, F32, I32
from moecover.llama.library import Library

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUMBERS = {F32: np.float32, F16: np.float16, I32: np.int32}  # by number of the type


class Tensors:
    """Access to tensors of a graph, within the callback that shows them.

    Args:
        library: from `library.load`.
    """

    def __init__(self, library: Library) -> None:
        self._ffi, self._lib, self._checked = library.ffi, library.lib, False

    def name(self, tensor: Any) -> bytes:
        """The name of a tensor, such as ``ffn_moe_down-3``.

        Raises:
            MoecoverError: the struct is not laid out as declared.
        """
        if not self._checked:
            if self._ffi.cast("char *", self._lib.ggml_get_name(tensor)) != self._ffi.cast("char *", tensor.name):
                raise MoecoverError("llama.cpp lays out its tensors in another way than is known: please report this")
            self._checked = True
        name: bytes = self._ffi.string(tensor.name)
        return name

    def _on_host(self, tensor: Any) -> bool:
        owner = tensor if tensor.view_src == self._ffi.NULL else tensor.view_src
        return owner.buffer == self._ffi.NULL or bool(self._lib.ggml_backend_buffer_is_host(owner.buffer))

    def array(self, tensor: Any) -> NDArray[Any]:
        """The numbers of a tensor, slowest axis first, without leading axes of 1; on a CPU its own memory.

        Raises:
            MoecoverError: numbers of another type than float32, float16 and int32.
        """
        if tensor.type not in NUMBERS:
            raise MoecoverError(f"llama.cpp shows {self.name(tensor)!r} as type {tensor.type}: please report this")
        size = self._lib.ggml_nbytes(tensor)
        if self._on_host(tensor):
            memory = self._ffi.buffer(tensor.data, size)
        else:
            memory = bytearray(size)
            self._lib.ggml_backend_tensor_get(tensor, self._ffi.from_buffer(memory), 0, size)
        shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
        skip = next((axis for axis, places in enumerate(shape) if places > 1), 3)
        return np.ndarray(shape[skip:], NUMBERS[tensor.type], memory, strides=strides[skip:])

    def edit(self, tensor: Any, change: Callable[[NDArray[Any]], None]) -> None:
        """Change the numbers of a contiguous tensor before the graph goes on to use them."""
        values = self.array(tensor)
        change(values)
        if not self._on_host(tensor):
            self._lib.ggml_backend_tensor_set(tensor, self._ffi.from_buffer(values), 0, values.nbytes)

    def matrices(self, tensor: Any) -> Iterator[NDArray[np.float32]]:
        """Yield the matrices of a stack of weights one after the other, float32 ``[row, column]``, whatever their type.

        Raises:
            MoecoverError: llama.cpp describes the type in another way than is known.
        """
        kind, (columns, rows, count, _) = BLOCK_TYPES[tensor.type], tuple(tensor.ne)
        traits = self._lib.ggml_get_type_traits(tensor.type)
        if (traits.blck_size, traits.type_size) != (kind.block, kind.num_bytes):
            raise MoecoverError(f"llama.cpp has blocks of another size for {kind.name}: please report this")
        size = columns // kind.block * kind.num_bytes * rows
        held = None if self._on_host(tensor) else bytearray(size)
        for number in range(count):
            if held is None:
                start = self._ffi.cast("char *", tensor.data) + number * tensor.nb[2]
            else:
                start = self._ffi.from_buffer(held)
                self._lib.ggml_backend_tensor_get(tensor, start, number * tensor.nb[2], size)
            if tensor.type == F32:
                yield np.frombuffer(self._ffi.buffer(start, size), np.float32).reshape(rows, columns)
                continue
            values = np.empty((rows, columns), np.float32)
            traits.to_float(start, self._ffi.from_buffer("float[]", values), rows * columns)
            yield values
