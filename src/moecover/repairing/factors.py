"""The best factor for the output of every block of a layer, jointly for all blocks, and its penalty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moecover.repairing.parts import Part
from moecover.repairing.sums import Block, moments

if TYPE_CHECKING:
    import torch


def best_factors(
    blocks: Sequence[Block],
    residual: torch.Tensor,
    share: torch.Tensor,
    held: torch.Tensor,
    penalties: Sequence[float],
    *,
    everything: bool = True,
    any_held: bool,
    part: Part,
) -> tuple[torch.Tensor, float] | None:
    """Solve for the factors that the blocks' outputs are multiplied by.

    The square of the output that a factor adds is penalised. The penalty is chosen on the held-out tokens, then the
    factors are solved for on all tokens.

    Args:
        blocks: that may change.
        residual: target minus the output of all blocks, ``[token, hidden]``.
        share: the tokens' weight, float64 ``[token]``.
        held: which tokens are held out, bool ``[token]``.
        penalties: strongest first.
        everything: whether the held-out tokens are solved on too, with the penalty that they chose.
        any_held: whether a token is held out, in any process; else the last penalty is taken.
        part: the tokens among those of all processes.

    Returns:
        Factors minus 1, float64 ``[block]``, and the penalty; None where no penalty is better on the held-out tokens
        than no change.
    """
    import torch

    found = moments(blocks, residual, torch.stack([share * ~held, share * held]))
    products, right, energy = map(part.total, (found.products, found.right, found.energy))
    if not any_held:
        return part.of_first(_solved(products[0], right[0], penalties[-1])), penalties[-1]
    best, chosen = float(energy[1]), None
    for penalty in penalties:
        trial = _solved(products[0], right[0], penalty)
        loss = float(part.of_first(energy[1] - 2 * trial @ right[1] + trial @ products[1] @ trial))
        if loss < best:
            best, chosen = loss, penalty
        elif chosen is not None:
            break  # beyond the best one
    if chosen is None:
        return None
    fitted = slice(None) if everything else slice(1)
    return part.of_first(_solved(products[fitted].sum(0), right[fitted].sum(0), chosen)), chosen


def _solved(products: torch.Tensor, right: torch.Tensor, penalty: float) -> torch.Tensor:
    import torch

    system = (products + penalty * torch.diag(products.diagonal())).cpu()
    found: torch.Tensor = torch.linalg.lstsq(system, right.cpu()[:, None], driver="gelsd").solution[:, 0]
    return found.to(products.device)
