"""Repair of one MoE layer: reads activations and the original's output, gives refitted down projections of the kept experts.

Pure: tensors in, tensors out. A layer's output is linear in the down projections of its experts, so what is lost with
the removed ones is fitted by regularised least squares towards the original weights: docs/repair.md derives it. Blocks
(experts, and the shared one) are solved exactly in turn; what ties them is the residual over all tokens. The penalty is
chosen on a random projection of the outputs, at a fraction of the cost.

Memory (`peak_bytes`), for T tokens of hidden size d and blocks of width w_b, beside the caller's features and target:
8 T d for residuals, 12 sum(w_b^2) for Gram matrices and factors, 16 d sum(w_b) for changes and new weights, for one
block at a time 24 w^2 + 24 d w of the widest, and 24 d + 8 w for every one of `CHUNK` rows. No matrix over all blocks or
all tokens is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.registry import unknown_name

if TYPE_CHECKING:
    import torch

PENALTIES = (1.0, 0.25, 0.06, 0.015, 0.004, 0.001)  # strongest first; each fit starts where the one before ended
HELD_SHARE = 0.2  # of every corpus's tokens, the last ones: what the penalty is chosen on
SWEEPS = 4
TOLERANCE = 1e-2  # a sweep that lowers the objective by a smaller share is the last one
SKETCH = 32  # directions of the output that the penalty is chosen on
TRIAL_SWEEPS = 2  # for every penalty tried
CHUNK = 4096  # rows at a time, whose products are added up in float64
PRODUCTS = 2**24  # numbers of the blocks' outputs for some tokens that are held at a time
KINDS = ("scale", "ridge")  # a factor for every block; any weights


@dataclass(frozen=True)
class Block:
    """One expert as the layer's output sees it: ``weight @ features[i]`` is added to token ``tokens[i]``.

    Attributes:
        name: for messages and results.
        weight: original down projection ``[hidden, width]``, in the dtype in which it is stored.
        tokens: int64 ``[row]``, no token twice.
        features: intermediate activations times routing weight ``[row, width]``, float32 or float64: what products are
            made in, `CHUNK` rows of them; their sums are float64.
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
    total, squares, widest = sum(widths), sum(w * w for w in widths), max(widths)
    rows = min(CHUNK, tokens) * (24 * hidden_size + 8 * widest)
    return 8 * tokens * hidden_size + 12 * squares + 16 * hidden_size * total + 24 * widest * (widest + hidden_size) + rows  # fmt: skip


# How far a block's change goes from where it is, given how the error falls there (which is used up); what a change costs.
Solver = tuple["Callable[[torch.Tensor, torch.Tensor], torch.Tensor]", "Callable[[torch.Tensor], float]"]


def _ridge(gram: torch.Tensor, penalty: float, dtype: torch.dtype) -> Solver:
    """Any change of a block's weights, ``[width, hidden]``; its square is penalised. Steps are solved for in ``dtype``."""
    import torch

    pull = float(penalty * gram.diagonal().mean())
    system = gram.clone()
    system.diagonal().add_(pull)
    factor, failed = torch.linalg.cholesky_ex(system)
    if not bool(failed):
        factor = factor.to(dtype)
        del system

    def step(slope: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        right = slope.add_(change, alpha=-pull)
        if not bool(failed):
            return torch.cholesky_solve(right.to(dtype), factor)
        # A penalty below the rounding of a singular Gram matrix.
        solution: torch.Tensor = torch.linalg.lstsq(system.cpu(), right.cpu(), driver="gelsd").solution
        return solution.to(right.device)

    return step, lambda change: float(pull * change.square().sum())


def _moments(
    blocks: Sequence[Block], residual: torch.Tensor, shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Products of the blocks' outputs with each other and with the residual, and the residual's square; of tokens, weighted.

    Args:
        blocks: their tokens in any order.
        residual: ``[token, hidden]``.
        shares: weights of the tokens, float64 ``[part, token]``; every part has sums of its own.

    Returns:
        float64 ``[part, block, block]``, ``[part, block]`` and ``[part]``.
    """
    import torch

    number, hidden, device = len(blocks), residual.shape[1], residual.device
    none = number  # the block of a slot that a token does not need
    products = torch.zeros(len(shares), (number + 1) ** 2, dtype=torch.float64, device=device)
    right = torch.zeros(len(shares), number + 1, dtype=torch.float64, device=device)
    energy = torch.zeros(len(shares), dtype=torch.float64, device=device)
    orders = [torch.argsort(block.tokens) for block in blocks]
    sorted_tokens = [block.tokens[order] for block, order in zip(blocks, orders, strict=True)]
    weights = [block.weight.to(block.features.dtype).T for block in blocks]
    slots = int(torch.bincount(torch.cat(sorted_tokens)).max())
    size = min(max(1, PRODUCTS // (slots * hidden)), CHUNK // 4)
    for first in range(0, len(residual), size):
        last = min(first + size, len(residual))
        outputs = torch.zeros(last - first, slots, hidden, dtype=residual.dtype, device=device)
        owners = torch.full((last - first, slots), none, device=device)
        filled = torch.zeros(last - first, dtype=torch.int64, device=device)
        ends = torch.tensor([first, last], device=device)
        for at, block in enumerate(blocks):
            begin, end = torch.searchsorted(sorted_tokens[at], ends).tolist()
            tokens = sorted_tokens[at][begin:end] - first
            outputs[tokens, filled[tokens]] = block.features[orders[at][begin:end]] @ weights[at]
            owners[tokens, filled[tokens]] = at
            filled[tokens] += 1
        for some in torch.arange(last - first, device=device).chunk(8):  # a few tokens at a time in float64
            left, out, owner = residual[first + some].double(), outputs[some].double(), owners[some]
            pairs = (owner[:, :, None] * (number + 1) + owner[:, None, :]).flatten(1)
            of_pairs = torch.zeros(len(some), (number + 1) ** 2, dtype=torch.float64, device=device)
            of_pairs.scatter_(1, pairs, (out @ out.mT).flatten(1))
            of_blocks = torch.zeros(len(some), number + 1, dtype=torch.float64, device=device)
            of_blocks.scatter_(1, owner, (out @ left[:, :, None])[:, :, 0])
            row_weights = shares[:, first + some]
            products += row_weights @ of_pairs
            right += row_weights @ of_blocks
            energy += row_weights @ left.square().sum(1)
    return products.view(-1, number + 1, number + 1)[:, :number, :number], right[:, :number], energy


def _factors(
    blocks: Sequence[Block], residual: torch.Tensor, share: torch.Tensor, held: torch.Tensor, penalties: Sequence[float]
) -> tuple[torch.Tensor, float] | None:
    """What every block's output is best multiplied by, less 1, float64 ``[block]``, and the penalty.

    Jointly for all blocks: `_moments` of the tokens that are fitted and of those that are held out say all. The square of
    the output that a factor adds is penalised.

    Returns:
        None where no penalty is better on the held-out tokens than no change.
    """
    import torch

    products, right, energy = _moments(blocks, residual, torch.stack([share * ~held, share * held]))

    def solved(products: torch.Tensor, right: torch.Tensor, penalty: float) -> torch.Tensor:
        system = (products + penalty * torch.diag(products.diagonal())).cpu()
        found: torch.Tensor = torch.linalg.lstsq(system, right.cpu()[:, None], driver="gelsd").solution[:, 0]
        return found.to(residual.device)

    if not bool(held.any()):
        return solved(products[0], right[0], penalties[-1]), penalties[-1]
    best, chosen = float(energy[1]), None
    for penalty in penalties:
        found = solved(products[0], right[0], penalty)
        loss = float(energy[1] - 2 * found @ right[1] + found @ products[1] @ found)
        if loss < best:
            best, chosen = loss, penalty
        elif chosen is not None:
            break  # beyond the best one
    return None if chosen is None else (solved(products.sum(0), right.sum(0), chosen), chosen)


def _chunks(block: Block) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and features of a block, `CHUNK` rows at a time."""
    import torch

    return zip(torch.split(block.tokens, CHUNK), torch.split(block.features, CHUNK), strict=True)


def _gram(block: Block, share: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Weighted second moments of the features of some tokens, float64 ``[width, width]``.

    Args:
        block: the features.
        share: the tokens' weight ``[token]``.
        part: which tokens, bool ``[token]``.
    """
    import torch

    width = block.features.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=block.features.device)
    strip = -(-width // 4)  # of a symmetric matrix the strips from the diagonal on: ten sixteenths of the products
    for rows in torch.split(part[block.tokens].nonzero()[:, 0], CHUNK):
        features = block.features[rows]
        weighted = features * share[block.tokens[rows], None].to(features.dtype)
        for at in range(0, width, strip):
            gram[at : at + strip, at:] += weighted[:, at : at + strip].T @ features[:, at:]
    gram.triu_()
    gram += gram.triu(1).T
    return gram


def _residual(blocks: Sequence[Block], weights: Iterable[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Target less the output of the blocks with some weights ``[hidden, width]``, ``[token, hidden]`` in the features' dtype."""
    residual = target.to(blocks[0].features.dtype, copy=True)
    for block, weight in zip(blocks, weights, strict=True):
        matrix = weight.to(residual.dtype).T
        for tokens, features in _chunks(block):
            residual.index_add_(0, tokens, features @ matrix, alpha=-1)
    return residual


def _squares(values: torch.Tensor) -> torch.Tensor:
    """Squared norm of every row, float64."""
    import torch

    return torch.cat([part.double().square().sum(1) for part in torch.split(values, CHUNK)])


def _descend(
    blocks: Sequence[Block], solvers: Sequence[Solver], share: torch.Tensor,
    residual: torch.Tensor, changes: list[torch.Tensor], *, sweeps: int, tolerance: float,
) -> None:  # fmt: skip
    """Solve block after block until the objective rests; ``residual`` and ``changes`` are brought up to date in place."""
    import torch

    def objective() -> float:
        costs = sum(cost(change) for (_, cost), change in zip(solvers, changes, strict=True))
        return float((_squares(residual) * share).sum()) + costs

    last, parts = objective(), share.to(residual.dtype)
    for _ in range(sweeps):
        for at, (block, (solve, _)) in enumerate(zip(blocks, solvers, strict=True)):
            slope = torch.zeros_like(changes[at])
            for tokens, features in _chunks(block):
                slope += features.T @ residual[tokens].mul_(parts[tokens, None])
            step = solve(slope, changes[at])
            del slope
            if not bool(torch.isfinite(step).all()):
                continue
            changes[at] += step
            small = step.to(residual.dtype)
            for tokens, features in _chunks(block):
                residual.index_add_(0, tokens, features @ small, alpha=-1)
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
    weights: Sequence[float] | None = None,
    penalties: Sequence[float] = PENALTIES,
    held_share: float = HELD_SHARE,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
) -> Fit:
    """New down projections of one layer's kept experts, and the shared one's.

    On no corpus (of a weight above 0) worse than the original weights, on the given tokens and in the dtype in which they are
    stored: where it would be, the layer keeps them.

    Args:
        blocks: all that adds to the layer's output.
        target: the original's output, ``[token, hidden]``.
        corpus: int64 ``[token]``, from 0 on; the tokens of a corpus in their order.
        kind: a name in `KINDS`.
        weights: of every corpus; all the same where it is None. One of weight 0 is not fitted.
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
    counts = torch.bincount(corpus)
    number = len(counts)
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
    place = torch.empty_like(corpus)
    place[torch.argsort(corpus, stable=True)] = torch.arange(len(corpus), device=corpus.device)
    held = (place - first[corpus]) >= (counts - (counts * held_share).long())[corpus]

    def by_corpus(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(number, dtype=torch.float64, device=corpus.device).index_add_(0, corpus, values)

    norms = by_corpus(_squares(target))
    inverse = torch.where(norms > 0, 1 / norms, 0.0)  # 0 for a corpus without any
    of_corpus = torch.tensor([1.0] * number if weights is None else list(weights), device=corpus.device).double()
    of_corpus /= of_corpus.sum()

    def losses(residual: torch.Tensor) -> torch.Tensor:
        return by_corpus(_squares(residual)) * inverse

    residual = _residual(blocks, [block.weight for block in blocks], target)
    before = losses(residual)

    def unchanged(reason: str) -> Fit:
        return Fit({}, before.tolist(), before.tolist(), {}, {block.name: reason for block in blocks})

    arrays = [target, *(values for block in blocks for values in (block.weight, block.features))]
    if not all(bool(torch.isfinite(part).all()) for values in arrays for part in torch.split(values, CHUNK)):
        return unchanged("a weight, an activation or a target is not finite")
    kept = {}
    fitted = ~held & (of_corpus > 0)[corpus]
    for block in blocks:
        rows, unknowns = int(fitted[block.tokens].sum()), block.weight.shape[1] if kind == "ridge" else 1
        if rows < unknowns:
            kept[block.name] = f"{rows} tokens to fit, {unknowns} are needed"
    solved = [block for block in blocks if block.name not in kept]
    if not solved or not bool((inverse > 0).any()):
        return Fit({}, before.tolist(), before.tolist(), {}, kept or {b.name: "the target is zero" for b in blocks})

    share = (of_corpus * inverse)[corpus]
    share /= share.mean()  # so that no product leaves the range of its dtype
    used, factor_of = dict[str, float](), dict[str, float]()
    if (factors := _factors(solved, residual, share, held, penalties)) is not None:
        used["scale"] = factors[1]
        factor_of = dict(zip((block.name for block in solved), factors[0].tolist(), strict=True))
        residual = _residual(
            blocks, (b.weight.to(residual.dtype) * (1 + factor_of.get(b.name, 0.0)) for b in blocks), target
        )
    changes = list[torch.Tensor]()
    if kind == "ridge":
        grams = [_gram(block, share, ~held) for block in solved]
        chosen = _chosen(solved, grams, share, held, residual, penalties) if bool(held.any()) else penalties[-1]
        if chosen is not None:
            used["ridge"] = chosen
            if bool(held.any()):
                for gram, block in zip(grams, solved, strict=True):
                    gram += _gram(block, share, held)
            solvers = [_ridge(gram, chosen, residual.dtype) for gram in grams]
            changes = [torch.zeros(b.weight.shape[::-1], dtype=torch.float64, device=residual.device) for b in solved]
            _descend(solved, solvers, share, residual, changes, sweeps=sweeps, tolerance=tolerance)
            del solvers
        del grams
    if not used:
        return unchanged("the held-out calibration text is not fitted better")
    new = {}
    for at, block in enumerate(solved):
        weight = block.weight.double() * (1 + factor_of.get(block.name, 0.0))
        new[block.name] = (weight + changes[at].T if changes else weight).to(block.weight.dtype)
    del residual, changes
    after = losses(_residual(blocks, [new.get(b.name, b.weight) for b in blocks], target))
    counting = of_corpus > 0
    if not bool((after[counting] <= before[counting]).all()) or torch.equal(after[counting], before[counting]):
        return unchanged("some corpus of the calibration text is not fitted better in the dtype of the weights")
    return Fit(new, before.tolist(), after.tolist(), used, kept)


def _chosen(
    blocks: Sequence[Block], grams: Sequence[torch.Tensor], share: torch.Tensor, held: torch.Tensor,
    residual: torch.Tensor, penalties: Sequence[float],
) -> float | None:  # fmt: skip
    """The penalty whose fit on the other tokens is best on the held ones; None where none is better than no change.

    Every column of the output is a problem of its own with the same matrices, so random projections of the columns say
    how large the error of all of them is.
    """
    import torch

    hidden, device = residual.shape[1], residual.device
    if hidden > SKETCH:
        generator = torch.Generator().manual_seed(0)
        sketch = torch.randn(hidden, SKETCH, generator=generator, dtype=torch.float64).to(device) / SKETCH**0.5
    else:
        sketch = torch.eye(hidden, dtype=torch.float64, device=device)
    small = residual @ sketch.to(residual.dtype)
    changes = [torch.zeros(b.weight.shape[1], sketch.shape[1], dtype=torch.float64, device=device) for b in blocks]
    best, chosen = float((_squares(small) * share * held).sum()), None
    for penalty in penalties:
        solvers = [_ridge(gram, penalty, small.dtype) for gram in grams]
        _descend(blocks, solvers, share * ~held, small, changes, sweeps=TRIAL_SWEEPS, tolerance=TOLERANCE)
        del solvers  # before the next ones are made
        if (loss := float((_squares(small) * share * held).sum())) < best:
            best, chosen = loss, penalty
        elif chosen is not None:
            break  # beyond the best one
    return chosen
