"""A GGUF model that runs in llama.cpp: reads the file, memory-mapped, and sequences of token ids; gives logits.

Numbers are as exact as llama.cpp has them: the cache of keys and values is float32 and flash attention is off, since
either rounds to float16; weights are multiplied as they are stored, not repacked into memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.errors import InputError, MoecoverError
from moecover.llama.layouts import F32, MMAP, NO_FLASH_ATTENTION
from moecover.llama.library import Library

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK = 512  # tokens that are computed together
Watch = Callable[[Any, bool], bool]  # a tensor, whether it is asked for; whether it is wanted, or to go on


class Model:
    """A model whose weights are mapped; `opened` gives one.

    Args:
        library: from `library.load`.
        path: its first file.
        pointer: llama.cpp's.
    """

    def __init__(self, library: Library, path: Path, pointer: Any) -> None:
        self.library, self.path, self.pointer = library, path, pointer
        self.vocabulary = library.lib.llama_model_get_vocab(pointer)
        self.vocabulary_size = int(library.lib.llama_vocab_n_tokens(self.vocabulary))

    @contextlib.contextmanager
    def session(self, length: int, *, threads: int, watch: Watch | None = None) -> Iterator[Session]:
        """Run sequences of at most ``length`` tokens until the block ends.

        Args:
            length: tokens.
            threads: of the CPU.
            watch: called for every tensor of the graph, twice for those that it wants: see `Watch`. An error that it
                raises ends the run.

        Raises:
            InputError: there is not enough memory, or the architecture does not run in this way.
        """
        ffi, lib = self.library.ffi, self.library.lib
        params, raised = lib.llama_context_default_params(), list[BaseException]()
        params.n_ctx = length
        params.n_batch = params.n_ubatch = min(length, CHUNK)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = F32
        params.flash_attn_type = NO_FLASH_ATTENTION
        callback = _callback(ffi, watch, raised) if watch is not None else None
        if callback is not None:
            params.cb_eval = ffi.cast("void *", callback)
        self.library.forget()
        context = lib.llama_init_from_model(self.pointer, params)
        if context == ffi.NULL:
            reason = self.library.reason("there may not be enough memory")
            raise InputError(f"llama.cpp {self.library.version} cannot run {self.path}: {reason}")
        batch = lib.llama_batch_init(params.n_batch, 0, 1)
        try:
            yield Session(self, context, batch, int(params.n_batch), raised)
        finally:
            lib.llama_batch_free(batch)
            lib.llama_free(context)


def _callback(ffi: Any, watch: Watch, raised: list[BaseException]) -> Any:
    """The watch as C calls it; after an error, the graph ends at the next tensor."""

    def call(tensor: Any, ask: bool, _: object) -> bool:
        return bool(ask) if raised else watch(tensor, ask)

    def failed(kind: object, error: BaseException, trace: object) -> None:
        raised.append(error)

    return ffi.callback("bool(struct ggml_tensor *, bool, void *)", call, error=False, onerror=failed)


class Session:
    """Runs sequences through a model, see `Model.session`."""

    def __init__(self, model: Model, context: Any, batch: Any, chunk: int, raised: list[BaseException]) -> None:
        self._model, self._context, self._batch, self._chunk, self._raised = model, context, batch, chunk, raised

    def run(self, tokens: NDArray[np.integer[Any]]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Run a sequence from its beginning, in chunks.

        Args:
            tokens: ids ``[position]``.

        Yields:
            Position of the first token of the chunk, and the logits of its tokens, float32 ``[token, vocabulary]``, in
            llama.cpp's own memory: valid until the next chunk.

        Raises:
            InputError: an id that the vocabulary does not have.
            MoecoverError: llama.cpp gives up.
        """
        library = self._model.library
        lib, ffi, batch, size = library.lib, library.ffi, self._batch, self._model.vocabulary_size
        if tokens.min() < 0 or tokens.max() >= size:
            raise InputError(f"{self._model.path}: token id {tokens.max()}, the vocabulary ends at {size - 1}")
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        for start in range(0, len(tokens), self._chunk):
            part = tokens[start : start + self._chunk]
            batch.n_tokens = len(part)
            for place, token in enumerate(part.tolist()):
                batch.token[place], batch.pos[place] = token, start + place
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
                batch.logits[place] = 1  # for every token: otherwise the last layer runs for the others no more
            library.forget()
            code = lib.llama_decode(self._context, batch)
            if self._raised:
                raise self._raised[0]
            if code != 0:
                reason = library.reason(f"llama_decode returned {code}")
                raise MoecoverError(f"llama.cpp {library.version} stopped while running {self._model.path}: {reason}")
            memory = ffi.buffer(lib.llama_get_logits(self._context), 4 * len(part) * size)
            yield start, np.frombuffer(memory, np.float32).reshape(len(part), size)


@contextlib.contextmanager
def opened(path: Path, library: Library, *, vocabulary_only: bool = False, on_cpu: bool = False) -> Iterator[Model]:
    """A model, until the block ends.

    Args:
        path: its first file.
        library: from `library.load`.
        vocabulary_only: do not map the weights.
        on_cpu: leave a GPU alone that the library could use.

    Raises:
        InputError: llama.cpp does not load the file; with its reason.
    """
    lib, ffi = library.lib, library.ffi
    params = lib.llama_model_default_params()
    params.vocab_only, params.load_mode, params.use_extra_bufts = vocabulary_only, MMAP, False
    if hasattr(params, "lazy_mode"):
        params.lazy_mode = 0
    if on_cpu:
        params.n_gpu_layers = 0
    library.forget()
    pointer = lib.llama_model_load_from_file(str(path).encode(), params)
    if pointer == ffi.NULL:
        reason = library.reason("it does not say why")
        raise InputError(f"llama.cpp {library.version} does not load {path}: {reason}")
    try:
        yield Model(library, path, pointer)
    finally:
        lib.llama_model_free(pointer)
