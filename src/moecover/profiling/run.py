"""Stage 2, profile: reads a model and corpora, gives additive statistics of every expert on every corpus.

One forward pass over each corpus, batch by batch (`passes`); `hooks` records the experts, `artifact` holds the result.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from moecover.checkpoints.stamps import stamps
from moecover.checkpoints.structure import Structure
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.files.atomic import canonical_json
from moecover.profiling.artifact import Profile
from moecover.profiling.channels import width_of
from moecover.profiling.collecting import collected
from moecover.profiling.inputs_writer import Writer, writing
from moecover.profiling.layer_inputs import FILE as INPUTS
from moecover.profiling.layer_inputs import open_inputs, sample_of
from moecover.profiling.mtp import key, num_tokens
from moecover.profiling.passes import Job, in_memory, layer_by_layer
from moecover.profiling.records import Settings, model_record
from moecover.profiling.statistics import MAXIMA, OF_MTP, STATISTICS
from moecover.profiling.sums import Sums
from moecover.profiling.wide import WIDE
from moecover.runtime.distributed import add_up, check_same, checking, shared_out
from moecover.runtime.drafting import Drafts, load_drafts, not_run
from moecover.runtime.finite import watched
from moecover.runtime.loading import load_model
from moecover.runtime.pass_state import State
from moecover.runtime.running import Running, running
from moecover.runtime.streaming import Streamed
from moecover.runtime.world import ALONE, World, check_alone
from moecover.version import library_versions

if TYPE_CHECKING:
    import torch


def profile(
    structure: Structure,
    corpora: Sequence[Corpus],
    *,
    model: torch.nn.Module | Running | None = None,
    batch_size: int = 4,
    dtype: str = "auto",
    device: str = "auto",
    keep_inputs: tuple[int, Path] | None = None,
    mtp: bool | None = False,
    state: Path | None = None,
    here: World = ALONE,
    advance: Callable[[int], None] = lambda tokens: None,
    say: Callable[[str], None] = lambda line: None,
) -> Profile:
    """Profile a model on several corpora, each of which keeps its own statistics, in one forward pass over each.

    Args:
        structure: the checkpoint, from `read_structure`.
        corpora: from `load_corpus`, with distinct names.
        model: the live model from `load_model`, or one from `streamed` that runs layer by layer; loaded by default.
        batch_size: sequences per forward pass.
        dtype: dtype of the model that is loaded, see `load_model`.
        device: device of the model that is loaded, see `load_model`.
        keep_inputs: number of tokens for which every layer's inputs are saved, and the folder for the file.
        mtp: record the multi-token-prediction layers too; None where they can run, and says so where they cannot.
        state: folder for the state from which an interrupted pass resumes; to be removed when the profile is saved.
        here: this process among others that profile the same, see `distributed`; each gets the whole profile.
        advance: called with the number of tokens that have been processed.
        say: receives lines of log.

    Raises:
        MoecoverError: the disk is full, or another process is lost.
        InputError: names that repeat, multi-token-prediction layers that cannot run, or what `load_model` and `checked`
            raise.
    """
    check_names(corpora)
    if batch_size < 1:
        raise InputError(f"{arg('batch_size', batch_size)} is out of range: 1 or more")
    if keep_inputs is not None:
        check_alone(here, arg("keep_inputs"))
    runs = running(load_model(structure, dtype=dtype, device=device) if model is None else model, structure)
    kind = str(runs.dtype).removeprefix("torch.")
    width = width_of(runs.module, structure)
    drafts = _drafts(structure, runs, mtp, here, say)
    sums = {c.name: Sums(structure.topology, runs.device, -(-len(c.tokens) // batch_size), width) for c in corpora}
    if drafts is not None:
        of = (drafts.structure.topology, runs.device)
        sums |= {key(c.name): Sums(*of, -(-len(c.tokens) // batch_size), width) for c in corpora}
    resumed = None
    if state is not None or here.size > 1:
        depends_on = _depends_on(structure, corpora, runs, batch_size, keep_inputs[0] if keep_inputs else None)
        depends_on |= {"width of the experts": width, "statistics": [*STATISTICS, *WIDE], OF_MTP: drafts is not None}
        resumed = _resumed(state, depends_on, sums, here, say)
    with _sample_writer(structure, corpora, keep_inputs, state, batch_size=batch_size, dtype=kind) as writer:
        _run(runs, Job(structure, corpora, sums, batch_size, writer, resumed, here, checking(here, advance), drafts))
        for one in sums.values():
            one.finish()
        together(here, sums, runs.device)
        about, settings = model_record(structure), _settings(structure, runs, batch_size)
        made = collected(structure.topology, corpora, sums, about, settings)
        if drafts is not None:
            topology, of_mtp = drafts.structure.topology, {c.name: sums[key(c.name)] for c in corpora}
            tokens = {c.name: num_tokens(c, len(topology.decoder_layers)) for c in corpora}
            made = replace(made, mtp=collected(topology, corpora, of_mtp, about, settings, tokens))
    return replace(made, inputs=open_inputs(keep_inputs[1])) if keep_inputs is not None else made


def _drafts(
    structure: Structure, runs: Running, mtp: bool | None, here: World, say: Callable[[str], None]
) -> Drafts | None:
    """The multi-token-prediction layers of an open model; None where they are not wanted, see `profile`.

    Where they are taken if they can be had, no process takes them unless all can: one may run layer by layer.

    Raises:
        InputError: they are wanted and cannot run.
        MoecoverError: a process is lost.
    """
    drafts, why = None, "" if mtp is False else not_run(structure, runs) or ""
    if mtp and why:
        raise InputError(f"{arg('mtp')} has nothing to profile: {why}")
    if mtp is not False and not why:
        try:
            drafts = load_drafts(runs.module, structure)
        except InputError as error:
            if mtp:
                raise
            why = str(error)
    reasons = shared_out(here, range(here.size), lambda mine: [why] * len(mine))
    if mtp is not None or not any(reasons):
        return drafts
    say(f"note: {OF_MTP} are not profiled: {next(filter(None, reasons))}")
    return None


def check_names(corpora: Sequence[Corpus]) -> None:
    """Refuse corpora that cannot be kept apart.

    Raises:
        InputError: there is none, or a name repeats.
    """
    names = [corpus.name for corpus in corpora]
    if len(set(names)) < len(names) or not names:
        raise InputError(f"corpora {', '.join(names) or '(none)'}: at least one is needed, and every name once")


def _depends_on(
    structure: Structure, corpora: Sequence[Corpus], runs: Running, batch_size: int, kept_tokens: int | None
) -> dict[str, object]:
    """What the statistics depend on, by the name that messages use; a state of other inputs is not resumed."""
    from moecover.version import VERSION

    stored = {e.name: [e.shard, e.start, e.dtype] for e in structure.checkpoint.tensors.values()}
    return {
        "model": structure.model_fingerprint,
        "weights": hashlib.sha256(canonical_json([stored, stamps(structure)]).encode()).hexdigest(),
        "corpora": [(c.name, [c.record]) for c in corpora],
        "batch size": batch_size,
        "dtype": str(runs.dtype).removeprefix("torch."),
        "device": runs.device.type,
        "way": "layers" if runs.by_layer else "batches",
        "inputs kept": kept_tokens,
        "version": VERSION,
    }


def _resumed(
    state: Path | None,
    depends_on: dict[str, object],
    sums: Mapping[str, Sums],
    here: World,
    say: Callable[[str], None],
) -> State | None:
    """The state of an earlier pass with the same inputs, its sums restored; refuses processes with other inputs."""
    check_same(here, {k: v for k, v in depends_on.items() if k not in ("way", "weights")})
    if state is None:
        return None
    resumed = State(state, depends_on | {"process": [here.rank, here.size]}, say=say)
    resumed.restore(sums)
    return resumed


@contextlib.contextmanager
def _sample_writer(
    structure: Structure,
    corpora: Sequence[Corpus],
    keep_inputs: tuple[int, Path] | None,
    state: Path | None,
    *,
    batch_size: int,
    dtype: str,
) -> Iterator[Writer | None]:
    """The writer for a sample of the layers' inputs, None where none is saved."""
    if keep_inputs is None:
        yield None
        return
    tokens, folder = keep_inputs
    with writing(
        folder / INPUTS,
        sample_of(corpora, tokens),
        layers=len(structure.topology.decoder_layers),
        hidden_size=structure.topology.hidden_size,
        dtype=dtype,
        batch_size=batch_size,
        model_fingerprint=structure.model_fingerprint,
        draft=state / INPUTS if state is not None else None,
    ) as writer:
        yield writer


def _run(runs: Running, job: Job) -> None:
    with watched(runs):
        if runs.by_layer:
            # Resuming in the middle of the layers and spilling go beyond `Running.run`: only the streamed model has
            # them.
            layer_by_layer(cast(Streamed, runs), job)
        else:
            in_memory(runs, job)


def together(here: World, sums: Mapping[str, Sums], device: torch.device) -> None:
    """Add up the sums of all processes, in each of them.

    Raises:
        MoecoverError: a process is lost.
    """
    if here.size == 1:
        return
    for one in sums.values():
        state = one.state()
        summed = {name: values for name, values in state.items() if name not in ("scoring", "noted")}
        maxima = [name for name in summed if name.removeprefix("parts.") in MAXIMA]
        one.restore(state | add_up(here, summed, device, maxima=maxima))


def _settings(structure: Structure, runs: Running, batch_size: int) -> Settings:
    import torch

    grouped = hasattr(runs.module.get_submodule(structure.experts_modules[0]), "has_post_expert_norm")
    return {
        "batch_size": batch_size,
        "dtype": str(runs.dtype).removeprefix("torch."),
        "device": runs.device.type,
        "experts": "grouped_mm" if grouped else "their own",
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
    }
