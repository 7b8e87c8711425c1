"""The stages of `shrink` on an opened model: each is another folder's work and resumes as it does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.budgets import measured_shape, of_shapes
from moecover.evaluation.run import evaluate
from moecover.planning.artifact import Plan
from moecover.planning.lines import calibration_notes
from moecover.planning.methods import default_method
from moecover.planning.run import plan_budgets
from moecover.profiling.folders import scratch_beside
from moecover.profiling.job import profiled
from moecover.pruning.request import Pruned
from moecover.pruning.writer import prune as write_checkpoint
from moecover.repairing.job import repaired
from moecover.runtime.distributed import of_first
from moecover.shrinking.request import Asked, shapes_of
from moecover.shrinking.work import EVALUATION, PLAN, PROFILE

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure
    from moecover.profiling.artifact import Profile
    from moecover.progress import Progress
    from moecover.repairing.artifact import Repaired
    from moecover.runtime.running import Running
    from moecover.shrinking.texts import Texts

ROW = "shrunk"


@contextlib.contextmanager
def profile_of(
    structure: Structure, asked: Asked, texts: Texts, extra: int, progress: Progress
) -> Iterator[tuple[Profile, Running]]:
    folder = asked.work / PROFILE
    with profiled(
        structure,
        texts.calibration,
        asked.how,
        folder=folder,
        scratch=scratch_beside(folder, "profile"),
        reuse=True,
        extra=extra,
        here=asked.here,
        progress=progress,
    ) as found:
        yield found


def plan_of(
    structure: Structure, asked: Asked, texts: Texts, profile: Profile, model: Running, progress: Progress
) -> Plan:
    """The plan, from its file where an earlier run has made it."""
    file, method = asked.of_budget / PLAN, default_method().name
    made = Plan.load(file) if asked.here.rank == 0 and file.is_file() else None
    fits = made is not None and made.profile_fingerprint == profile.fingerprint
    if (earlier := of_first(asked.here, made if fits else None)) is not None:
        progress.say(f"resuming: {file} is made")
        return earlier
    shapes = shapes_of(structure, asked)
    if len(shapes) > 1:
        size = asked.how.batch_size
        plan = measured_shape(profile, structure, shapes, texts.held_out, method, {}, model, size, progress)
    else:
        one = shapes[0]
        given = of_shapes(shapes, {}, structure)
        (plan,) = plan_budgets(profile, method=method, keeps=[one.keep], widths=[one.width], **given)
    plan = of_first(asked.here, plan)  # processors round differently: a tie could break in two ways
    if asked.here.rank == 0:
        plan.save(file)
    for line in calibration_notes(plan, profile, remedy=asked.quality.remedy):
        progress.say(line)
    return plan


def repair_of(
    structure: Structure, asked: Asked, texts: Texts, plan: Plan, model: Running, state: Path, progress: Progress
) -> Repaired | None:
    if asked.repair is None:
        return None
    return repaired(
        structure,
        plan,
        texts.calibration,
        asked.how,
        kind=asked.repair,
        tokens=min(asked.quality.repair_tokens, texts.tokens),
        folder=state,
        model=model,
        here=asked.here,
        progress=progress,
    )


def evaluation_of(
    structure: Structure,
    asked: Asked,
    texts: Texts,
    plan: Plan,
    mended: Repaired | None,
    model: Running,
    progress: Progress,
) -> Evaluation:
    """Rows of the model itself and of the checkpoint, on held-out text; saved."""
    found = evaluate(
        structure,
        {ROW: plan},
        model=model,
        texts=texts.held_out,
        repairs={ROW: mended.of_layer(structure, plan)} if mended is not None else None,
        batch_size=asked.how.batch_size,
        bar=progress.bar,
    )
    if mended is not None:
        rows = [
            replace(row, plan={**row.plan, "repair": mended.kind}) if row.plan is not None else row
            for row in found.rows
        ]
        found = replace(found, rows=rows)
    if asked.here.rank == 0:
        found.save(asked.of_budget / EVALUATION)
    return found


def written(
    structure: Structure, asked: Asked, plan: Plan, mended: Repaired | None, evaluation: Evaluation, progress: Progress
) -> Pruned:
    after = structure.num_bytes(plan.kept, width=plan.width)
    if asked.here.rank > 0:
        return Pruned(asked.output, plan, structure.topology, structure.checkpoint.num_bytes, after, mended)
    with progress.bar("writing", after, unit="bytes") as advance:
        path = write_checkpoint(
            structure,
            plan,
            asked.output,
            overwrite=asked.overwrite,
            repaired=mended,
            command=asked.command,
            evaluations={EVALUATION: evaluation},
            advance=advance,
            say=progress.say,
        )
    return Pruned(path, plan, structure.topology, structure.checkpoint.num_bytes, after, mended)
