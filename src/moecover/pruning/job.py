"""Pruning as a job: reads a model as users give it, with a plan or with calibration text; writes the pruned checkpoint.

In one shot the stages follow each other on one opened model: profile, plan, repair, write. The checkpoint is locked from
the first to the last, and what an interrupted run has finished serves the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.opening import Model, described, fetched
from moecover.checkpoints.pieces import NOTHING
from moecover.checkpoints.structure import Structure
from moecover.checkpoints.topology import Topology
from moecover.corpora.loading import Corpora, load_corpora, parsed
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.files.atomic import locked
from moecover.planning.artifact import Plan, check_plan
from moecover.planning.job import ROUND_OPTIONS, SEARCH_TOKENS, plan_line, search_resources
from moecover.planning.keep import resolve_keep
from moecover.planning.methods import METHODS, default_method
from moecover.planning.run import check_options, plan_budgets
from moecover.profiling.job import check_output as check_profile_folder
from moecover.profiling.job import profiled, scratch_beside
from moecover.profiling.layer_inputs import sample_of
from moecover.progress import Progress, resolve
from moecover.pruning.card_numbers import Measurement
from moecover.pruning.writer import check_target
from moecover.pruning.writer import prune as write_checkpoint
from moecover.registry import unknown_name
from moecover.repairing.job import check_kind, memory_beside, repaired
from moecover.repairing.store import Repaired, kept_for_later
from moecover.runtime.loading import check_loadable
from moecover.runtime.pass_state import remove
from moecover.runtime.passes import Passes, check_positive, passes
from moecover.text import Cell, Shown, size_text

if TYPE_CHECKING:
    from moecover.runtime.running import Running


@dataclass(frozen=True)
class Text:
    """Calibration text as it is asked for; see `corpora.loading.load_corpora`."""

    corpora: Corpora
    sequences: int | None = None
    length: int | None = None
    seed: int = 0

    def load(self, structure: Structure, progress: Progress) -> list[Corpus]:
        """The corpora in the model's token ids."""
        return load_corpora(
            self.corpora, structure, sequences=self.sequences, length=self.length, seed=self.seed, progress=progress
        )


@dataclass(frozen=True)
class Choice:
    """How one shot chooses the experts: method, its options, experts per layer, and what becomes of the profile."""

    method: str
    options: Mapping[str, Any]
    keep: int
    profile_folder: Path | None = None
    search_tokens: int | None = None


@dataclass(frozen=True)
class Repair:
    """The repair that is asked for: its kind, and calibration tokens (None for the default)."""

    kind: str
    tokens: int | None = None


@dataclass(frozen=True, repr=False)
class Pruned(Shown):
    """What was written; stands for its folder wherever a path is expected.

    Attributes:
        output: folder of the checkpoint.
        plan: which experts stayed.
        topology: of the source.
        bytes_before: of all tensors of the source.
        num_bytes: of all tensors of the checkpoint.
        repaired: the repair, None without one.
    """

    output: Path
    plan: Plan
    topology: Topology
    bytes_before: int
    num_bytes: int
    repaired: Repaired | None = None

    def __fspath__(self) -> str:
        return str(self.output)

    def __truediv__(self, name: str) -> Path:
        return self.output / name

    def sizes(self) -> str:
        """What became of experts and bytes."""
        share = self.num_bytes / self.bytes_before
        sizes = f"{size_text(self.bytes_before)} -> {size_text(self.num_bytes)} ({share:.0%})"
        return f"{self.plan.keep} of {self.topology.num_experts} experts per layer, {sizes}"

    def summary(self) -> str:
        """See `Shown`."""
        return f"{self.output}: {self.sizes()}"

    def rows_shown(self) -> list[dict[str, Cell]]:
        """See `Shown`: the source and what was written."""
        return [
            {"": "source", "experts per layer": self.topology.num_experts, "size": size_text(self.bytes_before)},
            {"": str(self.output), "experts per layer": self.plan.keep, "size": size_text(self.num_bytes)},
        ]


@dataclass(frozen=True)
class Writing:
    """How the checkpoint is written; see `pruning.writer.write_checkpoint`."""

    overwrite: bool = False
    other_weights: bool = False
    mtp: str = "drop"
    command: str = ""
    evaluations: Mapping[str, Measurement] = field(default_factory=lambda: NOTHING)


def run_prune(
    headers: Structure,
    output: Path,
    choice: Plan | Choice,
    *,
    text: Text | None,
    repair: Repair | Repaired | None,
    how: Passes,
    writing: Writing,
    revision: str | None,
    progress: Progress,
) -> Pruned:
    """Fetch, profile, plan, repair and write, as far as each is asked for, while no other run can write the output.

    Args:
        headers: structure of the model; its files may still be on the hub.
        output: folder to write.
        choice: a plan, or how one is made from the text.
        text: calibration text, where something is made from it.
        repair: what to repair, a finished repair, or None.
        how: see `Passes`.
        writing: see `Writing`.
        revision: of a hub model.
        progress: shows the stages.

    Raises:
        InputError: what the stages raise.
        MoecoverError: the disk is full, or a file cannot be read or written.
    """
    keep = choice.keep
    asked = repair if isinstance(repair, Repair) else None
    extra = 0 if asked is None else memory_beside(headers, keep=keep, tokens=asked.tokens, dtype=how.dtype)
    with locked(check_target(headers, output, overwrite=writing.overwrite)):
        structure = fetched(headers, revision=revision, progress=progress)
        state = scratch_beside(output.resolve(), "repair")
        with kept_for_later(state):
            with contextlib.ExitStack() as stack:  # holds the model, which is not needed for writing
                model: Running | None = None
                corpora: Sequence[Corpus] = ()
                if isinstance(choice, Plan):
                    plan = choice
                    check_plan(plan, structure, other_weights=writing.other_weights)
                if text is not None:
                    corpora = text.load(structure, progress)
                if isinstance(choice, Choice):
                    plan, model = _chosen(structure, corpora, choice, how, output, extra, stack, progress)
                made = repair if isinstance(repair, Repaired) else None
                if asked is not None:
                    made = repaired(
                        structure, plan, corpora, how, kind=asked.kind, tokens=asked.tokens, folder=state, model=model,
                        progress=progress,
                    )  # fmt: skip
                del model
            pruned = _written(structure, plan, output, made, writing, progress)
        remove(state)
    return pruned


def _chosen(
    structure: Structure,
    corpora: Sequence[Corpus],
    choice: Choice,
    how: Passes,
    output: Path,
    extra: int,
    stack: contextlib.ExitStack,
    progress: Progress,
) -> tuple[Plan, Running]:
    """The plan of one shot, and the model, open until the stack is closed."""
    profile, model = stack.enter_context(
        profiled(
            structure, corpora, how, folder=choice.profile_folder, scratch=scratch_beside(output, "profile"),
            keep_inputs=choice.search_tokens if choice.profile_folder is not None else None, extra=extra, progress=progress,
        )
    )  # fmt: skip
    searches = METHODS[choice.method].runs_experts
    sample = sample_of(corpora, choice.search_tokens or SEARCH_TOKENS) if searches else None
    with search_resources(choice.method, choice.options, structure, model, sample=sample, progress=progress) as more:
        (plan,) = plan_budgets(profile, method=choice.method, keeps=[choice.keep], **more, **choice.options)
    progress.say(f"{output}: {plan_line(plan, structure.topology.num_experts)}")
    return plan, model


def _written(
    structure: Structure, plan: Plan, output: Path, made: Repaired | None, writing: Writing, progress: Progress
) -> Pruned:
    before, after = structure.checkpoint.num_bytes, structure.num_bytes(plan.keep, mtp=writing.mtp)
    with progress.bar("writing", after, unit="bytes") as advance:
        path = write_checkpoint(
            structure, plan, output, overwrite=writing.overwrite, other_weights=writing.other_weights, mtp=writing.mtp,
            repaired=made, command=writing.command, evaluations=writing.evaluations, advance=advance, say=progress.say,
        )  # fmt: skip
    return Pruned(path, plan, structure.topology, before, after, made)


def prune(
    checkpoint: Model,
    /,
    plan: Plan | str | Path | None = None,
    output: str | Path | None = None,
    *,
    corpora: Corpora | None = None,
    keep: int | None = None,
    retain: float | None = None,
    multiple_of: int | None = None,
    method: str | None = None,
    options: Mapping[str, Any] = NOTHING,
    repair: str | None = None,
    repair_tokens: int | None = None,
    repaired: Repaired | None = None,
    save_profile: str | Path | None = None,
    keep_inputs: int | None = None,
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    memory_limit: int | str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    other_weights: bool = False,
    mtp: str = "drop",
    evaluations: Mapping[str, Measurement] = NOTHING,
    command: str = "",
    progress: bool | Progress = True,
) -> Pruned:
    """Write the pruned checkpoint, from a plan or in one shot from calibration text.

    The folder appears only when it is complete. After an error or an interrupt, the same call resumes.

    Args:
        checkpoint: folder, hub id, or a structure from `read_structure`.
        plan: from `plan`, or its file; None for one shot.
        output: folder to write.
        corpora: calibration text, as in `profile`: for one shot, and for ``repair``.
        keep: one shot: experts kept per layer; give this or ``retain``.
        retain: one shot: fraction of the experts kept per layer, in (0, 1].
        multiple_of: one shot: round the count to the nearest multiple of this that the router allows.
        method: one shot: name in `METHODS`; None for the default.
        options: one shot: of the method, and ``protect_super_experts``.
        repair: ``scale`` or ``ridge``: refit the down projections of what stays on ``corpora``; None for none.
        repair_tokens: calibration tokens of the repair; None for 65,536.
        repaired: a repair from `repair`, instead of ``repair``.
        save_profile: one shot: folder for the profile, for other budgets.
        keep_inputs: one shot: calibration tokens that a search runs on; None for 8,192.
        sequences: blocks per corpus; None for up to 128.
        length: tokens per block; None for 2048, or the model's positions if fewer.
        seed: of the sample of blocks.
        batch_size: sequences per forward pass; None for 4.
        dtype: torch dtype by name; None for the checkpoint's.
        device: torch device by name; None for a GPU where there is one.
        memory_limit: memory that may be used, in bytes or as text; None for nine tenths of what is free.
        revision: branch, tag or commit of a hub model.
        overwrite: replace a folder that moecover wrote.
        other_weights: accept a plan made on other weights of the same shape.
        mtp: multi-token-prediction layers with experts of their own: ``drop``, or ``prune`` them by the last layer's plan.
        evaluations: by a name for messages, evaluations of the plan whose numbers go on the model card.
        command: what the user typed, for the model card.
        progress: True draws bars and a log on stderr or in a notebook; False is silent.

    Returns:
        The folder, as an object that says what was written.

    Raises:
        InputError: the plan does not fit, the output exists, or arguments that contradict each other.
        MoecoverError: the disk is full, or a file cannot be read or written.
    """
    shown = resolve(progress)
    if output is None:
        raise InputError(f"give {arg('output')}, the folder to write")
    folder = Path(output)
    given = None if plan is None else plan if isinstance(plan, Plan) else Plan.load(plan)
    if given is None and corpora is None:
        raise InputError(f"give a plan, or {arg('corpora')} with {arg('keep')} or {arg('retain')} for one shot")
    if repair is not None:
        check_kind(repair)
        if repaired is not None:
            raise InputError(f"give {arg('repair')} or {arg('repaired')}, not both")
        if corpora is None:
            raise InputError(f"{arg('repair', repair)} fits weights on calibration text: give {arg('corpora')}")
    runs = given is None or repair is not None
    how = passes(batch_size=batch_size, dtype=dtype, device=device, memory_limit=memory_limit) if runs else Passes(1)
    check_positive(sequences=sequences, length=length, keep_inputs=keep_inputs, repair_tokens=repair_tokens)
    name = default_method().name if method is None else method
    if given is None:
        check_choice(checkpoint, folder, name, options, corpora or (), save_profile, overwrite=overwrite)
    headers = described(checkpoint, revision=revision, progress=shown)
    if runs:
        check_loadable(headers)
    choice: Plan | Choice
    if given is None:
        count = resolve_keep(headers.topology, keep=keep, retain=retain, multiple_of=multiple_of)
        choice = Choice(name, options, count, None if save_profile is None else Path(save_profile), keep_inputs)
    else:
        choice = given
    return run_prune(
        headers, folder, choice, text=None if corpora is None else Text(corpora, sequences, length, seed),
        repair=repaired if repair is None else Repair(repair, repair_tokens), how=how,
        writing=Writing(overwrite, other_weights, mtp, command, evaluations), revision=revision, progress=shown,
    )  # fmt: skip


def check_choice(
    model: Model,
    output: Path,
    method: str,
    options: Mapping[str, Any],
    corpora: Corpora,
    save_profile: str | Path | None,
    *,
    overwrite: bool,
) -> None:
    """Refuse what one shot cannot do, before anything is read.

    Raises:
        InputError: an unknown method, option or corpus, or a folder for the profile that lies in the output or model.
    """
    check_options(method, {key: value for key, value in options.items() if key not in ROUND_OPTIONS})
    names = parsed(corpora)
    if unknown := sorted(dict(options.get("weights") or {}).keys() - names.keys()):
        raise unknown_name(f"corpus in {arg('weights')}", unknown[0], names)
    if save_profile is None:
        return
    check_profile_folder(Path(save_profile), overwrite=overwrite)
    folder = Path(save_profile).resolve()
    source = model.checkpoint.name if isinstance(model, Structure) else model
    for other in (output.resolve(), Path(source).resolve()):
        if folder == other or other in folder.parents:
            raise InputError(f"{arg('save_profile', save_profile)} lies in {other}. Choose another folder")
