"""A proof as a job: reads both checkpoints and text as users give them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moecover import rehearsal
from moecover.checkpoints.opening import Model, described, fetched
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.structure import Structure
from moecover.corpora.loading import Corpora, parsed
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.gguf.parts import is_gguf
from moecover.llama.opening import check_options, check_unused
from moecover.progress import SILENT, Progress, resolve
from moecover.runtime.memory import parse_size
from moecover.runtime.passes import checked_map
from moecover.runtime.placement import DeviceMap
from moecover.verification.gguf import verify_gguf
from moecover.verification.verify import Verification
from moecover.verification.verify import verify as run_verification


def verify(
    checkpoint: Model,
    /,
    pruned: str | Path,
    *,
    corpora: Corpora = (),
    tolerance: float = 0.0,
    dtype: str | None = None,
    device: str | None = None,
    device_map: DeviceMap | None = None,
    memory_limit: int | str | None = None,
    libllama: str | Path | None = None,
    revision: str | None = None,
    progress: bool | Progress = True,
) -> Verification:
    """Prove a pruned checkpoint: same outputs as the masked original, decoder layer by decoder layer, on real text.

    Of GGUF files the bytes are compared, and what they compute where llama.cpp is there, see `verification.gguf`.

    Args:
        checkpoint: the original: folder, hub id, GGUF file, or a structure.
        pruned: folder, or first GGUF file, that `prune` wrote.
        corpora: text to run: names or ``"NAME=PATH"``; by default the shipped held-out text.
        tolerance: largest difference allowed, as a share of the layer's largest value; 0 for bit equality.
        dtype: torch dtype by name for both; None for the checkpoint's.
        device: torch device by name; None for a GPU where there is one.
        device_map: devices of the parts of a model, see `RunOptions`.
        memory_limit: memory that may be used, in bytes or as text; None for nine tenths of what is free.
        libllama: shared library of llama.cpp, which runs GGUF files; None for the optional dependency's.
        revision: branch, tag or commit of a hub model.
        progress: True logs on stderr or in a notebook; False is silent.

    Raises:
        InputError: either checkpoint cannot be read, or they do not belong together.
    """
    if tolerance < 0:
        raise InputError(f"{arg('tolerance', tolerance)} is out of range: 0 or more")
    original = checkpoint.checkpoint if isinstance(checkpoint, Structure) else checkpoint
    named = parsed(corpora) if corpora else {}
    texts = [source if isinstance(source, Corpus) else (name, source or "") for name, source in named.items()]
    if is_gguf(pruned) or is_gguf(original.name if isinstance(original, Checkpoint) else original):
        _check_given({"tolerance": tolerance, "revision": revision})
        check_options({"dtype": dtype, "device": device, "device_map": device_map, "memory_limit": memory_limit})
        with resolve(progress).spinner("comparing the files"):
            return verify_gguf(checkpoint, pruned, corpora=texts, libllama=libllama, on_cpu=device == "cpu")
    check_unused(libllama)
    limit = parse_size(memory_limit) if isinstance(memory_limit, str) else memory_limit
    places = checked_map(device_map, device)
    if rehearsal.on():  # of a hub model the headers are enough
        fetched(described(checkpoint, revision=revision, progress=SILENT), progress=SILENT)
    with resolve(progress).spinner("reading both checkpoints") as advance:
        return run_verification(
            original,
            pruned,
            revision=revision,
            corpora=texts,
            dtype=dtype or "auto",
            device=device or "auto",
            device_map=places,
            tolerance=tolerance,
            memory_limit=limit,
            advance=advance,
        )


def _check_given(options: Mapping[str, object]) -> None:
    """Refuse what says how a model runs.

    Raises:
        InputError: names the argument.
    """
    if given := [name for name, value in options.items() if value]:
        raise InputError(f"{arg(given[0])} has no use here: of GGUF files every byte is compared")
