"""The profile of a GGUF model as a job: opens it in llama.cpp, reads corpora in its own tokens, saves the profile."""

from __future__ import annotations

import contextlib
from pathlib import Path

from moecover import rehearsal
from moecover.checkpoints.structure import Structure
from moecover.corpora.loading import Corpora, load_corpora
from moecover.corpora.options import JobOptions
from moecover.llama.opening import opened_gguf
from moecover.profiling.artifact import Profile
from moecover.profiling.coverage import coverage_line
from moecover.profiling.gguf import profile_gguf
from moecover.progress import Progress
from moecover.runtime.pass_state import kept_for_later, remove


def profiled_gguf(
    structure: Structure,
    corpora: Corpora,
    options: JobOptions,
    *,
    batch_size: int,
    folder: Path | None,
    scratch: Path | None,
    libllama: str | Path | None,
    progress: Progress,
) -> Profile:
    """The profile, saved where there is a folder for it.

    Args:
        structure: the file.
        corpora: as `corpora.loading.parsed` has them.
        options: see `JobOptions`.
        batch_size: sequences between two saves of the state.
        folder: for profile.safetensors; None for none.
        scratch: for the state from which an interrupted pass resumes; None for none.
        libllama: the library; None for the optional dependency's.
        progress: shows the pass.

    Raises:
        InputError: there is no library, or what `profile_gguf` raises.
        MoecoverError: llama.cpp gives up, or the disk is full.
    """
    with contextlib.ExitStack() as stack:
        opening = opened_gguf(structure, libllama=libllama, device=options.get("device"), progress=progress)
        model, tokenizer = stack.enter_context(opening)
        loaded = load_corpora(corpora, structure, options, tokenizer=tokenizer, progress=progress)
        rehearsal.ahead("run", "the model in llama.cpp")
        rehearsal.stop()
        if scratch is not None:
            stack.enter_context(kept_for_later(scratch))
        total = sum(corpus.num_tokens for corpus in loaded)
        with progress.bar("profiling", total) as advance:
            made = profile_gguf(
                structure,
                loaded,
                model=model,
                batch_size=batch_size,
                state=scratch,
                advance=advance,
                say=progress.say,
            )
        if folder is not None:
            made.save(folder)
        if line := coverage_line(made):
            progress.say(line)
        if scratch is not None:
            remove(scratch)
    return made
