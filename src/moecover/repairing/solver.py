"""Closed-form repair of one MoE layer: reads activations and the original's output, returns new down projections.

Pure: tensors in, tensors out. A layer's output is linear in the down projections of its experts, so what is lost with
the removed ones is fitted by regularised least squares towards the original weights: docs/repair.md derives it. Blocks
(experts, and the shared one) are solved exactly in turn; what couples them is the residual over all tokens. The penalty
is chosen on a random projection of the outputs, at a fraction of the cost.

Memory (`peak_bytes`), for T tokens of hidden size d and blocks of width w_b, beside the caller's features and target: 8
T d for residuals, 12 sum(w_b^2) for Gram matrices and factors, 16 d sum(w_b) for changes and new weights, for one block
at a time 24 w^2 + 24 d w of the widest, and 24 d + 8 w for every one of `CHUNK` rows. No matrix over all blocks or all
tokens is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from moecover.registry import unknown_name
from moecover.repairing.calibration import Calibration
from moecover.repairing.factors import best_factors
from moecover.repairing.parts import Part
from moecover.repairing.ridge import TOLERANCE, ridge_changes
from moecover.repairing.sums import CHUNK, Block, all_finite, residual_of
from moecover.runtime.finite import not_finite

if TYPE_CHECKING:
    import torch

PENALTIES = (1.0, 0.25, 0.06, 0.015, 0.004, 0.001)  # strongest first; each fit starts where the one before ended
HELD_SHARE = 0.2  # of every corpus's tokens, the last ones: what the penalty is chosen on
SWEEPS = 4
REFIT = "refit"
KINDS = ("scale", "ridge", REFIT)  # a factor for every block; any weights; and then all parameters (`refit`)
# Why a layer keeps its weights.
NOT_BETTER_HELD = "the held-out calibration text is not fitted better"
NOT_BETTER = "some corpus of the calibration text is not fitted better in the dtype of the weights"


class FitOptions(TypedDict, total=False):
    """Further arguments of `fit`."""

    penalties: Sequence[float]
    held_share: float
    sweeps: int
    tolerance: float


class _Shared(TypedDict):
    """Arguments of both solvers."""

    everything: bool
    any_held: bool
    part: Part


@dataclass(frozen=True)
class Fit:
    """The repair of a layer.

    Attributes:
        weights: new down projections by block, in the original's dtype; blocks that stay are left out.
        before: squared error of every corpus as a share of the squared target, without repair.
        after: the same with ``weights``; ``before`` where nothing changed.
        penalties: the regularisation chosen, by ``scale`` (of the factors) and ``ridge``; empty where nothing changed.
        kept: why a block, or every one, keeps its weights, by name.
    """

    weights: dict[str, torch.Tensor]
    before: list[float]
    after: list[float]
    penalties: dict[str, float]
    kept: dict[str, str]


def peak_bytes(*, tokens: int, hidden_size: int, widths: Sequence[int]) -> int:
    """Bytes that `fit` takes at most beside its arguments, of float32 features; see the module."""
    total, squared, widest = sum(widths), sum(w * w for w in widths), max(widths)
    rows = min(CHUNK, tokens) * (24 * hidden_size + 8 * widest)
    of_block = 24 * widest * (widest + hidden_size)
    return 8 * tokens * hidden_size + 12 * squared + 16 * hidden_size * total + of_block + rows


def fit(
    blocks: Sequence[Block],
    target: torch.Tensor,
    part: Part,
    *,
    kind: str,
    weights: Sequence[float] | None = None,
    penalties: Sequence[float] = PENALTIES,
    held_share: float = HELD_SHARE,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
    everything: bool = True,
) -> Fit:
    """Refit the down projections of one layer's kept experts and of the shared one.

    A layer keeps its weights if the error of some corpus of weight above 0 would grow, in the dtype of the weights.

    Args:
        blocks: all that adds to the layer's output.
        target: the original's output, ``[token, hidden]``.
        part: the tokens among those of all processes, with their corpora; the tokens of a corpus in their order.
        kind: a name in `KINDS`; ``refit`` begins with ``ridge``.
        weights: of every corpus; None weighs all the same. One of weight 0 is not fitted.
        penalties: strongest first; one of them is chosen on the last tokens of every corpus.
        held_share: share of the tokens that it is chosen on, 0 to take the last penalty as it is.
        sweeps: at most this many turns of all blocks for a penalty.
        tolerance: stop after a sweep that lowers the objective by a smaller share.
        everything: whether the tokens that penalties are chosen on are fitted too, once they are.

    Raises:
        InputError: unknown kind; or a target, a weight or an activation that is not finite, with its block.
    """
    if kind == REFIT:
        kind = "ridge"  # where it begins
    if kind not in KINDS:
        raise unknown_name("repair", kind, KINDS)
    _check_finite(blocks, target)
    calibration = Calibration(target, part, weights, held_share)
    residual = residual_of(blocks, [block.weight for block in blocks], target)
    before = calibration.losses(residual)
    kept = calibration.too_few(blocks, kind)
    solved = [block for block in blocks if block.name not in kept]
    if not solved or not bool((calibration.inverse > 0).any()):
        return _unchanged(before, blocks, "the target is zero", kept)
    share, held = calibration.share(), calibration.held
    shared: _Shared = {"everything": everything, "any_held": calibration.any_held, "part": part}
    used, factor_of, changes = dict[str, float](), dict[str, float](), list["torch.Tensor"]()
    if (factors := best_factors(solved, residual, share, held, penalties, **shared)) is not None:
        used["scale"] = factors[1]
        factor_of = dict(zip((block.name for block in solved), factors[0].tolist(), strict=True))
        scaled = (b.weight.to(residual.dtype) * (1 + factor_of.get(b.name, 0.0)) for b in blocks)
        residual = residual_of(blocks, scaled, target)
    if kind == "ridge":
        changes, penalty = ridge_changes(
            solved, share, held, residual, penalties, sweeps=sweeps, tolerance=tolerance, **shared
        )
        used |= {} if penalty is None else {"ridge": penalty}
    if not used:
        return _unchanged(before, blocks, NOT_BETTER_HELD)
    new = _new_weights(solved, factor_of, changes)
    del residual, changes
    after = calibration.losses(residual_of(blocks, [new.get(b.name, b.weight) for b in blocks], target))
    if not calibration.improves(before, after):
        return _unchanged(before, blocks, NOT_BETTER)
    return Fit(new, before.tolist(), after.tolist(), used, kept)


def _check_finite(blocks: Sequence[Block], target: torch.Tensor) -> None:
    if not all_finite([target]):
        raise not_finite("", "the outputs to be fitted are")
    for block in blocks:
        name = f"expert {block.name}" if block.name.isdecimal() else block.name
        if not all_finite([block.weight]):
            raise not_finite(name, "its down projection is")
        if not all_finite([block.features]):
            raise not_finite(name, "its activations are")


def _unchanged(before: torch.Tensor, blocks: Sequence[Block], reason: str, kept: dict[str, str] | None = None) -> Fit:
    """The fit of a layer that keeps its weights, for one reason or for those of each block."""
    return Fit({}, before.tolist(), before.tolist(), {}, kept or {block.name: reason for block in blocks})


def _new_weights(
    blocks: Sequence[Block], factor_of: dict[str, float], changes: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Original weights times factors plus changes, by block, in the original's dtype."""
    new = {}
    for at, block in enumerate(blocks):
        weight = block.weight.double() * (1 + factor_of.get(block.name, 0.0))
        new[block.name] = (weight + changes[at].T if changes else weight).to(block.weight.dtype)
    return new
