"""Dynamic expert skipping (arXiv 2402.14800), for evaluation only: no checkpoint holds such a rule.

Reads a model that runs and calibration text, gives thresholds; and contexts of decoder layers in which a token skips
the experts whose routing weight is below a threshold times its largest one. The experts module takes the routing
weights of the slots, whatever router made them; a family whose experts take none is refused.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.checkpoints.structure import Structure
from moecover.corpora.batches import batches
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.evaluation.records import SkipRecord
from moecover.evaluation.sharing import run_shared
from moecover.runtime.loading import backbone_of
from moecover.runtime.running import Running, Within

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

EVEN = (
    0.01  # relative spread of the sums of a token's weights up to which they count as one number: bfloat16's rounding
)
Hook = Callable[..., tuple[Any, ...] | None]


@dataclass(frozen=True)
class Skipping:
    """The rule of one variant of a model.

    Attributes:
        betas: by MoE layer, float64 ``[slot - 1]``: the median over the calibration tokens of the weight of a slot over
            the largest, slots by weight.
        renormalises: by MoE layer, whether the model scales a token's weights to one sum.
        record: of the calibration text, and the mean number of experts per token on it.
    """

    betas: list[NDArray[np.float64]]
    renormalises: list[bool]
    record: SkipRecord


def kept_slots(weights: NDArray[np.float64], betas: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which slots of every token stay.

    The first stays; slot j does where its weight is at least ``betas[j - 1]`` times the first's and all before it stay.
    The paper's rule is that of two slots; going on to more by the medians of each slot is this project's reading.

    Args:
        weights: routing weights ``[token, slot]``, the largest first.
        betas: ``[slot - 1]``.
    """
    stay = np.ones(weights.shape, dtype=bool)
    stay[:, 1:] = np.logical_and.accumulate(weights[:, 1:] >= betas * weights[:, :1], axis=1)
    return stay


def skipping(
    model: Running, structure: Structure, variants: Sequence[Within], corpora: Sequence[Corpus], *, batch_size: int
) -> list[Skipping]:
    """The rule of every variant of a model, from one pass of each over calibration text.

    All weights are held: 4 bytes for a token, a slot, a MoE layer and a variant.

    Args:
        model: the model.
        structure: its checkpoint.
        variants: for each, the context of a decoder layer, see `Running.run`.
        corpora: calibration text, of which every token counts alike.
        batch_size: sequences per forward pass.

    Raises:
        InputError: a token goes to one expert only, or the experts of the family take no routing weights.
    """
    layers = len(structure.topology.decoder_layers)
    seen: list[list[list[NDArray[np.float32]]]] = [[[] for _ in range(layers)] for _ in variants]

    def run(inputs: dict[str, torch.Tensor]) -> None:
        backbone_of(model.module)(**{k: v.to(model.device) for k, v in inputs.items()}, use_cache=False)

    calls, within, tokens = list[Callable[[], None]](), list[Within](), list[int]()
    for inputs in (inputs for corpus in corpora for inputs in batches(corpus, batch_size)):
        mask = inputs.get("attention_mask")
        for variant, into in zip(variants, seen, strict=True):
            calls.append(functools.partial(run, inputs))
            tokens.append(inputs["input_ids"].numel())
            hooks = [functools.partial(_record, rows, mask) for rows in into]
            within.append(_hooked(model, structure, variant, hooks))
    run_shared(model, calls, tokens, within=within, together=len(variants))
    text = ", ".join(corpus.name for corpus in corpora)
    return [_rule([np.concatenate(rows) for rows in into], text) for into in seen]


def with_skipping(model: Running, structure: Structure, within: Within, rule: Skipping) -> Within:
    """The contexts of decoder layers in which tokens skip experts by a rule.

    Args:
        model: the model.
        structure: its checkpoint.
        within: the contexts that these are added to.
        rule: from `skipping`, of the same variant.
    """
    hooks = [functools.partial(_skip, *pair) for pair in zip(rule.betas, rule.renormalises, strict=True)]
    return _hooked(model, structure, within, hooks)


def _rule(weights: Sequence[NDArray[np.float32]], text: str) -> Skipping:
    """The rule from the weights of every MoE layer, ``[token, slot]``, the largest first, on a text by name."""
    if weights[0].shape[1] < 2:
        raise InputError(f"{arg('skip', text)}: a token goes to one expert only, and none of that can be skipped")
    rows = [found.astype(np.float64) for found in weights]
    betas = [np.median(row[:, 1:] / row[:, :1], axis=0) for row in rows]
    sums = [row.sum(axis=1) for row in rows]
    active = [kept_slots(row, beta).sum(axis=1).mean() for row, beta in zip(rows, betas, strict=True)]
    return Skipping(
        betas,
        [bool(np.ptp(total) <= EVEN * abs(total.mean())) for total in sums],
        {"text": text, "tokens": len(rows[0]), "active": round(float(np.mean(active)), 4)},
    )


def _hooked(model: Running, structure: Structure, within: Within, hooks: Sequence[Hook]) -> Within:
    """The contexts of decoder layers with a hook before the experts of every MoE layer."""
    layer_of = {number: layer for layer, number in enumerate(structure.topology.decoder_layers)}

    @contextlib.contextmanager
    def inside(number: int) -> Iterator[None]:
        with within(number), contextlib.ExitStack() as undo:
            if (layer := layer_of.get(number)) is not None:
                experts = model.module.get_submodule(structure.experts_modules[layer])
                undo.callback(
                    experts.register_forward_pre_hook(functools.partial(_checked, structure, hooks[layer])).remove
                )
            yield

    return inside


def _checked(structure: Structure, hook: Hook, module: object, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A hook before the experts, called with hidden states, selected experts and weights ``[token, slot]``."""
    if len(args) != 3 or args[1].shape != args[2].shape:
        raise InputError(
            f"{arg('skip')}: the experts of {structure.topology.family} take no routing weights by slot, so that none "
            "can be skipped: not supported for this family"
        )
    return hook(*args)


def _record(
    rows: list[NDArray[np.float32]], mask: torch.Tensor | None, hidden: object, index: object, weights: torch.Tensor
) -> None:
    """Keep the weights of the tokens that are no padding, the largest first."""
    found = weights.detach().float().cpu()
    if mask is not None:
        found = found[mask.reshape(-1).bool()]
    rows.append(found.sort(dim=-1, descending=True).values.numpy())


def _skip(
    betas: NDArray[np.float64], renormalises: bool, hidden: object, index: object, weights: torch.Tensor
) -> tuple[Any, ...]:
    """Set the weights of skipped slots to 0; where the model renormalises, the others take over their sum."""
    import torch

    ordered, places = weights.detach().sort(dim=-1, descending=True, stable=True)
    stay = torch.from_numpy(kept_slots(ordered.double().cpu().numpy(), betas)).to(weights.device)
    left = weights * torch.zeros_like(stay).scatter(-1, places, stay)
    if renormalises:
        left = left * (weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True))
    return hidden, index, left.to(weights.dtype)
