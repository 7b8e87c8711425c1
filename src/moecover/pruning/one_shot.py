"""Fetch, profile, plan, repair and write, one after the other on one opened model, while the output is locked.

`pruning.job` says what is asked for; here the stages follow each other. What an interrupted run has finished serves the
next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from moecover.checkpoints.opening import fetched
from moecover.checkpoints.structure import Structure
from moecover.checkpoints.topology import Topology
from moecover.corpora.loading import Corpora, JobOptions, load_corpora
from moecover.corpora.packing import Corpus
from moecover.files.locks import locked
from moecover.planning.artifact import Plan, check_plan
from moecover.planning.job import SEARCH_TOKENS, plan_line, search_resources
from moecover.planning.methods import METHODS
from moecover.planning.run import plan_budgets
from moecover.profiling.job import profiled, scratch_beside
from moecover.profiling.layer_inputs import sample_of
from moecover.progress import Progress
from moecover.pruning.card_numbers import Measurement
from moecover.pruning.writer import check_target
from moecover.pruning.writer import prune as write_checkpoint
from moecover.repairing.job import memory_beside, repaired
from moecover.repairing.store import Repaired, kept_for_later
from moecover.runtime.pass_state import remove
from moecover.runtime.passes import Passes
from moecover.text import Cell, Shown, size_text

if TYPE_CHECKING:
    from moecover.runtime.running import Running


class WriteOptions(TypedDict, total=False):
    """Keyword arguments on how the checkpoint is written.

    Attributes:
        overwrite: replace a folder that moecover wrote.
        other_weights: accept a plan made on other weights of the same shape.
        mtp: multi-token-prediction layers with experts of their own: ``drop`` (default), or ``prune`` them by the ids
            of the last MoE layer.
        evaluations: by a name for messages, evaluations of the plan whose numbers go on the model card.
        command: what the user typed, for the model card.
    """

    overwrite: bool
    other_weights: bool
    mtp: str
    evaluations: Mapping[str, Measurement]
    command: str


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


@dataclass(frozen=True)
class Request:
    """What one call of `prune` asks for.

    Attributes:
        output: folder to write.
        choice: a plan, or how one is made from the corpora.
        corpora: calibration text, where something is made from it.
        text: how much of it.
        repair: what to repair, a finished repair, or None.
        how: see `Passes`.
        writing: see `WriteOptions`.
    """

    output: Path
    choice: Plan | Choice
    corpora: Corpora | None
    text: JobOptions
    repair: Repair | Repaired | None
    how: Passes
    writing: WriteOptions


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
        """See `Shown`: the source, and what was written."""
        return [
            {"": "source", "experts per layer": self.topology.num_experts, "size": size_text(self.bytes_before)},
            {"": str(self.output), "experts per layer": self.plan.keep, "size": size_text(self.num_bytes)},
        ]


def carry_out(headers: Structure, request: Request, *, progress: Progress) -> Pruned:
    """Run the stages that a request asks for, while no other run can write the output.

    Args:
        headers: structure of the model; its files may still be on the hub.
        request: what is asked for.
        progress: shows the stages.

    Raises:
        InputError: what the stages raise.
        MoecoverError: the disk is full, or a file cannot be read or written.
    """
    output, asked, how = request.output, request.repair, request.how
    extra = 0
    if isinstance(asked, Repair):
        extra = memory_beside(headers, keep=request.choice.keep, tokens=asked.tokens, dtype=how.dtype)
    with locked(check_target(headers, output, overwrite=request.writing.get("overwrite", False))):
        structure = fetched(headers, revision=request.text.get("revision"), progress=progress)
        state = scratch_beside(output.resolve(), "repair")
        with kept_for_later(state):
            with contextlib.ExitStack() as stack:  # holds the model, which is not needed for writing
                plan, model, corpora = _chosen(structure, request, extra, stack, progress)
                made = asked if isinstance(asked, Repaired) else None
                if isinstance(asked, Repair):
                    made = repaired(
                        structure,
                        plan,
                        corpora,
                        how,
                        kind=asked.kind,
                        tokens=asked.tokens,
                        folder=state,
                        model=model,
                        progress=progress,
                    )
                del model
            pruned = _written(structure, plan, request, made, progress)
        remove(state)
    return pruned


def _chosen(
    structure: Structure, request: Request, extra: int, stack: contextlib.ExitStack, progress: Progress
) -> tuple[Plan, Running | None, Sequence[Corpus]]:
    """The plan, given or made; the model it was made with, open until the stack is closed; the corpora."""
    choice, how = request.choice, request.how
    if isinstance(choice, Plan):
        check_plan(choice, structure, other_weights=request.writing.get("other_weights", False))
    corpora: Sequence[Corpus] = ()
    if request.corpora is not None and (isinstance(choice, Choice) or isinstance(request.repair, Repair)):
        corpora = load_corpora(request.corpora, structure, request.text, progress=progress)
    if isinstance(choice, Plan):
        return choice, None, corpora
    searches = METHODS[choice.method].runs_experts
    profile, model = stack.enter_context(
        profiled(
            structure,
            corpora,
            how,
            folder=choice.profile_folder,
            scratch=scratch_beside(request.output, "profile"),
            keep_inputs=choice.search_tokens,
            extra=extra,
            progress=progress,
        )
    )
    sample = sample_of(corpora, choice.search_tokens or SEARCH_TOKENS) if searches else None
    with search_resources(choice.method, choice.options, structure, model, sample=sample, progress=progress) as more:
        (plan,) = plan_budgets(profile, method=choice.method, keeps=[choice.keep], **more, **choice.options)
    progress.say(f"{request.output}: {plan_line(plan, structure.topology.num_experts)}")
    return plan, model, corpora


def _written(structure: Structure, plan: Plan, request: Request, made: Repaired | None, progress: Progress) -> Pruned:
    """The checkpoint, written under a bar."""
    before = structure.checkpoint.num_bytes
    after = structure.num_bytes(plan.keep, mtp=request.writing.get("mtp", "drop"))
    with progress.bar("writing", after, unit="bytes") as advance:
        path = write_checkpoint(
            structure, plan, request.output, repaired=made, advance=advance, say=progress.say, **request.writing
        )
    return Pruned(path, plan, structure.topology, before, after, made)
