"""The stages of one shot before the checkpoint is written: profile, plan and repair, on one opened model.

What an interrupted run has finished serves the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moecover import rehearsal
from moecover.corpora.loading import load_corpora
from moecover.corpora.packing import Corpus
from moecover.merging.method import NONE
from moecover.planning.artifact import Plan
from moecover.planning.job import SEARCH_TOKENS, search_resources
from moecover.planning.lines import calibration_notes, plan_line
from moecover.planning.methods import METHODS
from moecover.planning.run import plan_budgets
from moecover.profiling.folders import scratch_beside
from moecover.profiling.job import profiled
from moecover.profiling.layer_inputs import sample_of
from moecover.progress import Progress
from moecover.pruning.request import Choice, Repair, Request
from moecover.repairing.artifact import Repaired
from moecover.repairing.job import memory_beside, repaired
from moecover.repairing.memory import PACE, TOKENS
from moecover.repairing.store import kept_for_later
from moecover.runtime.cost import arithmetic_speed, cost
from moecover.runtime.devices import check_device
from moecover.runtime.distributed import of_first
from moecover.runtime.pass_state import remove
from moecover.runtime.passes import Passes

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure
    from moecover.runtime.running import Running


def memory_needed(headers: Structure, request: Request) -> int:
    """Bytes that a repair needs beside the model; refuses a model that cannot be repaired, before it is fetched.

    Raises:
        InputError: see `repairing.job.memory_beside`.
    """
    if not isinstance(request.repair, Repair) or request.how is None:
        return 0
    choice, asked = request.choice, request.repair
    return memory_beside(
        headers,
        kind=asked.kind,
        merge=asked.merge,
        keep=choice.keep,
        width=choice.width,
        tokens=-(-(asked.tokens or TOKENS) // request.here.size),
        dtype=request.how.dtype,
    )


@contextlib.contextmanager
def made_from_text(
    structure: Structure, request: Request, *, extra: int, progress: Progress
) -> Iterator[tuple[Plan, Repaired | None]]:
    """The plan and the repair of a request; the block writes the checkpoint, then finished layers of a repair go.

    Args:
        structure: the checkpoint, its files on this machine.
        request: what is asked for; its corpora are there.
        extra: from `memory_needed`.
        progress: shows the stages.

    Raises:
        InputError: what the stages raise.
        MoecoverError: the disk is full.
    """
    assert request.corpora is not None
    assert request.how is not None
    state = scratch_beside(request.output.resolve(), "repair")
    with kept_for_later(state):
        yield _made(structure, request, request.how, extra, state, progress)
    if request.here.rank == 0:
        remove(state)


def _made(
    structure: Structure, request: Request, how: Passes, extra: int, state: Path, progress: Progress
) -> tuple[Plan, Repaired | None]:
    choice, asked = request.choice, request.repair
    corpora = load_corpora(request.corpora or (), structure, request.text, progress=progress)
    if isinstance(asked, Repair) and rehearsal.on():
        _rehearse(structure, asked, sum(corpus.num_tokens for corpus in corpora), how)
    with contextlib.ExitStack() as stack:  # holds the model, which is not needed for writing
        model: Running | None = None
        if isinstance(choice, Plan):
            plan = choice
        else:
            plan, model = _chosen(structure, corpora, choice, request, how, extra, stack, progress)
        if not isinstance(asked, Repair):
            return plan, asked
        made = repaired(
            structure,
            plan,
            corpora,
            how,
            kind=asked.kind,
            merge=asked.merge,
            tokens=asked.tokens,
            folder=state,
            model=model,
            here=request.here,
            progress=progress,
        )
        return plan, made


def _rehearse(structure: Structure, asked: Repair, tokens: int, how: Passes) -> None:
    """Note merge and repair, and how long a repair takes."""
    tokens = min(asked.tokens or TOKENS, tokens)
    if asked.merge != NONE:
        rehearsal.ahead("run", f"merge ({asked.merge})", tokens=tokens)
    if asked.kind in PACE:
        speed = arithmetic_speed(how.dtype, check_device(how.dtype, how.device))
        one = cost(structure, tokens=tokens, batch_tokens=1, dtype=how.dtype, limit=0)
        rehearsal.ahead("run", f"repair ({asked.kind})", tokens=tokens, seconds=PACE[asked.kind] * one.flops / speed)


def _chosen(
    structure: Structure,
    corpora: Sequence[Corpus],
    choice: Choice,
    request: Request,
    how: Passes,
    extra: int,
    stack: contextlib.ExitStack,
    progress: Progress,
) -> tuple[Plan, Running]:
    """The plan of one shot, and the model that it was made with, open until the stack is closed."""
    method = METHODS[choice.method]
    own = method.rates_mtp and structure.mtp and request.writing.get("mtp", "drop") == "prune"
    profile, model = stack.enter_context(
        profiled(
            structure,
            corpora,
            how,
            folder=choice.profile_folder,
            scratch=scratch_beside(request.output, "profile"),
            keep_inputs=choice.search_tokens,
            mtp=None if own else False,
            reuse=not request.writing.get("overwrite", False),
            extra=extra,
            here=request.here,
            progress=progress,
        )
    )
    sample = sample_of(corpora, choice.search_tokens or SEARCH_TOKENS) if method.runs_experts else None
    with search_resources(choice.method, choice.options, structure, model, sample=sample, progress=progress) as more:
        (plan,) = plan_budgets(
            profile, method=choice.method, keeps=[choice.keep], widths=[choice.width], **more, **choice.options
        )
    plan = of_first(request.here, plan)  # processors round differently: a tie could break in two ways
    for line in calibration_notes(plan, profile):
        progress.say(line)
    progress.say(f"{request.output}: {plan_line(plan, structure.topology.num_experts)}")
    return plan, model
