"""Pruning as a job: reads a model as users give it, and a plan or calibration text; writes the checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast

from moecover import rehearsal
from moecover.checkpoints.opening import Model, described, fetched
from moecover.checkpoints.pieces import NOTHING
from moecover.checkpoints.stamps import changed_since
from moecover.checkpoints.structure import Structure
from moecover.corpora.options import JobOptions
from moecover.errors import InputError, arg
from moecover.files.atomic import resolved
from moecover.files.locks import locked
from moecover.merging.method import NONE
from moecover.planning.artifact import Plan, with_top_k
from moecover.planning.fitting import NO_REPAIR, check_plan, check_top_k
from moecover.planning.methods import default_method
from moecover.progress import Progress, resolve
from moecover.pruning.choosing import ChoiceOptions, choice_of
from moecover.pruning.formats import output_of, write
from moecover.pruning.other_files import check_settings
from moecover.pruning.request import Choice, Pruned, Repair, Request, WriteOptions
from moecover.pruning.writer import check_mtp
from moecover.registry import unknown_name
from moecover.runtime.distributed import joined, wait_for_all
from moecover.runtime.options import check_known
from moecover.runtime.world import ALONE, World, check_alone, own_device

if TYPE_CHECKING:
    from moecover.corpora.loading import Corpora
    from moecover.repairing.artifact import Repaired
    from moecover.runtime.passes import Passes


DISK = 5e8  # bytes per second that writing a checkpoint is taken to reach


class PruneOptions(JobOptions, ChoiceOptions, WriteOptions, total=False):
    """Keyword arguments of `prune`: how the model runs, how much text is read, how one shot chooses and writes."""


def prune(
    checkpoint: Model,
    /,
    plan: Plan | str | Path | None = None,
    output: str | Path | None = None,
    *,
    corpora: Corpora | None = None,
    merge: str | None = None,
    repair: str | None = None,
    repair_tokens: int | None = None,
    repaired: Repaired | None = None,
    top_k: int | None = None,
    here: World = ALONE,
    progress: bool | Progress = True,
    **options: Unpack[PruneOptions],
) -> Pruned:
    """Write the pruned checkpoint, from a plan or in one shot from calibration text.

    The folder appears only when it is complete. After an error or an interrupt, the same call resumes.

    Args:
        checkpoint: folder, hub id, GGUF file, or a structure from `read_structure`.
        plan: from `plan`, or its file; None for one shot.
        output: folder to write; of a GGUF file the file, of a split one its first part.
        corpora: calibration text, as in `profile`: for one shot, and for ``merge`` and ``repair``.
        merge: name in `MERGES`: merge the experts that are dropped into those that stay; None removes them.
        repair: ``scale`` or ``ridge``: refit the down projections of what stays on ``corpora``; None for none.
        repair_tokens: calibration tokens of merge and repair; None for 65,536.
        repaired: a repair from `repair`, instead of ``merge`` and ``repair``.
        top_k: experts that a token is sent to from now on, fewer than before: a number in config.json; None leaves it.
        here: this process among others under torchrun, which share profile and repair; the first one writes.
        progress: True draws bars and a log on stderr or in a notebook; False is silent.
        **options: see `RunOptions`, `TextOptions`, `ChoiceOptions` (one shot) and `WriteOptions`.

    Returns:
        The folder, as an object that says what was written.

    Raises:
        InputError: the plan does not fit, the output exists, or arguments that contradict each other.
        MoecoverError: the disk is full, or a file cannot be read or written.
    """
    check_known(options, PruneOptions)
    shown = resolve(progress)
    given = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
    if given is not None:
        given = with_top_k(given, top_k)
    if output is None:
        raise InputError(f"give {arg('output')}, the folder or file to write")
    asked = _asked(merge, repair, repair_tokens, corpora)
    if asked is not None and repaired is not None:
        raise InputError(f"give {arg('repair' if merge is None else 'merge')} or {arg('repaired')}, not both")
    if (fewer := given.top_k if given is not None else top_k) is not None and (asked or repaired) is not None:
        raise InputError(f"{arg('top_k', fewer)}: {NO_REPAIR}")
    _check_used(given, corpora, asked, repair_tokens, options)
    if given is None and corpora is None:
        raise InputError(f"give a plan, or {arg('corpora')} with {arg('keep')} or {arg('retain')} for one shot")
    how = _how(options, repair_tokens) if given is None or asked is not None else None
    if given is None:
        check_choice(checkpoint, Path(output), corpora or (), options)
    headers = described(checkpoint, revision=options.get("revision"), progress=shown)
    if how is not None:
        from moecover.runtime.loadable import check_loadable

        check_loadable(headers, how.dtype)
    if top_k is not None:
        check_top_k(headers, top_k)
    choice = choice_of(headers, options, say=shown.say) if given is None else given
    writing = cast("WriteOptions", {k: v for k, v in options.items() if k in WriteOptions.__annotations__})
    text = corpora if how is not None else None
    request = Request(Path(output), choice, text, options, asked or repaired, how, writing, top_k, here)
    return carry_out(headers, request, progress=shown)


def _how(options: PruneOptions, repair_tokens: int | None) -> Passes:
    """How the model runs, checked. Imports here: pruning by a plan runs no model, and starts quickly."""
    from moecover.runtime.passes import check_least, passes

    check_least(1, sequences=options.get("sequences"), length=options.get("length"), repair_tokens=repair_tokens)
    check_least(1, keep_inputs=options.get("keep_inputs"))
    return passes(options)


def carry_out(headers: Structure, request: Request, *, progress: Progress) -> Pruned:
    """Fetch, make what is asked for from text, and write, while no other run can write the output.

    Args:
        headers: structure of the model; its files may still be on the hub.
        request: what is asked for.
        progress: shows the stages.

    Raises:
        InputError: what the stages raise.
        MoecoverError: the disk is full, or a file cannot be read or written.
    """
    here = request.here
    if request.how is None:
        check_alone(here, "prune by a plan, without a repair,")
        making = contextlib.nullcontext((cast("Plan", request.choice), cast("Repaired | None", request.repair)))
        with _fetched(headers, request, progress) as structure, making as (plan, made):
            return _written(structure, plan, request, made, progress)
    from moecover.pruning.one_shot import made_from_text, memory_needed

    if isinstance(request.choice, Choice) and request.choice.search_tokens is not None:
        check_alone(here, arg("keep_inputs"))
    extra = memory_needed(headers, request)
    _rehearse(headers, request)
    with joined(here, own_device(here, request.how.device)), _fetched(headers, request, progress) as structure:
        mtp = request.writing.get("mtp", "drop")
        check_mtp(structure, request.choice.width, mtp)
        check_settings(structure, request.choice, mtp=mtp)
        with made_from_text(structure, request, extra=extra, progress=progress) as (plan, made):
            found = _written(structure, plan, request, made, progress)
            wait_for_all(here)
            return found


def _rehearse(headers: Structure, request: Request) -> None:
    """Note what is made from text: the checkpoint, and beside it the profile where that is saved."""
    if not rehearsal.on():
        return
    choice = request.choice
    kept = choice.kept if isinstance(choice, Plan) else choice.keep
    size = headers.num_bytes(kept, width=choice.width, mtp=request.writing.get("mtp", "drop"))
    rehearsal.ahead("write", request.output, num_bytes=size, seconds=size / DISK)
    if isinstance(choice, Choice) and choice.profile_folder is not None:
        rehearsal.ahead("write", choice.profile_folder)


@contextlib.contextmanager
def _fetched(headers: Structure, request: Request, progress: Progress) -> Iterator[Structure]:
    """The checkpoint's files on this machine, which a plan fits, while the output is locked."""
    output = output_of(headers, request.output, overwrite=request.writing.get("overwrite", False))
    with locked(output) if request.here.rank == 0 else contextlib.nullcontext():
        structure = fetched(headers, revision=request.text.get("revision"), progress=progress)
        if isinstance(request.choice, Plan):
            check_plan(request.choice, structure, other_weights=request.writing.get("other_weights", False))
        yield structure


def _written(structure: Structure, plan: Plan, request: Request, made: Repaired | None, progress: Progress) -> Pruned:
    """The checkpoint, written under a bar."""
    from moecover.planning.lines import unused_line

    plan = with_top_k(plan, request.top_k)
    if note := changed_since(structure, plan.weight_files):
        progress.say(f"note: {note}")
    if request.how is None and (line := unused_line(plan, structure.topology.num_experts)):
        progress.say(line)  # in one shot the profile has said it
    before = structure.checkpoint.num_bytes
    after = structure.num_bytes(plan.kept, width=plan.width, mtp=request.writing.get("mtp", "drop"))
    if request.here.rank > 0:
        return Pruned(request.output, plan, structure.topology, before, after, made)
    rehearsal.ahead("read", structure.checkpoint.name, num_bytes=before)
    rehearsal.ahead("write", request.output, num_bytes=after, seconds=after / DISK)
    rehearsal.stop()
    with progress.bar("writing", after, unit="bytes") as advance:
        path = write(
            structure, plan, request.output, repaired=made, advance=advance, say=progress.say, **request.writing
        )
    return Pruned(path, plan, structure.topology, before, after, made)


def _check_used(
    plan: Plan | None,
    corpora: Corpora | None,
    asked: Repair | None,
    repair_tokens: int | None,
    options: PruneOptions,
) -> None:
    """Refuse arguments that nothing would look at.

    Raises:
        InputError: names the argument.
    """
    given = {name for name, value in options.items() if value is not None and value is not False and value != {}}
    if repair_tokens is not None and asked is None:
        raise InputError(
            f"{arg('repair_tokens')} says what merge and repair run on: give {arg('merge')} or {arg('repair')}"
        )
    if plan is None:
        if stray := sorted(given & {"other_weights", "evaluations"}):
            raise InputError(f"{arg(stray[0])} goes with a plan: in one shot the plan is made here")
        return
    if stray := sorted(given & ChoiceOptions.__annotations__.keys()):
        raise InputError(f"a plan and {arg(stray[0])} exclude each other: the plan says what is kept")
    unread = sorted(given & (JobOptions.__annotations__.keys() - {"revision"}))
    if asked is None and (corpora is not None or unread):
        name, none = "corpora" if corpora is not None else unread[0], f"{arg('merge')} or {arg('repair')}"
        raise InputError(f"{arg(name)} has no use here: pruning by a plan without {none} runs no model")


def _asked(merge: str | None, repair: str | None, repair_tokens: int | None, corpora: Corpora | None) -> Repair | None:
    """The merge and the repair that are asked for; None for neither.

    Raises:
        InputError: an unknown one, or no text for it.
    """
    merge, repair = (None if one == NONE else one for one in (merge, repair))
    if repair is None and merge is None:
        return None
    from moecover.repairing.job import check_kind

    if repair is not None:
        check_kind(repair)
    if merge is not None:
        check_kind(NONE, merge)
    if corpora is None:
        given = arg("merge", merge) if repair is None else arg("repair", repair)
        raise InputError(f"{given} fits weights on calibration text: give {arg('corpora')}")
    return Repair(repair or NONE, repair_tokens, merge or NONE)


def check_choice(model: Model, output: Path, corpora: Corpora, options: ChoiceOptions | PruneOptions) -> None:
    """Refuse what one shot cannot do, before anything is read.

    Raises:
        InputError: an unknown method, option or corpus, or a folder for the profile that lies in the output or model.
    """
    from moecover.corpora.loading import parsed
    from moecover.planning.job import ROUND_OPTIONS
    from moecover.planning.run import check_options

    given = options.get("method_options", NOTHING)
    method = options.get("method") or default_method().name
    check_options(method, {key: value for key, value in given.items() if key not in ROUND_OPTIONS})
    from moecover.planning.methods import METHODS

    if METHODS[method].unequal:
        raise InputError(
            f"{arg('method', method)} keeps different numbers of experts by layer, which no checkpoint can have: it is "
            "for `plan` and `evaluate`, or `compare`"
        )
    searches, saved = METHODS[method].runs_experts, options.get("save_profile") is not None
    if options.get("keep_inputs") is not None and not (searches or saved):
        raise InputError(
            f"{arg('keep_inputs')} has no use here: method {method} runs no experts and the profile is not saved. Give "
            f"{arg('save_profile')}"
        )
    names = parsed(corpora)
    if unknown := sorted(dict(given.get("weights") or {}).keys() - names.keys()):
        raise unknown_name(f"corpus in {arg('weights')}", unknown[0], names)
    if (save_profile := options.get("save_profile")) is None:
        return
    from moecover.profiling.folders import check_output as check_profile_folder
    from moecover.profiling.reuse import check_reusable

    check_profile_folder(Path(save_profile), overwrite=True)
    if not options.get("overwrite", False):
        check_reusable(Path(save_profile), list(names))
    folder = resolved(save_profile)
    source = model.checkpoint.name if isinstance(model, Structure) else model
    for other in (resolved(output), resolved(source)):
        if folder == other or other in folder.parents:
            raise InputError(f"{arg('save_profile', save_profile)} lies in {other}. Choose another folder")
