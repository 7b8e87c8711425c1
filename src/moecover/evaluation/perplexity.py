"""Perplexity and closeness: reads a model and held-out text, gives sums over the scored tokens of every window.

Probabilities are computed in float32 and summed in float64.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moecover.corpora.batches import batches
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.evaluation.artifact import TextResult
from moecover.evaluation.sharing import run_shared
from moecover.runtime.finite import naming, not_finite, rows_text
from moecover.runtime.running import InMemory, Running, Within, unmasked

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


POSITIONS = 256  # positions whose logits are converted to float32 at a time


def score(
    logits: torch.Tensor, inputs: Mapping[str, torch.Tensor], reference: torch.Tensor | None = None
) -> NDArray[np.float64]:
    """How well logits predict the tokens of their own text, and how close they are to the logits of another model.

    Every token but the first of its sequence is predicted from those before it; padding is not scored. Probabilities
    are computed in float32 and summed in float64.

    Args:
        logits: ``[sequence, position, vocabulary]``.
        inputs: ``input_ids`` and, where there is padding, ``attention_mask``: ``[sequence, position]``.
        reference: logits of another model on the same inputs.

    Returns:
        float64 ``[sequence, 4]``: summed negative log-likelihood in nats, number of scored tokens, summed
        KL(reference || logits) in nats, number of tokens where both have the same most likely token; the last two are 0
        without a reference.
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
            sums[row, 0] -= found.gather(-1, target[:, None]).cpu().double().sum()  # not every GPU has float64
            sums[row, 1] += len(target)
            if reference is not None:
                other = reference[row, part][here].float().log_softmax(-1)
                sums[row, 2] += (other.exp() * (other - found)).sum(-1).cpu().double().sum()
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
        model: from `load_model`, possibly within `masked`, or a model that runs layer by layer, from `streamed`.
        corpus: held-out sequences.
        batch_size: sequences per forward pass.
        advance: called with the number of tokens of every finished batch.

    Raises:
        InputError: there is no token to predict, ``batch_size`` is below 1, or the model gives numbers that are not
            finite.
    """
    import torch

    runs = InMemory(model, ()) if isinstance(model, torch.nn.Module) else model
    (sums,) = window_sums(runs, [unmasked], corpus, batch_size=batch_size, advance=advance)
    return text_result(corpus.name, sums).perplexity


def window_sums(
    model: Running,
    variants: Sequence[Within],
    corpus: Corpus,
    *,
    batch_size: int,
    advance: Callable[[int], None],
    close: bool = False,
) -> list[NDArray[np.float64]]:
    """The sums of `score` for every window of a text and every variant of a model.

    The variants take turns on each batch, so that only the reference logits of one batch are held; layer by layer as
    many batches as fit share one read of the weights.

    Args:
        model: the model.
        variants: for each, the context of a decoder layer, see `Running.run`.
        corpus: held-out windows.
        batch_size: windows per forward pass.
        advance: called with the number of tokens of every finished batch of a variant.
        close: compare the logits with those of the first variant.

    Returns:
        By variant: float64 ``[window, 4]``.
    """
    if batch_size < 1:
        raise InputError(f"{arg('batch_size', batch_size)} is out of range: 1 or more")
    reference: list[torch.Tensor] = []

    def run(first: int, number: int, inputs: dict[str, torch.Tensor]) -> NDArray[np.float64]:
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        with naming(f"corpus {corpus.name}, {rows_text('window', first, len(inputs['input_ids']))}"):
            logits = model.module(**inputs, use_cache=False).logits
            if number == 0:
                reference[:] = [logits] if close else []
            found = score(logits, inputs, reference[0] if close and number else None)
            if not np.isfinite(found).all():
                raise not_finite("", "the log-likelihoods are")
        advance(int(inputs.get("attention_mask", inputs["input_ids"] * 0 + 1).sum()))
        return found

    calls: list[Callable[[], NDArray[np.float64]]] = []
    within: list[Within] = []
    tokens: list[int] = []
    for place, inputs in enumerate(batches(corpus, batch_size)):
        for number, variant in enumerate(variants):
            calls.append(functools.partial(run, place * batch_size, number, inputs))
            within.append(variant)
            tokens.append(inputs["input_ids"].numel())
    found = run_shared(model, calls, tokens, within=within, together=len(variants))
    return [np.concatenate(found[number :: len(variants)]) for number in range(len(variants))]


def text_result(name: str, sums: NDArray[np.float64], *, close: bool = False) -> TextResult:
    """Means over all scored tokens of a text.

    Args:
        name: of the text, for messages.
        sums: from `window_sums`, ``[window, 4]``.
        close: whether the last two columns were computed.

    Raises:
        InputError: there is no token to predict, or a sum or the perplexity is not finite.
    """
    if not np.isfinite(sums).all():
        window = int(np.argwhere(~np.isfinite(sums))[0][0])
        raise not_finite(f"corpus {name}, window {window}", "the log-likelihoods are")
    total, tokens, kl, agreed = (math.fsum(column) for column in sums.T)
    if tokens == 0:
        raise InputError(f"corpus {name}: no token to predict, sequences of at least two tokens are needed")
    mean = total / tokens
    if mean > math.log(sys.float_info.max):
        raise not_finite(f"corpus {name}", f"with {mean:.4g} nats a token the perplexity is")
    closeness = (kl / tokens, agreed / tokens) if close else (None, None)
    return TextResult(math.exp(mean), mean, int(tokens), len(sums), *closeness)
