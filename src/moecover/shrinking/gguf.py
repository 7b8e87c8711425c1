"""`shrink` on a GGUF file: the same steps in llama.cpp, without what only transformers does (own text, repair)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.corpora.loading import Corpora
from moecover.errors import InputError, MoecoverError, arg
from moecover.evaluation.artifact import FULL, Evaluation
from moecover.evaluation.budgets import of_shapes
from moecover.evaluation.gguf import Variant, evaluate_gguf
from moecover.evaluation.shape_search import best_shape
from moecover.llama.opening import check_options, opened_gguf
from moecover.planning.artifact import Plan
from moecover.planning.lines import calibration_notes
from moecover.planning.methods import default_method
from moecover.planning.run import plan_budgets
from moecover.profiling.artifact import FILE, Profile
from moecover.profiling.folders import scratch_beside
from moecover.profiling.gguf import profile_gguf
from moecover.pruning.gguf_writer import check_replaceable, gguf_target, prune_gguf
from moecover.pruning.request import Pruned
from moecover.runtime.pass_state import kept_for_later, remove
from moecover.shrinking.request import Asked, Shrunk, shapes_of
from moecover.shrinking.stages import ROW
from moecover.shrinking.steps import WRITE, Step
from moecover.shrinking.texts import Texts, check_some, divided, named_corpora
from moecover.shrinking.work import EVALUATION, PLAN, PROFILE
from moecover.verification.gguf import verify_gguf

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure
    from moecover.corpora.packing import Corpus
    from moecover.llama.model import Model
    from moecover.planning.shapes import Shape
    from moecover.progress import Progress


def check_gguf(
    headers: Structure, output: Path, repair: str | None, options: Mapping[str, object], *, overwrite: bool
) -> None:
    """Refuse what is done to a checkpoint alone, and an output that cannot be written.

    Args:
        headers: the file.
        output: to be written.
        repair: kind that was asked for; None for none.
        options: see `RunOptions`.
        overwrite: replace a file that this program wrote.

    Raises:
        InputError: names the argument, or the file.
    """
    check_options(options)
    if repair is not None:
        raise InputError(
            f"{arg('repair', repair)} has no use here: a GGUF file is cut as it is stored. Shrink the original, then "
            "convert the result"
        )
    first = gguf_target(headers, output)
    check_replaceable(first, [first.name], overwrite=overwrite)


def steps_of_gguf(asked: Asked, *, corpora: int, length: int, measured: bool) -> list[Step]:
    """The steps, in order; how long llama.cpp takes is not estimated."""
    text, held_out = corpora * asked.quality.blocks * length, corpora * asked.quality.windows * length
    named = [("profile", text), *([("measure shapes", held_out)] if measured else []), ("evaluate", held_out)]
    return [*(Step(name, tokens, None) for name, tokens in named), Step(WRITE, 0, None), Step("verify", 0, None)]


def shrunk_gguf(
    structure: Structure,
    asked: Asked,
    corpora: Corpora | None,
    *,
    libllama: str | Path | None,
    device: str | None,
    progress: Progress,
) -> Shrunk:
    """The pruned file, from text; every step resumes when the same call runs again.

    Args:
        structure: the file.
        asked: what is asked for.
        corpora: calibration text; None for WikiText2 and C4 from the hub.
        libllama: the library; None for the optional dependency's.
        device: None, auto or cpu.
        progress: shows the steps.

    Raises:
        InputError: there is no library or no text, or what a step refuses.
        MoecoverError: the disk is full, llama.cpp gives up, or the file does not equal the masked original.
    """
    with opened_gguf(structure, libllama=libllama, device=device, progress=progress) as (model, tokenizer):
        named = named_corpora(corpora, structure, asked.quality, tokenizer=tokenizer, progress=progress)
        check_some(named)
        texts = divided(named, structure, asked.quality, tokenizer=tokenizer, progress=progress)
        made = _profile(structure, asked, texts, model, progress)
        plan = _plan(structure, asked, texts, made, model, progress)
        evaluation = _evaluated(structure, {ROW: plan}, texts.held_out, model, progress)
    evaluation.save(asked.of_budget / EVALUATION)
    after = structure.num_bytes(plan.kept, width=plan.width)
    with progress.bar("writing", after, unit="bytes") as advance:
        path = prune_gguf(
            structure,
            plan,
            asked.output,
            overwrite=asked.overwrite,
            evaluations={EVALUATION: evaluation},
            command=asked.command,
            advance=advance,
            say=progress.say,
        )
    with progress.spinner("comparing the files"):
        proof = verify_gguf(structure, path, libllama=libllama, on_cpu=device == "cpu")
    if not proof.equal:
        raise MoecoverError(f"{path} does not equal the masked original: {proof.summary()}: please report this")
    pruned = Pruned(path, plan, structure.topology, structure.checkpoint.num_bytes, after, None)
    return Shrunk(pruned, evaluation, proof, asked.of_budget)


def _profile(structure: Structure, asked: Asked, texts: Texts, model: Model, progress: Progress) -> Profile:
    """The profile, from its folder where an earlier run has made it of the same text."""
    folder = asked.work / PROFILE
    records = {corpus.name: [corpus.record] for corpus in texts.calibration}
    if (folder / FILE).is_file():
        earlier = Profile.load(folder)
        if earlier.corpora == records and earlier.model["fingerprint"] == structure.model_fingerprint:
            progress.say(f"resuming: the profile in {folder} is done")
            return earlier
    state, total = scratch_beside(folder, "profile"), sum(corpus.num_tokens for corpus in texts.calibration)
    with kept_for_later(state), progress.bar("profiling", total) as advance:
        made = profile_gguf(
            structure,
            texts.calibration,
            model=model,
            batch_size=asked.how.batch_size,
            state=state,
            advance=advance,
            say=progress.say,
        )
        made.save(folder)
        remove(state)
    return made


def _plan(structure: Structure, asked: Asked, texts: Texts, profile: Profile, model: Model, progress: Progress) -> Plan:
    """The plan, in the shape that loses least on held-out text where several are within the budget."""
    file, method = asked.of_budget / PLAN, default_method().name
    if file.is_file():
        earlier = Plan.load(file)
        if earlier.profile_fingerprint == profile.fingerprint:
            progress.say(f"resuming: {file} is made")
            return earlier
    shapes = shapes_of(structure, asked)

    def make(some: list[Shape]) -> list[Plan]:
        given = of_shapes(some, {}, structure)
        keeps, widths = [one.keep for one in some], [one.width for one in some]
        return plan_budgets(profile, method=method, keeps=keeps, widths=widths, **given)

    def measure(plans: dict[str, Plan], full: bool) -> Evaluation:
        del full  # the model itself is the first row always
        return _evaluated(structure, plans, texts.held_out, model, progress)

    if len(shapes) > 1:
        plan = best_shape(structure, shapes, make, measure, texts=texts.held_out, say=progress.say)
    else:
        (plan,) = make(shapes)
    plan.save(file)
    for line in calibration_notes(plan, profile, remedy=asked.quality.remedy):
        progress.say(line)
    return plan


def _evaluated(
    structure: Structure, plans: dict[str, Plan], texts: list[Corpus], model: Model, progress: Progress
) -> Evaluation:
    """Rows of the model itself and of plans, emulated."""
    import torch

    variants = [Variant(FULL, structure, model)]
    variants += [Variant(name, structure, model, mask=plan, plan=plan) for name, plan in plans.items()]
    return evaluate_gguf(variants, texts, plans=plans, threads=torch.get_num_threads(), bar=progress.bar)
