"""A GGUF model opened for a job: reads what the user gave, refuses what llama.cpp has no place for, opens the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from moecover import rehearsal
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, arg
from moecover.llama.library import Library, load
from moecover.llama.model import Model, opened
from moecover.llama.vocabulary import GgufTokenizer, tokenizer_of
from moecover.progress import Progress

DEVICES = (None, "auto", "cpu")
TASKS = (
    "tasks are for checkpoints. Those that generate text run on a server: llama-server -m FILE.gguf, then the "
    f"original's folder with {arg('endpoint', 'http://HOST:PORT/v1')}"
)
CHAT_TEMPLATE = "tokenizer.chat_template"


def check_options(options: Mapping[str, object], *more: str) -> None:
    """Refuse arguments that say how transformers runs a model.

    Args:
        options: as given.
        *more: further names that have no use.

    Raises:
        InputError: names the argument.
    """
    for name in ("dtype", "device_map", "memory_limit", "keep_inputs", "model", *more):
        if options.get(name) not in (None, "auto"):
            why = TASKS if name == "tasks" else "llama.cpp runs a GGUF file as it is stored, mapped from the disk"
            raise InputError(f"{arg(name)} has no use here: {why}")
    if (device := options.get("device")) not in DEVICES:
        raise InputError(f"{arg('device', device)}: of a GGUF file auto (a GPU where llama.cpp has one) or cpu")


def check_unused(libllama: str | Path | None) -> None:
    """Refuse a library where no GGUF file is run.

    Raises:
        InputError: there is one.
    """
    if libllama is not None:
        raise InputError(f"{arg('libllama', libllama)} has no use here: llama.cpp runs GGUF files")


@contextlib.contextmanager
def opened_gguf(
    structure: Structure, *, libllama: str | Path | None, device: str | None, progress: Progress
) -> Iterator[tuple[Model, GgufTokenizer | None]]:
    """The model and its tokenizer until the block ends.

    Args:
        structure: the file.
        libllama: the library, see `library.load`.
        device: see `DEVICES`.
        progress: shows the opening.

    Raises:
        InputError: there is no library that is known, or it does not load the file.
    """
    library, files = load(libllama), structure.checkpoint.gguf
    assert files is not None
    rehearsal.ahead("read", structure.checkpoint.name, num_bytes=structure.checkpoint.num_bytes)
    with contextlib.ExitStack() as stack:
        with progress.spinner(f"opening {structure.checkpoint.name} in llama.cpp {library.version}"):
            model = stack.enter_context(opened(files.first.path, library, on_cpu=device == "cpu"))
        yield model, tokenizer_in(structure, model)


@contextlib.contextmanager
def opened_vocabulary(structure: Structure, library: Library) -> Iterator[GgufTokenizer | None]:
    """The tokenizer of a file until the block ends, without its weights; see `tokenizer_in`.

    Raises:
        InputError: llama.cpp does not load the file.
    """
    assert structure.checkpoint.gguf is not None
    with opened(structure.checkpoint.gguf.first.path, library, vocabulary_only=True) as model:
        yield tokenizer_in(structure, model)


def tokenizer_in(structure: Structure, model: Model) -> GgufTokenizer | None:
    """The tokenizer of an opened file, with the chat template that the file has; None where it has no vocabulary."""
    assert structure.checkpoint.gguf is not None
    template = structure.checkpoint.gguf.first.values.get(CHAT_TEMPLATE)
    return tokenizer_of(model, template if isinstance(template, str) else None)
