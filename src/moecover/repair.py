"""Repair of one MoE layer: reads activations and the original's output, gives refitted down projections of the kept experts.

Pure: tensors in, tensors out. A layer's output is linear in the down projections of its experts, so what is lost with
the removed ones is fitted by regularised least squares towards the original weights: docs/repair.md derives it. Blocks
(experts, and the shared one) are solved exactly in turn; what ties them is the residual over all tokens. Memory for T
tokens of hidden size d and blocks of width w_b: up to 24 T d + sum(8 w_b^2 + 24 d w_b) + 8 w^2 + 24 d w of the widest
block + `CHUNK` rows in float64, beside the caller's features and target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.registry import unknown_name

if TYPE_CHECKING:
    import torch

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01)  # strongest first; each fit starts where the one before ended
HELD_SHARE = 0.2  # of every corpus's tokens, the last ones: what the penalty is chosen on
SWEEPS = 8
TOLERANCE = 3e-3  # a sweep that lowers the objective by a smaller share is the last one
CHUNK = 4096  # rows in float64 at a time


@dataclass(frozen=True)
class Block:
    """One expert as the layer's output sees it: ``weight @ features[i]`` is added to token ``tokens[i]``.

    Attributes:
        name: for messages and results.
        weight: original down projection ``[hidden, width]``, in the dtype in which it is stored.
        tokens: int64 ``[row]``, no token twice.
        features: intermediate activations times routing weight, floating point ``[row, width]``.
    """

    name: str
    weight: torch.Tensor
    tokens: torch.Tensor
    features: torch.Tensor


@dataclass(frozen=True)
class Fit:
    """What the repair of a layer gave.

    Attributes:
        weights: new down projections by block, in the original's dtype; blocks that stay are left out.
        before: squared error of every corpus as a share of the squared target, without repair.
        after: the same with ``weights``; ``before`` where nothing changed.
        penalty: the regularisation chosen, None where nothing changed.
        kept: why a block, or every one, keeps its weights, by name.
    """

    weights: dict[str, torch.Tensor]
    before: list[float]
    after: list[float]
    penalty: float | None
    kept: dict[str, str]


def _ridge(gram: torch.Tensor, right: torch.Tensor, weight: torch.Tensor, penalty: float) -> torch.Tensor:
    """Change of the weights ``[width, hidden]`` that solves the normal equations of one block."""
    import torch

    system = gram.clone()
    system.diagonal().add_(penalty * gram.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed):  # a penalty below the rounding of a singular Gram matrix
        solution: torch.Tensor = torch.linalg.lstsq(system.cpu(), right.cpu(), driver="gelsd").solution
        return solution.to(right.device)
    return torch.cholesky_solve(right, factor)


def _scale(gram: torch.Tensor, right: torch.Tensor, weight: torch.Tensor, penalty: float) -> torch.Tensor:
    """The same for a multiple of the original weights."""
    original = weight.double().T
    energy = ((gram @ original) * original).sum() * (1 + penalty)
    return original * ((right * original).sum() / energy if float(energy) > 0 else 0.0)


KINDS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]] = {"scale": _scale, "ridge": _ridge}  # fmt: skip


def _chunks(block: Block) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and float64 features of a block, `CHUNK` rows at a time."""
    for start in range(0, len(block.tokens), CHUNK):
        yield block.tokens[start : start + CHUNK], block.features[start : start + CHUNK].double()


def _gram(block: Block, share: torch.Tensor) -> torch.Tensor:
    """Weighted second moments of the features, float64 ``[width, width]``; ``share`` is the tokens' weight ``[token]``."""
    import torch

    width = block.features.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=block.features.device)
    for tokens, features in _chunks(block):
        gram.addmm_((features * share[tokens, None]).T, features)
    return gram


def _residual(blocks: Sequence[Block], weights: Sequence[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Target less the output of the blocks with some weights ``[hidden, width]``, float64 ``[token, hidden]``."""
    residual = target.double().clone()
    for block, weight in zip(blocks, weights, strict=True):
        for tokens, features in _chunks(block):
            residual[tokens] -= features @ weight.double().T
    return residual


def _descend(
    kind: str, blocks: Sequence[Block], grams: Sequence[torch.Tensor], share: torch.Tensor, penalty: float,
    residual: torch.Tensor, deltas: list[torch.Tensor], *, sweeps: int, tolerance: float,
) -> None:  # fmt: skip
    """Solve block after block until the objective rests; ``residual`` and ``deltas`` are brought up to date in place."""
    import torch

    def objective() -> float:
        error = float((residual.square().sum(1) * share).sum())
        if kind == "scale":
            norms = [float(((g @ d) * d).sum()) for g, d in zip(grams, deltas, strict=True)]
        else:
            norms = [float(g.diagonal().mean() * d.square().sum()) for g, d in zip(grams, deltas, strict=True)]
        return error + penalty * sum(norms)

    last = objective()
    for _ in range(sweeps):
        for at, (block, gram) in enumerate(zip(blocks, grams, strict=True)):
            right = gram @ deltas[at]
            for tokens, features in _chunks(block):
                right.addmm_((features * share[tokens, None]).T, residual[tokens])
            change = KINDS[kind](gram, right, block.weight, penalty)
            if not bool(torch.isfinite(change).all()):
                continue
            step = change - deltas[at]
            for tokens, features in _chunks(block):
                residual[tokens] -= features @ step
            deltas[at] = change
        now = objective()
        if last - now <= tolerance * last:
            break
        last = now


def fit(
    blocks: Sequence[Block],
    target: torch.Tensor,
    corpus: torch.Tensor,
    *,
    kind: str,
    penalties: Sequence[float] = PENALTIES,
    held_share: float = HELD_SHARE,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
) -> Fit:
    """New down projections of one layer's kept experts, and the shared one's.

    Never worse on the given tokens than the original weights, in the dtype in which they are stored: where it would be,
    the layer keeps them.

    Args:
        blocks: all that adds to the layer's output.
        target: the original's output, ``[token, hidden]``.
        corpus: int64 ``[token]``, from 0 on; the tokens of a corpus in their order.
        kind: a name in `KINDS`.
        penalties: strongest first; one of them is chosen on the last tokens of every corpus.
        held_share: how many of them, 0 to take the last penalty as it is.
        sweeps: at most so many turns of all blocks for a penalty.
        tolerance: stops them earlier, as a share of the objective.

    Raises:
        InputError: unknown kind.
    """
    import torch

    if kind not in KINDS:
        raise unknown_name("repair", kind, KINDS)
    number = int(corpus.max()) + 1
    counts = torch.bincount(corpus, minlength=number)
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
    place = torch.empty_like(corpus)
    place[torch.argsort(corpus, stable=True)] = torch.arange(len(corpus), device=corpus.device)
    held = (place - first[corpus]) >= (counts - (counts * held_share).long())[corpus]

    finite = bool(torch.isfinite(target).all()) and all(
        bool(torch.isfinite(values).all()) for block in blocks for values in (block.weight, block.features)
    )
    originals = [block.weight for block in blocks]
    residual = _residual(blocks, originals, target)
    energies = target.double().square().sum(1)

    def sums(values: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(number, dtype=torch.float64, device=corpus.device)
        return zeros.index_add_(0, corpus, values * part)

    def inverse_energy(part: torch.Tensor) -> torch.Tensor:  # 0 for a corpus without any
        norms = sums(energies, part)
        return torch.where(norms > 0, 1 / norms, 0.0)

    def losses(residual: torch.Tensor, part: torch.Tensor) -> list[float]:
        found: list[float] = (sums(residual.square().sum(1), part) * inverse_energy(part)).tolist()
        return found

    def shares(part: torch.Tensor) -> torch.Tensor:
        return part.double() * inverse_energy(part)[corpus] / number

    everything = torch.ones_like(held)
    before = losses(residual, everything)

    def unchanged(reason: str) -> Fit:
        return Fit({}, before, before, None, {block.name: reason for block in blocks})

    if not finite:
        return unchanged("a weight, an activation or a target is not finite")
    kept = {}
    for block in blocks:
        rows, unknowns = int((~held[block.tokens]).sum()), block.weight.shape[1] if kind == "ridge" else 1
        if rows < unknowns:
            kept[block.name] = f"{rows} tokens to fit, {unknowns} are needed"
    solved = [block for block in blocks if block.name not in kept]
    if not solved:
        return Fit({}, before, before, None, kept)

    deltas = [torch.zeros(b.weight.shape[::-1], dtype=torch.float64, device=residual.device) for b in solved]
    chosen = penalties[-1]
    if bool(held.any()):
        grams, share = [_gram(block, shares(~held)) for block in solved], shares(~held)
        best, chosen = sum(losses(residual, held)), float("inf")
        best_deltas = [d.clone() for d in deltas]
        for penalty in penalties:
            _descend(kind, solved, grams, share, penalty, residual, deltas, sweeps=sweeps, tolerance=tolerance)
            if (loss := sum(losses(residual, held))) < best:
                best, chosen, best_deltas = loss, penalty, [d.clone() for d in deltas]
            elif chosen < float("inf"):
                break  # beyond the best one
        del grams
        if chosen == float("inf"):
            return unchanged("the held-out calibration text is not fitted better")
        deltas = best_deltas
        changed = {b.name: b.weight.double() + d.T for b, d in zip(solved, deltas, strict=True)}
        residual = _residual(blocks, [changed.get(b.name, b.weight) for b in blocks], target)
        del changed
    share = shares(everything)
    grams = [_gram(block, share) for block in solved]
    _descend(kind, solved, grams, share, chosen, residual, deltas, sweeps=sweeps, tolerance=tolerance)
    weights = {b.name: (b.weight.double() + d.T).to(b.weight.dtype) for b, d in zip(solved, deltas, strict=True)}
    after = losses(_residual(blocks, [weights.get(b.name, b.weight) for b in blocks], target), everything)
    if not sum(after) < sum(before):
        return unchanged("the calibration text is not fitted better in the dtype of the weights")
    return Fit(weights, before, after, chosen, kept)
