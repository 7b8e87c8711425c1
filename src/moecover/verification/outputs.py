"""The outputs of a model on text, decoder layer by decoder layer, and the differences between those of two models."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.corpora.batches import batches
from moecover.corpora.packing import Corpus
from moecover.runtime.finite import naming, rows_text, watched
from moecover.runtime.running import Running, Within

if TYPE_CHECKING:
    import torch

LOGITS = "logits"

Outputs = list[tuple[str, "torch.Tensor"]]  # by name, in order: ``[token, hidden]`` of every layer, ``[token, entry]``


@dataclass(frozen=True)
class Differences:
    """Differences between the outputs of two models.

    Attributes:
        largest: absolute difference of every output by name, infinite where one is not finite.
        first: the first output that differs by more than the tolerance; None where none does.
    """

    largest: dict[str, float]
    first: str | None


def outputs_of(model: Running, corpora: Sequence[Corpus], within: Within, *, guarded: bool = False) -> Outputs:
    """Run a model on corpora, one sequence at a time.

    Args:
        model: that runs.
        corpora: the text.
        within: a context for every decoder layer, in which it runs.
        guarded: refuse numbers that are not finite; without it they show as differences.

    Returns:
        The output of every decoder layer and the logits, by name, on the CPU.

    Raises:
        InputError: if ``guarded``, an output is not finite; says where.
    """
    import torch

    outputs: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            outputs.setdefault(name, []).append((output[0] if isinstance(output, tuple) else output).cpu())

        return hook

    handles = []
    for number, name in enumerate(model.layers):
        layer = model.module.get_submodule(name)
        handles.append(layer.register_forward_hook(keep(f"decoder layer {number}")))

    def logits(corpus: str, row: int, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with naming(f"corpus {corpus}, {rows_text('block', row, 1)}"):
            given = {key: value.to(model.device) for key, value in inputs.items()}
            found: torch.Tensor = model.module(**given, use_cache=False).logits
        return found.cpu()

    calls = [
        functools.partial(logits, corpus.name, row, inputs)
        for corpus in corpora
        for row, inputs in enumerate(batches(corpus, 1))
    ]
    try:
        with watched(model) if guarded else contextlib.nullcontext():
            last = model.run(calls, within=[within] * len(calls))
    finally:
        for handle in handles:
            handle.remove()
    ordered = {**outputs, LOGITS: last}
    return [(name, torch.cat([v.flatten(0, 1) for v in values])) for name, values in ordered.items()]


def differences(expected: Outputs, found: Outputs, *, tolerance: float) -> Differences:
    """Compare the outputs of two models.

    Args:
        expected: from `outputs_of`.
        found: of the other model, on the same text.
        tolerance: largest difference allowed, as a share of the largest value of the output; 0: every bit equal.
    """
    import torch

    largest, first = dict[str, float](), None
    for (name, a), (_, b) in zip(expected, found, strict=True):
        parts = [
            (x.double() - y.double()).abs().max().item()
            for x, y in zip(torch.split(a, 64), torch.split(b, 64), strict=True)
        ]
        largest[name] = max(parts) if all(map(math.isfinite, parts)) else math.inf
        if first is None and not largest[name] <= tolerance * a.abs().max().item():
            first = name
    return Differences(largest, first)
