"""Stage 5, evaluation: reads a live model, plans and held-out text, gives every plan's perplexity and closeness, and tasks.

The model is there once, in memory or layer by layer. A plan is emulated (`masking`), bit for bit what the checkpoint that it
leaves computes. The plans take turns on every batch of text, so what they are compared with is one batch's logits; layer by
layer they share one read of the weights.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.checkpoints.structure import Structure
from moecover.corpora.batches import batches
from moecover.corpora.overlap import WORTH_SAYING, overlap
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, MoecoverError
from moecover.evaluation.artifact import FULL, Evaluation, Row, TextResult
from moecover.planning.artifact import Plan, check_plan, kept_hash
from moecover.planning.masking import masked_layers
from moecover.progress import Bar
from moecover.repairing.layers import LayerRepair, with_repairs
from moecover.runtime.running import InMemory, Running, Within, running, unmasked
from moecover.verification.verify import plan_of

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

POSITIONS = 256  # logits of so many positions at a time are looked at in float32


def score(logits: torch.Tensor, inputs: Mapping[str, torch.Tensor], reference: torch.Tensor | None = None) -> NDArray[np.float64]:  # fmt: skip
    """How well logits predict the tokens of their own text, and how near they are to others.

    Every token but the first of its sequence is predicted from those before it; padding is not scored. Probabilities are
    computed in float32 and summed in float64.

    Args:
        logits: [sequence, position, vocabulary].
        inputs: ``input_ids`` and, where there is padding, ``attention_mask``: [sequence, position].
        reference: logits of another model on the same inputs.

    Returns:
        float64 [sequence, 4]: summed negative log-likelihood in nats, scored tokens, summed KL(reference || logits) in nats,
        tokens that both find the most likely; the last two 0 without a reference.
    """
    import torch

    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    scored = mask[:, 1:] & mask[:, :-1]
    sums = torch.zeros(len(ids), 4, dtype=torch.float64)
    for row in range(len(ids)):
        for start in range(0, ids.shape[1] - 1, POSITIONS):
            part = slice(start, min(start + POSITIONS, ids.shape[1] - 1))
            here = scored[row, part]
            found = logits[row, part][here].float().log_softmax(-1)
            target = ids[row, part.start + 1 : part.stop + 1][here]
            sums[row, 0] -= found.gather(-1, target[:, None]).double().sum().cpu()
            sums[row, 1] += len(target)
            if reference is not None:
                other = reference[row, part][here].float().log_softmax(-1)
                sums[row, 2] += (other.exp() * (other - found)).sum(-1).double().sum().cpu()
                sums[row, 3] += (other.argmax(-1) == found.argmax(-1)).sum().cpu()
    return sums.numpy()


def perplexity(
    model: torch.nn.Module | Running,
    corpus: Corpus,
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda tokens: None,
) -> float:
    """Perplexity of a causal language model: exp of the mean negative log-likelihood per predicted token, see `score`.

    Args:
        model: from `load_model`, possibly within `masked`, or from `streamed`.
        corpus: held-out sequences.
        batch_size: sequences per forward pass.
        advance: called with the tokens of every finished batch.

    Raises:
        InputError: there is no token to predict.
    """
    import torch

    runs = InMemory(model, ()) if isinstance(model, torch.nn.Module) else model
    (sums,) = _sums(runs, [unmasked], corpus, batch_size, advance)
    return _result(corpus.name, sums, close=False).perplexity


def _sums(
    model: Running,
    variants: Sequence[Within],
    corpus: Corpus,
    batch_size: int,
    advance: Callable[[int], None],
    *,
    close: bool = False,
) -> list[NDArray[np.float64]]:
    """`score` of every variant, float64 [window, 4]; with ``close`` against the first of them."""
    reference: list[torch.Tensor] = []

    def run(number: int, inputs: dict[str, torch.Tensor]) -> NDArray[np.float64]:
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        logits = model.module(**inputs, use_cache=False).logits
        if number == 0:
            reference[:] = [logits] if close else []
        found = score(logits, inputs, reference[0] if close and number else None)
        advance(int(inputs.get("attention_mask", inputs["input_ids"] * 0 + 1).sum()))
        return found

    calls, within = list[Callable[[], Any]](), list[Within]()
    for inputs in batches(corpus, batch_size):
        for number, variant in enumerate(variants):
            calls.append(functools.partial(run, number, inputs))
            within.append(variant)
    found = model.run(calls, within=within)
    return [np.concatenate(found[number :: len(variants)]) for number in range(len(variants))]


def _nothing(amount: int) -> None:
    """What is advanced where no bar is shown."""


def _result(name: str, sums: NDArray[np.float64], *, close: bool) -> TextResult:
    total, tokens, kl, agreed = (math.fsum(column) for column in sums.T)
    if tokens == 0:
        raise InputError(f"corpus {name}: no token to predict, sequences of at least two tokens are needed")
    mean = total / tokens
    if not math.isfinite(mean):
        raise MoecoverError(f"corpus {name}: the mean negative log-likelihood is {mean}. Evaluate with another --dtype")
    return TextResult(
        math.exp(mean), mean, int(tokens), len(sums), kl / tokens if close else None, agreed / tokens if close else None
    )


def _plan_record(plan: Plan) -> dict[str, Any]:
    return {"method": plan.method, "options": plan.options, "keep": plan.keep, "fingerprint": kept_hash(plan)}


def overlaps(text: Corpus, plans: Mapping[str, Plan], structure: Structure) -> dict[str, float]:
    """The share of a text that calibration text holds too, where that is worth saying.

    Args:
        text: what is measured on.
        plans: by the name of their row.
        structure: the checkpoint; that of a pruned one says what its plan was made from.

    Returns:
        By row, see `overlap.overlap`.
    """
    made = {FULL: own.calibration} if (own := plan_of(structure.checkpoint)) is not None else {}
    by_row = {**made, **{name: plan.calibration for name, plan in plans.items()}}
    found = {name: overlap(text.tokens, text.mask, itertools.chain.from_iterable(c.values())) for name, c in by_row.items()}
    return {name: round(share, 4) for name, share in found.items() if share >= WORTH_SAYING}


def evaluate(
    structure: Structure,
    plans: Mapping[str, Plan],
    *,
    model: torch.nn.Module | Running,
    texts: Sequence[Corpus] = (),
    tasks: Any = None,
    full: bool = True,
    repairs: Mapping[str, Callable[[int], LayerRepair]] | None = None,
    batch_size: int = 1,
    bar: Bar | None = None,
) -> Evaluation:
    """Perplexity, closeness to the model itself, and tasks, of a model and of plans of it.

    Args:
        structure: the checkpoint.
        plans: by the name of their row.
        model: the same, from `load_model` or `streamed`.
        texts: held-out text, from `load_windows`.
        tasks: from `tasks.resolve`; None for none.
        full: have a row for the model itself too; without it nothing is compared with it.
        repairs: of plans that are repaired, by their name: what gives a MoE layer's repair, see `repairing.with_repairs`.
        batch_size: sequences per forward pass.
        bar: shows how far the texts and the tasks are, see `progress.bar`.

    Returns:
        A row for each, in order, the model itself first.

    Memory beside the model's own: the logits of two batches (``batch_size x length x vocabulary`` numbers of the model's
    type each), and float32 copies of 256 positions of them.

    Raises:
        InputError: a plan does not fit the model, a plan is called like the model's row, or there is nothing to evaluate.
        MoecoverError: the model gives numbers that are not finite.
    """
    if FULL in plans:
        raise InputError(f"a plan cannot be called {FULL!r}: that is the row of the model itself")
    variants: dict[str, Plan | None] = {**({FULL: None} if full else {}), **plans}
    if not variants:
        raise InputError("nothing to evaluate: give a plan, or have the model itself evaluated")
    for plan in plans.values():
        check_plan(plan, structure, other_weights=True)
    runs = running(model, structure)
    within = [unmasked if plan is None else masked_layers(runs.module, structure, plan) for plan in variants.values()]
    for number, name in enumerate(variants):
        if repairs and name in repairs:
            within[number] = with_repairs(runs.module, structure, within[number], repairs[name])
    close = full and len(variants) > 1
    if tasks is not None:
        tasks.check(runs)
    by_text: dict[str, list[NDArray[np.float64]]] = {}
    total = sum(text.num_tokens for text in texts) * len(variants)
    with bar("measuring perplexity", total) if bar and texts else contextlib.nullcontext(_nothing) as advance:
        for text in texts:
            by_text[text.name] = _sums(runs, within, text, batch_size, advance, close=close)
    scored: list[Any] = [({}, {})] * len(variants)
    if tasks is not None:
        total = tasks.num_requests * len(variants) if bar else 0
        with bar("scoring tasks", total, unit="requests") if bar else contextlib.nullcontext(_nothing) as advance:
            scored = tasks.score(runs, within, advance=advance)
    topology, checkpoint = structure.topology, structure.checkpoint
    rows = [
        Row(
            name,
            None if plan is None else _plan_record(plan),
            topology.num_experts if plan is None else plan.keep,
            topology.num_experts,
            checkpoint.num_bytes if plan is None else structure.num_bytes(plan.keep),
            {text: _result(text, sums[number], close=close and plan is not None) for text, sums in by_text.items()},
            scored[number][0],
        )
        for number, (name, plan) in enumerate(variants.items())
    ]
    about = {
        "name": checkpoint.name, "revision": checkpoint.revision, "fingerprint": structure.model_fingerprint,
        "family": topology.family, "dtype": str(runs.dtype).removeprefix("torch."),
        "device": str(runs.device),
        "num_bytes": checkpoint.num_bytes, "experts": topology.num_experts, "top_k": topology.top_k,
        "layers": len(topology.decoder_layers),
    }  # fmt: skip
    return Evaluation(
        about,
        {text.name: {**text.record, "overlap": overlaps(text, plans, structure)} for text in texts},
        {} if tasks is None else tasks.record,
        rows,
        {name: scored[number][1] for number, name in enumerate(variants) if scored[number][1]},
        {name: {text: sums[number][:, :2] for text, sums in by_text.items()} for number, name in enumerate(variants)},
    )
