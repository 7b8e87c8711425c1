"""A profile as a job: reads a model and corpora as users give them, opens the model as it fits, writes the profile.

`profiling.run` is the pass itself; here is what comes before it (checks, opening, an estimate) and after it (saving).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from moecover import rehearsal
from moecover.checkpoints.opening import Model, described, fetched
from moecover.checkpoints.structure import Structure
from moecover.corpora.loading import Corpora, load_corpora, parsed
from moecover.corpora.options import JobOptions
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.files.locks import locked
from moecover.llama.opening import check_options, check_unused
from moecover.profiling.artifact import FILE, Profile
from moecover.profiling.coverage import coverage_line
from moecover.profiling.folders import check_folder, check_output, scratch_beside
from moecover.profiling.gguf_job import profiled_gguf
from moecover.profiling.layer_inputs import num_bytes, sample_of
from moecover.profiling.merging import differing, lost, merged
from moecover.profiling.reuse import finished
from moecover.profiling.run import profile as run_profile
from moecover.profiling.statistics import OF_MTP
from moecover.profiling.wide import file_bytes
from moecover.profiling.wide import num_bytes as wide_bytes
from moecover.progress import Progress, resolve
from moecover.runtime.distributed import joined, wait_for_all
from moecover.runtime.drafting import beside_whole, not_run
from moecover.runtime.loadable import check_loadable
from moecover.runtime.memory import opened
from moecover.runtime.options import check_known, check_live
from moecover.runtime.pass_state import kept_for_later, of_process, remove, remove_all
from moecover.runtime.passes import Passes, check_least, passes
from moecover.runtime.running import Running, running
from moecover.runtime.world import ALONE, World, check_alone, own_device
from moecover.text import size_text

if TYPE_CHECKING:
    import torch


def _opened(
    structure: Structure,
    corpora: Sequence[Corpus],
    how: Passes,
    *,
    extra: int,
    mtp: bool | None,
    state: Path | None,
    here: World,
    progress: Progress,
) -> contextlib.AbstractContextManager[Running]:
    """The model of a pass over corpora, in memory where it fits."""
    return opened(
        structure,
        tokens=-(-sum(corpus.num_tokens for corpus in corpora) // here.size),
        batch_tokens=how.batch_size * max(corpus.tokens.shape[1] for corpus in corpora),
        dtype=how.dtype,
        device=own_device(here, how.device),
        device_map=how.device_map,
        memory_limit=how.memory_limit,
        extra=extra + wide_bytes(structure, len(corpora)),
        whole=f"{arg('mtp')} has nothing to profile: {beside_whole(structure)}" if mtp else "",
        here=here,
        scratch=state,
        say=progress.say,
    )


@contextlib.contextmanager
def profiled(
    structure: Structure,
    corpora: Sequence[Corpus],
    how: Passes,
    *,
    model: Running | None = None,
    folder: Path | None = None,
    scratch: Path | None = None,
    keep_inputs: int | None = None,
    mtp: bool | None = False,
    reuse: bool = False,
    extra: int = 0,
    here: World = ALONE,
    progress: Progress,
) -> Iterator[tuple[Profile, Running]]:
    """The profile and the model that it was made with, still open.

    Args:
        structure: the checkpoint, its files on this machine.
        corpora: calibration text.
        how: see `Passes`.
        model: the model where it is open already.
        folder: where the profile is saved; None for nowhere.
        scratch: folder for the state of the pass, from which an interrupted one resumes; removed when the block ends.
        keep_inputs: tokens of the expert layers' inputs to save in ``folder``.
        mtp: see `profiling.run.profile`.
        reuse: take over a profile that is in ``folder`` already, from an interrupted run of the same.
        extra: bytes of memory that the caller needs beside the model.
        here: this process among others that profile the same together.
        progress: shows the pass.

    Raises:
        InputError: the model does not fit, or what `profiling.run.profile` raises.
        MoecoverError: the disk is full, or another process is gone.
    """
    state = of_process(scratch, here.rank) if scratch is not None and here.size > 1 else scratch
    inputs = (keep_inputs, folder) if keep_inputs is not None and folder is not None else None
    if inputs is not None:
        sample_of(corpora, inputs[0])
    with contextlib.ExitStack() as stack:
        if state is not None:
            stack.enter_context(kept_for_later(state))
        if model is None:
            opening = _opened(structure, corpora, how, extra=extra, mtp=mtp, state=state, here=here, progress=progress)
            model = stack.enter_context(opening)
        before = None
        if reuse and folder is not None:
            before = finished(structure, folder, corpora, model, how.batch_size, keep_inputs, mtp)
        made = before or _passed(structure, corpora, how, model, inputs, mtp, state, here, progress)
        if before is not None:
            progress.say(f"resuming: the profile in {folder} is done")
            if mtp is None and before.mtp is None:
                progress.say(f"note: the profile in {folder} was made without {OF_MTP}")
        elif folder is not None and here.rank == 0:
            made.save(folder)
        wait_for_all(here)
        yield made, model
        if state is not None:
            remove(state)
        if scratch is not None and here.local_rank == 0:
            remove_all(scratch)


def _passed(
    structure: Structure,
    corpora: Sequence[Corpus],
    how: Passes,
    model: Running,
    inputs: tuple[int, Path] | None,
    mtp: bool | None,
    state: Path | None,
    here: World,
    progress: Progress,
) -> Profile:
    """The pass itself, under a bar; says first what the saved inputs will take on disk."""
    if inputs is not None:
        sample, layers = sample_of(corpora, inputs[0]), len(structure.topology.decoder_layers)
        size = size_text(num_bytes(sample, layers, structure.topology.hidden_size, model.dtype.itemsize))
        kept = sum(corpus.num_tokens for corpus in sample)
        progress.say(f"saving the inputs of {layers} layers for {kept:,} tokens: {size} in {inputs[1]}")
    with progress.bar("profiling", -(-sum(corpus.num_tokens for corpus in corpora) // here.size)) as advance:
        return run_profile(
            structure,
            corpora,
            model=model,
            batch_size=how.batch_size,
            keep_inputs=inputs,
            mtp=mtp,
            state=state,
            here=here,
            advance=advance,
            say=progress.say,
        )


def profile(
    checkpoint: Model,
    /,
    corpora: Corpora,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    model: torch.nn.Module | Running | None = None,
    keep_inputs: int | None = None,
    mtp: bool = False,
    libllama: str | Path | None = None,
    here: World = ALONE,
    progress: bool | Progress = True,
    **options: Unpack[JobOptions],
) -> Profile:
    """Profile a model on corpora that are kept apart: one forward pass over each, additive statistics of each expert.

    Args:
        checkpoint: folder, hub id (``owner/name``), GGUF file, or a structure from `read_structure`.
        corpora: names (``"c4"``), ``"NAME=PATH"``, corpora from `load_corpus`, or a mapping from names to files.
        output: folder for profile.safetensors; an interrupted pass resumes when the same call runs again.
        overwrite: replace a profile that is there.
        model: the live model from `load_model`; None opens it, layer by layer where it does not fit.
        keep_inputs: save the expert layers' inputs for this many tokens, for methods that run the experts.
        mtp: profile multi-token-prediction layers with experts too, at the cost of one more layer each, so that plans
            rate these on their own; only beside a model that is in memory as a whole, on one device.
        libllama: shared library of llama.cpp, which runs GGUF files; None for the optional dependency's.
        here: this process among others under torchrun.
        progress: True draws bars and a log on stderr or in a notebook; False is silent.
        **options: see `RunOptions` (batch size 4 by default) and `TextOptions`.

    Raises:
        InputError: arguments out of range, a corpus or model that cannot be read, weights that are not finite.
        MoecoverError: the disk is full, or another process is gone.
    """
    shown, folder = resolve(progress), None if output is None else Path(output)
    check_known(options, JobOptions)
    how = passes(options)
    check_least(1, sequences=options.get("sequences"), length=options.get("length"), keep_inputs=keep_inputs)
    parsed(corpora)
    check_live(model, options)
    if mtp and how.device_map is not None:
        raise InputError(f"{arg('mtp')} runs beside a model on one device only: leave {arg('device_map')} out")
    if keep_inputs is not None:
        check_alone(here, arg("keep_inputs"))
    check_folder(folder, keep_inputs, overwrite=overwrite)
    headers = described(checkpoint, revision=options.get("revision"), progress=shown)
    if folder is not None:
        size = file_bytes(headers, len(parsed(corpora)))
        rehearsal.ahead("write", folder / FILE, num_bytes=size)
    scratch = None if folder is None else scratch_beside(folder, "profile")
    held = locked(folder.resolve()) if folder is not None and here.rank == 0 else contextlib.nullcontext()
    if headers.checkpoint.gguf is not None:
        check_options({**options, "keep_inputs": keep_inputs, "mtp": mtp or None, "model": model}, "mtp")
        check_alone(here, headers.checkpoint.name)
        with held:
            return profiled_gguf(
                headers,
                corpora,
                options,
                batch_size=how.batch_size,
                folder=folder,
                scratch=scratch,
                libllama=libllama,
                progress=shown,
            )
    check_unused(libllama)
    if mtp and (why := not_run(headers)):
        raise InputError(f"{arg('mtp')} has nothing to profile: {why}")
    if model is None:
        check_loadable(headers, how.dtype)
    with held, joined(here, own_device(here, how.device)):
        structure = fetched(headers, revision=options.get("revision"), progress=shown)
        loaded = load_corpora(corpora, structure, options, progress=shown)
        with profiled(
            structure,
            loaded,
            how,
            model=None if model is None else running(model, structure),
            folder=folder,
            scratch=scratch,
            keep_inputs=keep_inputs,
            mtp=mtp,
            here=here,
            progress=shown,
        ) as (made, _):
            if line := coverage_line(made):
                shown.say(line)
            return made


def merge(
    profiles: Sequence[str | Path | Profile],
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: bool | Progress = True,
) -> Profile:
    """Add up profiles of one model that were made separately.

    Args:
        profiles: two or more, or their folders.
        output: folder for the sum, None for none.
        overwrite: replace a profile that is there.
        progress: True logs on stderr or in a notebook; False is silent.

    Raises:
        InputError: fewer than two, or profiles that do not add up (another model or dtype, or the same text twice).
    """
    if output is not None:
        check_output(Path(output), overwrite=overwrite)
    if len(profiles) < 2:
        raise InputError("give two profiles or more")
    names = [f"profile {i}" if isinstance(one, Profile) else str(one) for i, one in enumerate(profiles, 1)]
    loaded = [one if isinstance(one, Profile) else Profile.load(Path(one)) for one in profiles]
    made = merged(loaded, names)
    if differs := differing(loaded):
        resolve(progress).say(f"note: the profiles differ in {', '.join(differs)}, which the sum does not name")
    for name, lacking in lost(made, loaded).items():
        resolve(progress).say(f"note: a profile of {', '.join(lacking)} has no {name}, so the sum has none of it")
    if output is not None:
        made.save(Path(output))
    return made
