"""Ridge regression of one layer's down projections: block coordinate descent with exact solves, and its penalty.

Minimised is the weighted squared residual over all tokens plus a penalty on the change of every block's weights. The
blocks are solved in turn; what couples them is the residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.repairing.parts import Part
from moecover.repairing.sums import Block, gram, squares

if TYPE_CHECKING:
    import torch

SKETCH = 32  # random directions of the output that the penalty is chosen on
TRIAL_SWEEPS = 2  # for every penalty tried
TOLERANCE = 1e-2  # stop after a sweep that lowers the objective by a smaller share


@dataclass(frozen=True)
class _Solver:
    """Exact solves for one block.

    Attributes:
        pull: weight of the penalty, ``penalty`` times the mean of the Gram matrix's diagonal.
        factor: Cholesky factor of the Gram matrix plus ``pull``; None where it could not be factorised.
        system: the matrix itself in that case.
    """

    pull: float
    factor: torch.Tensor | None
    system: torch.Tensor | None

    def step(self, slope: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """How far a block's change moves.

        Args:
            slope: how the error falls there, ``[width, hidden]``; overwritten.
            change: of the block's weights so far, the same shape.
        """
        import torch

        right = slope.add_(change, alpha=-self.pull)
        if self.factor is not None:
            return torch.cholesky_solve(right.to(self.factor.dtype), self.factor)
        assert self.system is not None
        # The penalty is below the rounding of a singular Gram matrix.
        solution: torch.Tensor = torch.linalg.lstsq(self.system.cpu(), right.cpu(), driver="gelsd").solution
        return solution.to(right.device)

    def cost(self, change: torch.Tensor) -> float:
        """The penalty of a change."""
        return float(self.pull * change.square().sum())


def _system(matrix: torch.Tensor, pull: float) -> torch.Tensor:
    """A Gram matrix plus the weight of the penalty."""
    system = matrix.clone()
    system.diagonal().add_(pull)
    return system


def _factor(system: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The Cholesky factor of a matrix in a dtype; None where it could not be factorised."""
    import torch

    factor, failed = torch.linalg.cholesky_ex(system)
    return None if bool(failed) else factor.to(dtype)


def _solvers(grams: Sequence[torch.Tensor], penalty: float, dtype: torch.dtype, part: Part) -> list[_Solver]:
    """The solvers of blocks from their Gram matrices; steps are solved for in ``dtype``.

    The factor of a matrix that some process could not factorise is used by none: all of them take the same steps.
    """
    import torch

    pulls = [float(penalty * matrix.diagonal().mean()) for matrix in grams]
    factors = [_factor(_system(matrix, pull), dtype) for matrix, pull in zip(grams, pulls, strict=True)]
    failed = part.total(torch.tensor([int(factor is None) for factor in factors], device=grams[0].device)).tolist()
    return [
        _Solver(pull, None, _system(matrix, pull)) if fails else _Solver(pull, factor, None)
        for matrix, pull, factor, fails in zip(grams, pulls, factors, failed, strict=True)
    ]


def ridge_changes(
    blocks: Sequence[Block],
    share: torch.Tensor,
    held: torch.Tensor,
    residual: torch.Tensor,
    penalties: Sequence[float],
    *,
    sweeps: int,
    tolerance: float,
    everything: bool = True,
    any_held: bool,
    part: Part,
) -> tuple[list[torch.Tensor], float | None]:
    """Solve for the changes of the blocks' weights, with a penalty that is chosen on held-out tokens.

    Args:
        blocks: that may change.
        share: the tokens' weight, float64 ``[token]``.
        held: which tokens are held out, bool ``[token]``.
        residual: target minus the output of all blocks, ``[token, hidden]``; brought up to date in place.
        penalties: strongest first.
        sweeps: at most this many turns of all blocks.
        tolerance: see `TOLERANCE`.
        everything: whether the held-out tokens are solved on too, with the penalty that they chose.
        any_held: whether a token is held out, in any process; else the last penalty is taken.
        part: the tokens among those of all processes.

    Returns:
        Changes, float64 ``[width, hidden]`` each, and the penalty; no changes and None where no penalty is better on
        the held-out tokens than no change.
    """
    import torch

    grams = [part.total(gram(block, share, ~held)) for block in blocks]
    penalty = _best_penalty(blocks, grams, share, held, residual, penalties, part) if any_held else penalties[-1]
    if penalty is None:
        return [], None
    if not everything:
        share = share * ~held
    elif any_held:
        for matrix, block in zip(grams, blocks, strict=True):
            matrix += part.total(gram(block, share, held))
    solvers = _solvers(grams, penalty, residual.dtype, part)
    changes = [torch.zeros(b.weight.shape[::-1], dtype=torch.float64, device=residual.device) for b in blocks]
    _descend(blocks, solvers, share, residual, changes, sweeps=sweeps, tolerance=tolerance, part=part)
    return changes, penalty


def _descend(
    blocks: Sequence[Block],
    solvers: Sequence[_Solver],
    share: torch.Tensor,
    residual: torch.Tensor,
    changes: list[torch.Tensor],
    *,
    sweeps: int,
    tolerance: float,
    part: Part,
) -> None:
    """Solve block after block until the objective settles; ``residual`` and ``changes`` are updated in place."""
    import torch

    def objective() -> float:
        """The error of all processes, with the penalty that the first one has computed."""
        costs = sum(solver.cost(change) for solver, change in zip(solvers, changes, strict=True))
        error = (squares(residual) * share).sum()
        return float(part.total(error + costs if part.here.rank == 0 else error))

    last, weights = objective(), share.to(residual.dtype)
    for _ in range(sweeps):
        for at, (block, solver) in enumerate(zip(blocks, solvers, strict=True)):
            slope = torch.zeros_like(changes[at])
            for tokens, features in block.chunks():
                slope += features.T @ residual[tokens].mul_(weights[tokens, None])
            slope = part.total(slope)
            step = solver.step(slope, changes[at])
            del slope
            if not part.everywhere(bool(torch.isfinite(step).all())):
                continue
            changes[at] += step
            small = step.to(residual.dtype)
            for tokens, features in block.chunks():
                residual.index_add_(0, tokens, features @ small, alpha=-1)
        now = objective()
        if last - now <= tolerance * last:
            break
        last = now


def _best_penalty(
    blocks: Sequence[Block],
    grams: Sequence[torch.Tensor],
    share: torch.Tensor,
    held: torch.Tensor,
    residual: torch.Tensor,
    penalties: Sequence[float],
    part: Part,
) -> float | None:
    """The penalty whose fit on the other tokens is best on the held-out ones; None where none beats no change.

    Every column of the output is a problem of its own with the same matrices, so random projections of the columns
    estimate the error of all of them.
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
    best, chosen = float(part.total((squares(small) * share * held).sum())), None
    for penalty in penalties:
        solvers = _solvers(grams, penalty, small.dtype, part)
        _descend(blocks, solvers, share * ~held, small, changes, sweeps=TRIAL_SWEEPS, tolerance=TOLERANCE, part=part)
        del solvers  # before the next ones are made
        if (loss := float(part.total((squares(small) * share * held).sum()))) < best:
            best, chosen = loss, penalty
        elif chosen is not None:
            break  # beyond the best one
    return chosen
