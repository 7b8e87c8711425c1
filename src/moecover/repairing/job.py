"""A repair as a job: reads a model, a plan and calibration text as users give them, opens the model as it fits."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from moecover.checkpoints.opening import Model, described, fetched
from moecover.checkpoints.structure import Structure
from moecover.corpora.loading import Corpora, load_corpora, parsed
from moecover.corpora.options import JobOptions
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.merging.method import NONE
from moecover.merging.methods import merge_of
from moecover.planning.artifact import Plan
from moecover.planning.fitting import check_plan
from moecover.profiling.layer_inputs import sample_of
from moecover.progress import Progress, resolve
from moecover.repairing.artifact import Repaired
from moecover.repairing.memory import TOKENS, needed_bytes
from moecover.repairing.merged import check_merged
from moecover.repairing.solver import KINDS
from moecover.repairing.store import kept_for_later
from moecover.repairing.store import repair as repair_to_files
from moecover.repairing.targets import check_dtype, check_stored, check_understood, places_on_disk
from moecover.runtime.loadable import check_loadable
from moecover.runtime.memory import opened
from moecover.runtime.options import check_known, check_live
from moecover.runtime.passes import Passes, check_least, passes
from moecover.runtime.running import Running, running
from moecover.runtime.world import ALONE, World, own_device

if TYPE_CHECKING:
    import torch


def check_kind(kind: str, merge: str = NONE) -> None:
    """Refuse an unknown kind of repair, or an unknown merge.

    Raises:
        InputError: says which are known.
    """
    found = merge_of(merge)
    if kind not in KINDS and (found is None or kind != NONE):
        raise InputError(f"unknown {arg('kind', kind)}. Allowed: {', '.join(KINDS)}")


def memory_beside(
    structure: Structure,
    *,
    kind: str,
    merge: str = NONE,
    keep: int,
    width: int | None,
    tokens: int | None,
    dtype: str,
) -> int:
    """Bytes that merge and repair of the largest layer need beside the model.

    Args:
        structure: the checkpoint; headers are enough.
        kind: of the repair, or ``none``.
        merge: name of the merge, or ``none``.
        keep: experts kept per layer.
        width: channels kept of each; None for all.
        tokens: calibration tokens; None for 65,536.
        dtype: of the model, by name.

    Raises:
        InputError: the model cannot be repaired, or not in this dtype.
    """
    check_stored(structure)
    where = places_on_disk(structure, width)
    check_dtype(structure, where, dtype)
    check_understood(structure, where, kind)
    check_merged(structure, where, merge_of(merge))
    if merge != NONE and keep == structure.topology.num_experts:
        raise InputError(f"{arg('merge', merge)} has no use here: no expert is dropped. Keep fewer, or leave it out")
    return needed_bytes(structure, where, kind=kind, merge=merge, keep=keep, tokens=tokens or TOKENS, dtype=dtype)


def _opened(
    structure: Structure, corpora: Sequence[Corpus], how: Passes, extra: int, here: World, progress: Progress
) -> contextlib.AbstractContextManager[Running]:
    """The model, with room for the repair of a layer beside it."""
    return opened(
        structure,
        tokens=-(-sum(c.num_tokens for c in corpora) // here.size),
        batch_tokens=how.batch_size * max(c.tokens.shape[1] for c in corpora),
        dtype=how.dtype,
        device=own_device(here, how.device),
        device_map=how.device_map,
        memory_limit=how.memory_limit,
        extra=extra,
        here=here,
        say=progress.say,
    )


def repaired(
    structure: Structure,
    plan: Plan,
    corpora: Sequence[Corpus],
    how: Passes,
    *,
    kind: str,
    merge: str = NONE,
    tokens: int | None,
    folder: Path,
    model: Running | None = None,
    here: World = ALONE,
    progress: Progress,
) -> Repaired:
    """Repair a plan's kept experts; finished layers are saved in ``folder``, from which an interrupted run resumes.

    Args:
        structure: the checkpoint, its files on this machine.
        plan: which experts stay.
        corpora: calibration text; the first sequences of each are used.
        how: see `Passes`.
        kind: see `solver.KINDS`; ``none`` for a merge alone.
        merge: name in `MERGES`, or ``none``.
        tokens: of all corpora together; None for 65,536.
        folder: for the finished layers; the caller removes it.
        model: the model where it is open already.
        here: this process among those that share the text; the first one has the files.
        progress: shows the repair.

    Raises:
        InputError: the model does not fit or cannot be repaired.
        MoecoverError: the disk is full.
    """
    sample = sample_of(corpora, tokens or TOKENS, argument="repair_tokens")
    shared = -(-(tokens or TOKENS) // here.size)
    extra = memory_beside(
        structure, kind=kind, merge=merge, keep=plan.keep, width=plan.width, tokens=shared, dtype=how.dtype
    )
    opening: contextlib.AbstractContextManager[Running] = contextlib.nullcontext(model)  # type: ignore[arg-type]
    if model is None:
        opening = _opened(structure, sample, how, extra, here, progress)
    with progress.bar("merging" if kind == NONE else "repairing", len(plan.layers), unit="layers") as advance:
        return repair_to_files(
            structure,
            plan,
            sample,
            model=opening,
            kind=kind,
            merge=merge,
            folder=folder,
            batch_size=how.batch_size,
            dtype=how.dtype,
            device=how.device,
            here=here,
            advance=advance,
            say=progress.say,
        )


def repair(
    checkpoint: Model,
    /,
    plan: Plan | str | Path,
    corpora: Corpora,
    *,
    kind: str = "ridge",
    merge: str = NONE,
    tokens: int | None = None,
    folder: str | Path | None = None,
    model: torch.nn.Module | Running | None = None,
    other_weights: bool = False,
    progress: bool | Progress = True,
    **options: Unpack[JobOptions],
) -> Repaired:
    """Refit the experts that stay on calibration text, layer by layer.

    Args:
        checkpoint: folder, hub id, or a structure from `read_structure`.
        plan: from `plan`, or its file.
        corpora: calibration text, as in `profile`.
        kind: ``scale`` (a factor per expert), ``ridge`` (all weights of the down projections) or ``refit`` (ridge, then
            all parameters of the block by gradient steps on its own error); ``none`` for a merge alone.
        merge: name in `MERGES`: the experts that are dropped are merged into those that stay, before the repair;
            ``none`` removes them.
        tokens: calibration tokens, shared by the corpora; None for 65,536.
        folder: where finished layers are kept, so that an interrupted repair resumes; None for a temporary folder that
            lasts as long as the result.
        model: the live model from `load_model`; None opens it, layer by layer where it does not fit.
        other_weights: accept a plan made on other weights of the same shape.
        progress: True draws bars and a log on stderr or in a notebook; False is silent.
        **options: see `RunOptions` (batch size 4 by default) and `TextOptions`.

    Returns:
        The repair, to be given to `prune` as ``repaired=`` with the same plan.

    Raises:
        InputError: the plan does not fit, the model cannot be repaired, or arguments out of range.
        MoecoverError: the disk is full.
    """
    check_kind(kind, merge)
    check_known(options, JobOptions)
    check_least(1, tokens=tokens, sequences=options.get("sequences"), length=options.get("length"))
    how, shown = passes(options), resolve(progress)
    parsed(corpora)
    check_live(model, options)
    chosen = plan if isinstance(plan, Plan) else Plan.load(plan)
    headers = described(checkpoint, revision=options.get("revision"), progress=shown)
    check_stored(headers)
    check_loadable(headers, how.dtype)
    check_plan(chosen, headers, other_weights=other_weights)
    structure = fetched(headers, revision=options.get("revision"), progress=shown)
    loaded = load_corpora(corpora, structure, options, progress=shown)
    place = Path(tempfile.mkdtemp(prefix="moecover-repair-")) if folder is None else Path(folder)
    live = None if model is None else running(model, structure)
    with kept_for_later(place):
        made = repaired(
            structure,
            chosen,
            loaded,
            how,
            kind=kind,
            merge=merge,
            tokens=tokens,
            folder=place,
            model=live,
            progress=shown,
        )
    if folder is None:
        weakref.finalize(made, shutil.rmtree, place, ignore_errors=True)
    return made
