"""From a model to the best checkpoint of a size, as a job: every step is another stage's, and resumes as it does.

Reads a model and corpora as users give them; writes the checkpoint, and beside it a folder with what was made on the
way: own text, profile, plan, evaluation.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from moecover import rehearsal
from moecover.checkpoints.opening import Model, described, fetched
from moecover.corpora.loading import Corpora, parsed
from moecover.errors import InputError, MoecoverError
from moecover.files.locks import locked
from moecover.llama.library import load
from moecover.llama.opening import check_unused, opened_vocabulary
from moecover.planning.curve import AUTO
from moecover.progress import Progress, resolve
from moecover.pruning.writer import check_target
from moecover.repairing.job import check_kind
from moecover.repairing.store import kept_for_later
from moecover.runtime.distributed import joined, of_first, wait_for_all
from moecover.runtime.loadable import check_loadable
from moecover.runtime.options import RunOptions, check_known
from moecover.runtime.pass_state import remove
from moecover.runtime.passes import passes
from moecover.runtime.world import ALONE, World, check_alone, own_device
from moecover.shrinking.gguf import check_gguf, shrunk_gguf, steps_of_gguf
from moecover.shrinking.quality import DEFAULT, quality_of
from moecover.shrinking.request import Asked, Shrunk, memory_needed, shapes_of
from moecover.shrinking.stages import evaluation_of, plan_of, profile_of, repair_of, written
from moecover.shrinking.steps import WRITE, Step, steps_of, total_line
from moecover.shrinking.texts import KINDS, Texts, check_some, divided, length_of, named_corpora, own_corpora
from moecover.shrinking.work import check_claim, check_folder, claim
from moecover.verification.job import verify

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure
    from moecover.verification.verify import Verification

NONE = "none"
REPAIR = "repair"  # folder of the finished layers of a repair


def shrink(
    checkpoint: Model,
    /,
    output: str | Path,
    *,
    budget: float | str | None = None,
    max_size: int | str | None = None,
    shape: str = AUTO,
    multiple_of: int | None = None,
    corpora: Corpora | None = None,
    own_text: bool = True,
    repair: str | None = None,
    quality: str = DEFAULT,
    work: str | Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    command: str = "",
    libllama: str | Path | None = None,
    here: World = ALONE,
    progress: bool | Progress = True,
    **options: Unpack[RunOptions],
) -> Shrunk | list[Step]:
    """Make a model smaller by the best way that this package knows, with nothing else said than how small.

    The steps: the model writes text, which is divided into kinds; a profile of that and of the corpora; of the shapes
    of equal bytes the one that loses least on held-out text; a repair; the checkpoint; a proof; its perplexity on
    held-out text, on the model card. Every step resumes when the same call runs again. A GGUF file runs in llama.cpp,
    which writes no text and repairs nothing.

    Args:
        checkpoint: folder, hub id, GGUF file, or a structure from `read_structure`.
        output: folder to write, or file.
        budget: share of the experts' bytes that stays, as a fraction or a percentage; or give ``max_size``.
        max_size: of the checkpoint, in bytes or as text (``"12GB"``).
        shape: ``auto``, ``experts`` (whole ones) or ``KxW``.
        multiple_of: of ``auto`` and ``experts``, only shapes whose number of experts is a multiple of this.
        corpora: calibration text; None for WikiText2 and C4 from the hub, where that can be reached.
        own_text: also have the model write text; skipped where it only runs layer by layer.
        repair: ``refit``, ``ridge``, ``scale`` or ``none``, see `repair`; None for the one of ``quality``.
        quality: ``fast``, ``default`` or ``best``: how much text is read.
        work: folder for what is made on the way; None for one beside the output.
        dry_run: return the steps with their estimates, and make nothing.
        overwrite: replace an output that this program wrote.
        command: what the user typed, for the model card.
        libllama: shared library of llama.cpp, which runs GGUF files; None for the optional dependency's.
        here: this process among others under torchrun, which share the work and see the same ``work`` folder.
        progress: True draws bars and a log on stderr or in a notebook; False is silent.
        **options: see `RunOptions`.

    Raises:
        InputError: what any step refuses, before the first where it can be known then.
        MoecoverError: the disk is full, or the checkpoint does not equal the masked original.
    """
    shown, path = resolve(progress), Path(output)
    check_known(options, RunOptions)
    how, amount = passes(options), quality_of(quality)
    kind = amount.repair if repair is None else None if repair == NONE else repair
    if kind is not None:
        check_kind(kind)
    if corpora is not None:
        parsed(corpora)
    headers = described(checkpoint, revision=options.get("revision"), progress=shown)
    if headers.checkpoint.gguf is not None:
        check_alone(here, headers.checkpoint.name)
        check_gguf(headers, path, repair if repair != NONE else None, options, overwrite=overwrite)
        kind, own_text = None, False
    else:
        check_unused(libllama)
        check_loadable(headers, how.dtype)
        check_target(headers, path, overwrite=overwrite)
    place = path.with_name(f"{path.name}-work") if work is None else Path(work)
    asked = Asked(path, place, budget, max_size, shape, kind, amount, how, overwrite, command, here, multiple_of)
    files = headers.checkpoint.gguf
    source = headers.checkpoint.folder if files is None else files.first.path  # beside a file there may be anything
    check_folder(place, [path, *([] if source is None else [source])])
    shapes = shapes_of(headers, asked)
    extra = memory_needed(headers, asked, shapes)
    named, length, measured = len(parsed(corpora)) if corpora is not None else 2, length_of(headers), len(shapes) > 1
    if headers.checkpoint.gguf is not None:
        steps = steps_of_gguf(asked, corpora=named, length=length, measured=measured)
    else:
        kinds = KINDS if own_text else 0
        sizes = {"corpora": named, "kinds": kinds, "length": length}
        steps = steps_of(headers, amount, how, **sizes, measured=measured, repair=kind)
    if rehearsal.on():
        _check_ahead(headers, asked, corpora, quality, own_text=own_text, libllama=libllama, progress=shown)
        _rehearse(headers, path, steps)
    if dry_run:
        return steps
    for number, step in enumerate(steps, 1):
        shown.say(step.line(number, len(steps)))
    shown.say(total_line(steps))
    with joined(here, own_device(here, how.device)), contextlib.ExitStack() as locks:
        for one in (path, place) if here.rank == 0 else ():
            locks.enter_context(locked(one.resolve()))
        structure = fetched(headers, revision=options.get("revision"), progress=shown)
        if here.rank == 0:
            claim(place, structure, quality, own_text=own_text)
        wait_for_all(here)
        if structure.checkpoint.gguf is not None:
            device = options.get("device")
            return shrunk_gguf(structure, asked, corpora, libllama=libllama, device=device, progress=shown)
        texts = _texts(structure, asked, corpora, own_text, options, shown)
        return _made(structure, asked, texts, extra, shown)


def _check_ahead(
    headers: Structure,
    asked: Asked,
    corpora: Corpora | None,
    quality: str,
    *,
    own_text: bool,
    libllama: str | Path | None,
    progress: Progress,
) -> None:
    """Refuse in a dry run what is refused after its end; of a model of the hub what needs no file of it.

    Raises:
        InputError: another run writes, the folder is for something else, or text that cannot be read.
    """
    with locked(asked.output.resolve()), locked(asked.work.resolve()):
        if headers.checkpoint.folder is None and headers.checkpoint.gguf is None:
            return
        check_claim(asked.work, headers, quality, own_text=own_text)
        of_gguf = headers.checkpoint.gguf is not None
        with opened_vocabulary(headers, load(libllama)) if of_gguf else contextlib.nullcontext() as tokenizer:
            found = named_corpora(corpora, headers, asked.quality, tokenizer=tokenizer, progress=progress)
            if not own_text:
                check_some(found)
                divided(found, headers, asked.quality, tokenizer=tokenizer, progress=progress)


def _rehearse(headers: Structure, output: Path, steps: list[Step]) -> None:
    """End a dry run of the command with the steps."""
    rehearsal.ahead("read", headers.checkpoint.name, num_bytes=headers.checkpoint.num_bytes)
    for step in steps:
        if step.name == WRITE:
            rehearsal.ahead("write", output, seconds=step.seconds)
        else:
            rehearsal.ahead("run", step.name, tokens=step.tokens, seconds=step.seconds)
    rehearsal.stop()


def _texts(
    structure: Structure,
    asked: Asked,
    corpora: Corpora | None,
    own_text: bool,
    options: RunOptions,
    progress: Progress,
) -> Texts:
    """All text, the model's own included."""
    found = named_corpora(corpora, structure, asked.quality, progress=progress)
    if own_text:
        try:
            found += own_corpora(structure, asked.work, asked.quality, options, here=asked.here, progress=progress)
        except InputError as error:
            if not found:
                raise
            progress.say(f"note: no own text: {error}")
    check_some(found)
    return divided(found, structure, asked.quality, progress=progress)


def _made(structure: Structure, asked: Asked, texts: Texts, extra: int, progress: Progress) -> Shrunk:
    """The checkpoint from its text."""
    state = asked.of_budget / REPAIR
    with kept_for_later(state):
        with profile_of(structure, asked, texts, extra, progress) as (made, model):
            plan = plan_of(structure, asked, texts, made, model, progress)
            mended = repair_of(structure, asked, texts, plan, model, state, progress)
            evaluation = evaluation_of(structure, asked, texts, plan, mended, model, progress)
        pruned = written(structure, asked, plan, mended, evaluation, progress)
        if asked.here.rank == 0:
            remove(state)
    proof = of_first(asked.here, _proof(structure, asked, progress) if asked.here.rank == 0 else None)
    assert proof is not None
    if not proof.equal:
        raise MoecoverError(
            f"{asked.output} does not compute what the masked original computes, first difference at "
            f"{proof.first_difference}: please report this"
        )
    return Shrunk(pruned, evaluation, proof, asked.of_budget)


def _proof(structure: Structure, asked: Asked, progress: Progress) -> Verification:
    """The written checkpoint against the masked original."""
    return verify(
        structure,
        asked.output,
        dtype=asked.how.dtype,
        device=asked.how.device,
        device_map=asked.how.device_map,
        memory_limit=asked.how.memory_limit,
        progress=progress,
    )
