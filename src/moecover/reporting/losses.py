"""What pruning loses: the losses of results.json, or those of the perplexities where a run has none, without intervals.

`compare` computes the intervals; nothing is measured or tested here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from moecover.reporting.data import Loss
from moecover.reporting.findings import ModelFindings, Point


def loss_of(model: ModelFindings, p: Point, texts: Sequence[str]) -> Loss | None:
    """The mean over some texts of what a point loses of log perplexity; None where a text or the full model lacks it.

    Args:
        model: of the point.
        p: a method at a budget.
        texts: one or more texts, in the order of the model's.
    """
    if (known := p.losses.get(("perplexity", *texts))) is not None:
        return known
    full = model.full.perplexity if model.full else {}
    if p is model.full or not texts or not all(text in p.perplexity and text in full for text in texts):
        return None
    lost = [math.log(p.perplexity[text].value) - math.log(full[text].value) for text in texts]
    if not all(map(math.isfinite, lost)):
        return None
    return Loss(
        model=model.name, label="", retain=p.retain, kind="perplexity", names=[*texts], value=statistics.fmean(lost)
    )


def worst_of(model: ModelFindings, p: Point, texts: Sequence[str]) -> Loss | None:
    """The loss on the text where it is largest; None where one is missing."""
    found = [loss for text in texts if (loss := loss_of(model, p, [text])) is not None]
    return max(found, key=lambda loss: loss.value) if found and len(found) == len(texts) else None
