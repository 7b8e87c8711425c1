"""Sums over the tokens of one MoE layer that its repair is solved from: Gram matrices, products of outputs, residuals.

Products are formed in the dtype of the features, `CHUNK` rows at a time, and added up in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CHUNK = 4096  # rows at a time
PRODUCTS = 2**24  # numbers of the blocks' outputs that are held at a time


@dataclass(frozen=True)
class Block:
    """One expert as the layer's output sees it: ``weight @ features[i]`` is added to token ``tokens[i]``.

    Attributes:
        name: for messages and results.
        weight: original down projection ``[hidden, width]``, in the dtype in which it is stored.
        tokens: int64 ``[row]``, no token twice.
        features: intermediate activations times routing weight ``[row, width]``, float32 or float64, in which products
            are formed.
    """

    name: str
    weight: torch.Tensor
    tokens: torch.Tensor
    features: torch.Tensor

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield tokens and features, `CHUNK` rows at a time."""
        import torch

        return zip(torch.split(self.tokens, CHUNK), torch.split(self.features, CHUNK), strict=True)


@dataclass(frozen=True)
class Moments:
    """Weighted sums over tokens for each of some parts of them.

    Attributes:
        products: of the blocks' outputs with each other, float64 ``[part, block, block]``.
        right: of the blocks' outputs with the residual, float64 ``[part, block]``.
        energy: squared residual, float64 ``[part]``.
    """

    products: torch.Tensor
    right: torch.Tensor
    energy: torch.Tensor


def squares(values: torch.Tensor) -> torch.Tensor:
    """Squared norm of every row, float64 ``[row]``."""
    import torch

    return torch.cat([part.double().square().sum(1) for part in torch.split(values, CHUNK)])


def all_finite(arrays: Iterable[torch.Tensor]) -> bool:
    """Whether all numbers are finite."""
    import torch

    return all(bool(torch.isfinite(part).all()) for values in arrays for part in torch.split(values, CHUNK))


def residual_of(blocks: Sequence[Block], weights: Iterable[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Target minus the output of the blocks with some weights.

    Args:
        blocks: tokens and features.
        weights: of every block, ``[hidden, width]``.
        target: ``[token, hidden]``.

    Returns:
        ``[token, hidden]`` in the dtype of the features.
    """
    residual = target.to(blocks[0].features.dtype, copy=True)
    for block, weight in zip(blocks, weights, strict=True):
        matrix = weight.to(residual.dtype).T
        for tokens, features in block.chunks():
            residual.index_add_(0, tokens, features @ matrix, alpha=-1)
    return residual


def gram(block: Block, share: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Weighted second moments of the features of some tokens, float64 ``[width, width]``.

    Args:
        block: the features.
        share: the tokens' weight ``[token]``.
        part: which tokens, bool ``[token]``.
    """
    import torch

    width = block.features.shape[1]
    found = torch.zeros(width, width, dtype=torch.float64, device=block.features.device)
    strip = -(-width // 4)  # of a symmetric matrix only the strips from the diagonal on: 10 of 16 parts of the products
    for rows in torch.split(part[block.tokens].nonzero()[:, 0], CHUNK):
        features = block.features[rows]
        weighted = features * share[block.tokens[rows], None].to(features.dtype)
        for at in range(0, width, strip):
            found[at : at + strip, at:] += weighted[:, at : at + strip].T @ features[:, at:]
    found.triu_()
    found += found.triu(1).T
    return found


def moments(blocks: Sequence[Block], residual: torch.Tensor, shares: torch.Tensor) -> Moments:
    """Weighted products of the blocks' outputs with each other and with the residual.

    Args:
        blocks: their tokens in any order.
        residual: ``[token, hidden]``.
        shares: weights of the tokens, float64 ``[part, token]``; every part has sums of its own.
    """
    import torch

    number, hidden, device = len(blocks), residual.shape[1], residual.device
    products = torch.zeros(len(shares), (number + 1) ** 2, dtype=torch.float64, device=device)
    right = torch.zeros(len(shares), number + 1, dtype=torch.float64, device=device)
    energy = torch.zeros(len(shares), dtype=torch.float64, device=device)
    outputs_of = _Outputs(blocks)
    size = min(max(1, PRODUCTS // (max(outputs_of.slots, 1) * hidden)), CHUNK // 4)
    for first in range(0, len(residual), size):
        last = min(first + size, len(residual))
        outputs, owners = outputs_of.between(first, last, residual)
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
    square = products.view(-1, number + 1, number + 1)[:, :number, :number]
    return Moments(square, right[:, :number], energy)


class _Outputs:
    """What blocks give for consecutive tokens.

    Attributes:
        slots: the most blocks that one token has.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        import torch

        self._blocks = blocks
        self._orders = [torch.argsort(block.tokens) for block in blocks]
        self._tokens = [block.tokens[order] for block, order in zip(blocks, self._orders, strict=True)]
        self._weights = [block.weight.to(block.features.dtype).T for block in blocks]
        self.slots = int(torch.bincount(torch.cat(self._tokens), minlength=1).max())

    def between(self, first: int, last: int, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs ``[token, slot, hidden]`` and the block index of every slot, the number of blocks in an empty one."""
        import torch

        device, hidden = residual.device, residual.shape[1]
        outputs = torch.zeros(last - first, self.slots, hidden, dtype=residual.dtype, device=device)
        owners = torch.full((last - first, self.slots), len(self._blocks), device=device)
        filled = torch.zeros(last - first, dtype=torch.int64, device=device)
        ends = torch.tensor([first, last], device=device)
        for at, block in enumerate(self._blocks):
            begin, end = torch.searchsorted(self._tokens[at], ends).tolist()
            tokens = self._tokens[at][begin:end] - first
            outputs[tokens, filled[tokens]] = block.features[self._orders[at][begin:end]] @ self._weights[at]
            owners[tokens, filled[tokens]] = at
            filled[tokens] += 1
        return outputs, owners
