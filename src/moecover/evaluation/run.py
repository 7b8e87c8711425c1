"""Stage 5, evaluation: reads a model, plans of it and held-out text, gives perplexity, closeness and task scores.

The model is loaded once, in memory or layer by layer. A plan is emulated (`planning.masking`), bit for bit what its
checkpoint computes. The variants take turns on every batch of text, so that only one batch of reference logits is held;
layer by layer they share one read of the weights.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

from moecover.checkpoints.structure import Structure
from moecover.corpora.overlap import WORTH_SAYING, overlap
from moecover.corpora.packing import Corpus
from moecover.errors import InputError
from moecover.evaluation.artifact import FULL, Evaluation, Row
from moecover.evaluation.perplexity import text_result, window_sums
from moecover.evaluation.records import ModelRecord, PlanRecord, RanRecord, SkipRecord, TaskRecord, TextRecord
from moecover.evaluation.skipping import Skipping, skipping, with_skipping
from moecover.planning.artifact import Plan, kept_hash
from moecover.planning.fitting import check_plan
from moecover.planning.masking import masked_layers
from moecover.progress import Bar
from moecover.repairing.applied import LayerRepair, with_repairs
from moecover.runtime.running import Running, Within, running, unmasked
from moecover.verification.verify import plan_of
from moecover.version import library_versions

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from moecover.evaluation.tasks import Scored, Tasks

Variants = Mapping[str, Plan | None]  # by the name of their row; None for the model itself
Repairs = Mapping[str, Callable[[int], LayerRepair]]  # by the name of a plan's row: gives the repair of a MoE layer


def overlaps(text: Corpus, plans: Mapping[str, Plan], structure: Structure) -> dict[str, float]:
    """The share of a text that the calibration text holds too, for the rows where it is worth mentioning.

    Args:
        text: held-out text.
        plans: by the name of their row.
        structure: the checkpoint; a pruned one names the calibration text of its own plan.

    Returns:
        By row, see `corpora.overlap.overlap`.
    """
    made = {FULL: own.calibration} if (own := plan_of(structure.checkpoint)) is not None else {}
    by_row = {**made, **{name: plan.calibration for name, plan in plans.items()}}
    found = {
        name: overlap(text.tokens, text.mask, itertools.chain.from_iterable(c.values())) for name, c in by_row.items()
    }
    return {name: round(share, 4) for name, share in found.items() if share >= WORTH_SAYING}


def evaluate(
    structure: Structure,
    plans: Mapping[str, Plan],
    *,
    model: torch.nn.Module | Running,
    texts: Sequence[Corpus] = (),
    tasks: Tasks | None = None,
    full: bool = True,
    repairs: Repairs | None = None,
    skips: Mapping[str, Skipping] | None = None,
    batch_size: int = 1,
    bar: Bar | None = None,
) -> Evaluation:
    """Perplexity, closeness to the model itself, and task scores, of a model and of plans of it.

    Memory beside the model's own: the logits of two batches (``batch_size * length * vocabulary`` numbers of the
    model's dtype each), and float32 copies of 256 positions of them.

    Args:
        structure: the checkpoint.
        plans: by the name of their row.
        model: its model, from `load_model`, `opened` or `streamed`.
        texts: held-out text, from `load_windows`.
        tasks: from `task_loading.resolve`; None for none.
        full: evaluate the model itself too; without it nothing is compared with it.
        repairs: for repaired plans, what gives the repair of a MoE layer, see `repairing.layers.with_repairs`.
        skips: for plans whose tokens skip experts, the rule, see `skip_rules`.
        batch_size: sequences per forward pass.
        bar: makes a progress bar, see `progress.bar`.

    Returns:
        One row a variant, the model itself first, then the plans in order.

    Raises:
        InputError: a plan does not fit the model or has the name of the model's row, there is nothing to evaluate, or
            the model gives numbers that are not finite.
    """
    variants, rules = _variants(structure, plans, full=full), skips or {}
    runs = running(model, structure)
    within = [_within(runs, structure, plan, (repairs or {}).get(name)) for name, plan in variants.items()]
    within = [
        with_skipping(runs, structure, inside, rules[name]) if name in rules else inside
        for name, inside in zip(variants, within, strict=True)
    ]
    if tasks is not None:
        tasks.check(runs)
    close = full and len(variants) > 1
    sums = _sums_by_text(runs, within, texts, batch_size=batch_size, close=close, bar=bar)
    scored = _scored(runs, within, tasks, bar=bar)
    return Evaluation(
        model_record(
            structure, dtype=str(runs.dtype).removeprefix("torch."), device=str(runs.device), batch_size=batch_size
        ),
        {text.name: text_record(text, plans, structure) for text in texts},
        {} if tasks is None else task_records(tasks, plans, structure),
        [
            _row(structure, name, plan, number, sums, scored, close, rules[name].record if name in rules else None)
            for number, (name, plan) in enumerate(variants.items())
        ],
        {name: items for name, (_, items) in zip(variants, scored, strict=True) if items},
        {name: {text: found[n][:, :2] for text, found in sums.items()} for n, name in enumerate(variants)},
    )


def skip_rules(
    structure: Structure,
    plans: Mapping[str, Plan],
    *,
    model: torch.nn.Module | Running,
    corpora: Sequence[Corpus],
    batch_size: int,
) -> dict[str, Skipping]:
    """The rule by which tokens skip experts, for each of some plans: one pass of each over calibration text.

    Args:
        structure: the checkpoint.
        plans: by the name of their row.
        model: its model, as in `evaluate`.
        corpora: calibration text.
        batch_size: sequences per forward pass.

    Raises:
        InputError: a token goes to one expert only, or the experts of the family take no routing weights.
    """
    runs = running(model, structure)
    within = [_within(runs, structure, plan, None) for plan in plans.values()]
    return dict(zip(plans, skipping(runs, structure, within, corpora, batch_size=batch_size), strict=True))


def _variants(structure: Structure, plans: Mapping[str, Plan], *, full: bool) -> Variants:
    """What is evaluated, by the name of its row; refuses plans that do not fit."""
    if FULL in plans:
        raise InputError(f"a plan cannot be called {FULL!r}: that is the row of the model itself")
    for plan in plans.values():
        check_plan(plan, structure, other_weights=True, unequal=True)
    variants: Variants = {**({FULL: None} if full else {}), **plans}
    if not variants:
        raise InputError("nothing to evaluate: give a plan, or have the model itself evaluated")
    return variants


def _within(
    runs: Running, structure: Structure, plan: Plan | None, repair: Callable[[int], LayerRepair] | None
) -> Within:
    """The context in which a decoder layer computes what it does in the checkpoint of a plan."""
    within = unmasked if plan is None else masked_layers(runs.module, structure, plan)
    return within if repair is None else with_repairs(runs.module, structure, within, repair)


def _sums_by_text(
    runs: Running,
    within: Sequence[Within],
    texts: Sequence[Corpus],
    *,
    batch_size: int,
    close: bool,
    bar: Bar | None,
) -> dict[str, list[NDArray[np.float64]]]:
    """`window_sums` of every text."""
    total = -(-sum(text.num_tokens for text in texts) * len(within) // runs.world.size)
    found = {}
    with bar("measuring perplexity", total) if bar and texts else contextlib.nullcontext(_ignored) as advance:
        for text in texts:
            found[text.name] = window_sums(runs, within, text, batch_size=batch_size, advance=advance, close=close)
    return found


def _scored(runs: Running, within: Sequence[Within], tasks: Tasks | None, *, bar: Bar | None) -> list[Scored]:
    """Scores of all tasks and of every document, one a variant."""
    if tasks is None:
        return [({}, {})] * len(within)
    total = -(-tasks.num_requests * len(within) // runs.world.size) if bar else 0
    with bar("scoring tasks", total, unit="requests") if bar else contextlib.nullcontext(_ignored) as advance:
        return tasks.score(runs, within, advance=advance)


def _ignored(amount: int) -> None:
    """Progress, where no bar is shown."""


def _row(
    structure: Structure,
    name: str,
    plan: Plan | None,
    number: int,
    sums: Mapping[str, Sequence[NDArray[np.float64]]],
    scored: Sequence[Scored],
    close: bool,
    skip: SkipRecord | None,
) -> Row:
    """The row of the variant with a number; ``close`` where the sums compare plans with the model itself."""
    experts, compared = structure.topology.num_experts, close and plan is not None
    return Row(
        name,
        None if plan is None else plan_record(plan, skip),
        experts if plan is None else plan.keep,
        experts,
        structure.checkpoint.num_bytes if plan is None else structure.num_bytes(plan.kept, width=plan.width),
        {text: text_result(text, found[number], close=compared) for text, found in sums.items()},
        scored[number][0],
    )


def plan_record(plan: Plan, skip: SkipRecord | None = None) -> PlanRecord:
    """What an evaluation records of the plan of a row, and of the rule by which its tokens skip experts."""
    found: PlanRecord = {
        "method": plan.method,
        "options": plan.options,
        "keep": plan.keep,
        "fingerprint": kept_hash(plan),
    }
    if plan.width is not None:
        found["width"] = plan.width
    if plan.top_k is not None:
        found["top_k"] = plan.top_k
    if skip is not None:
        found["skip"] = skip
    return found


def text_record(text: Corpus, plans: Mapping[str, Plan], structure: Structure) -> TextRecord:
    """The record of a held-out text in evaluation.json."""
    how = {"length": text.tokens.shape[1], "bos": [], **text.record}
    record: TextRecord = {**how, "overlap": overlaps(text, plans, structure)}  # type: ignore[typeddict-item]
    return record


def task_records(tasks: Tasks, plans: Mapping[str, Plan], structure: Structure) -> dict[str, TaskRecord]:
    """The records of tasks that have run, in evaluation.json."""
    found = task_overlaps(tasks, plans, structure)
    return {name: {**record, "overlap": found[name]} for name, record in tasks.record.items()}


def task_overlaps(tasks: Tasks, plans: Mapping[str, Plan], structure: Structure) -> dict[str, dict[str, float]]:
    """By task, `overlaps` of what the model reads of its documents."""
    if not any(plan.calibration for plan in plans.values()) and plan_of(structure.checkpoint) is None:
        return {name: {} for name in tasks.parts}
    return {name: overlaps(text, plans, structure) for name, text in tasks.texts.items()}


def model_record(structure: Structure, *, dtype: str, device: str, **about: Unpack[RanRecord]) -> ModelRecord:
    """The record of the model in evaluation.json.

    Args:
        structure: the checkpoint.
        dtype: in which it ran.
        device: on which it ran.
        **about: how it ran.
    """
    import torch

    topology, checkpoint = structure.topology, structure.checkpoint
    return {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "fingerprint": structure.model_fingerprint,
        "family": topology.family,
        "dtype": dtype,
        "device": device,
        "num_bytes": checkpoint.num_bytes,
        "experts": topology.num_experts,
        "top_k": topology.top_k,
        "layers": len(topology.decoder_layers),
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        **about,
    }
