"""One MoE layer as a subset search sees it: Gram matrices of the expert outputs, from which any subset's loss follows.

ExpertSparsity (arXiv 2402.14800) scores a subset S by the sum over calibration batches of ||Z - Z_S||_F, with Z the
routed output and Z_S the output when the dropped experts' router logits are minus infinity before scoring and top-k.
Z - Z_S is a combination of expert outputs, so that their Gram matrices turn the loss of a subset into small products.
Where Z is not the layer's own output on these inputs but a given target, the target has a row of the Gram matrix too,
behind the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moecover.planning.search.routing import Routing
from moecover.runtime.finite import is_finite, not_finite
from moecover.runtime.segments import segment_sums

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.topology import Topology

CHUNK_BYTES = 2**28  # of expert outputs held at a time


def peak_bytes(topology: Topology, tokens: int) -> int:
    """Bytes that a search of a layer takes at most, see `Products`, with the hidden states of both passes."""
    return tokens * (8 * topology.num_experts**2 + 16 * topology.hidden_size) + 2 * CHUNK_BYTES


class Products:
    """One MoE layer as its loss sees it: Gram matrix of the expert outputs and router scores of every token.

    Memory: 8 T N^2 bytes for T tokens and N experts, and `CHUNK_BYTES` while it is built.

    Args:
        experts: the experts module.
        routing: of the layer's router.
        hidden: calibration batches, each ``[token, hidden]``.
        logits: the router's, ``[token, expert]``, over all batches.
        target: Z of every token, ``[token, hidden]``; None for the layer's own output with all experts.

    Raises:
        InputError: an expert's output is not finite.
    """

    def __init__(
        self,
        experts: torch.nn.Module,
        routing: Routing,
        hidden: Sequence[torch.Tensor],
        logits: torch.Tensor,
        target: torch.Tensor | None = None,
    ) -> None:
        import torch

        tokens = torch.cat(list(hidden))
        device, (count, num_experts) = tokens.device, logits.shape
        self.routing, self.num_experts = routing, num_experts
        self.batch = torch.repeat_interleave(
            torch.arange(len(hidden), device=device), torch.tensor([len(h) for h in hidden], device=device)
        )
        self.num_batches = len(hidden)
        self.scores = routing.scores(logits)
        order = routing.choice(self.scores) if routing.num_groups == 1 else self.scores
        rank = torch.sort(order, dim=-1, descending=True, stable=True).indices
        self.rank = torch.empty_like(rank).scatter_(
            -1, rank, torch.arange(num_experts, device=device).expand_as(rank).contiguous()
        )
        rows = num_experts + (target is not None)
        self.gram = torch.empty(count, rows, rows, dtype=torch.float64, device=device)
        step = max(1, CHUNK_BYTES // (num_experts * tokens.shape[-1] * tokens.element_size()))
        ones = torch.ones(step, 1, dtype=tokens.dtype, device=device)
        for start in range(0, count, step):
            chunk = tokens[start : start + step]
            outputs = torch.empty(len(chunk), rows, tokens.shape[-1], dtype=tokens.dtype, device=device)
            if target is not None:
                outputs[:, num_experts] = target[start : start + step]
            for expert in range(num_experts):
                index = torch.full((len(chunk), 1), expert, device=device)
                outputs[:, expert] = experts(chunk, index, ones[: len(chunk)])
            for first in range(0, len(chunk), 64):
                wide = outputs[first : first + 64].double()
                torch.bmm(wide, wide.transpose(1, 2), out=self.gram[start + first : start + first + len(wide)])
        if not is_finite(self.gram):
            bad = (~torch.isfinite(self.gram.diagonal(dim1=1, dim2=2))).any(0).nonzero().flatten().tolist()
            named = ", ".join(map(str, [expert for expert in bad if expert < num_experts][:8]))
            raise not_finite(f"expert {named}" if named else "", "the output on the calibration text is")
        everyone = torch.ones(1, num_experts, dtype=torch.bool, device=device)
        index, weights = self.route(everyone)
        self.index, self.weights = index[0], weights[0]
        if target is not None:
            self.index, self.weights = torch.full_like(index[0, :, :1], num_experts), torch.ones_like(weights[0, :, :1])

    def route(self, alive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts and weights of every token in each set, ``[set, token, slot]``; ``alive``: bool ``[set, expert]``."""
        import torch

        k, sets = self.routing.top_k, alive[:, None, :]
        if self.routing.num_groups == 1:
            index = torch.where(sets, self.rank, self.num_experts).topk(k, -1, largest=False).indices
        else:
            choice = self.routing.choice(torch.where(sets, self.scores, -torch.inf))
            index = torch.sort(choice, dim=-1, descending=True, stable=True).indices[..., :k]
        scores = self.scores.expand(len(alive), -1, -1)
        total = (scores * sets).sum(-1, keepdim=True)
        return index, self.routing.weights(scores.gather(-1, index), total)

    def _distances(self, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """||z - z_S||^2 of tokens ``[..., token]`` from experts and weights ``[..., token, slot]``."""
        import torch

        index = torch.cat([self.index.expand(*index.shape[:-1], -1), index], -1)
        delta = torch.cat([-self.weights.expand(*weights.shape[:-1], -1), weights], -1)
        token = torch.arange(len(self.gram), device=index.device)[:, None, None]
        gram = self.gram[token, index[..., :, None], index[..., None, :]]
        return torch.einsum("...i,...ij,...j->...", delta, gram, delta)

    def _summed(self, distances: torch.Tensor) -> torch.Tensor:
        """Sum over batches of the Frobenius norms, from squared distances ``[token, column]``."""
        return segment_sums(distances, self.batch, self.num_batches).clamp_(min=0).sqrt_().sum(0)

    def losses(self, alive: torch.Tensor) -> torch.Tensor:
        """Loss of every set, float64 ``[set]``; ``alive`` is bool ``[set, expert]``."""
        import torch

        step = max(1, 2**23 // (len(self.gram) * max(self.num_experts, 4 * self.routing.top_k**2)))
        return torch.cat([self._summed(self._distances(*self.route(sets)).T) for sets in torch.split(alive, step)])

    def losses_without(self, alive: torch.Tensor) -> torch.Tensor:
        """Loss after dropping each expert of one set, float64 ``[expert]``; ``alive`` is bool ``[expert]``.

        Only tokens that route to an expert are re-routed when it goes; where the router does not renormalise, the
        others' weights grow by one factor per token.
        """
        import torch

        if self.routing.num_groups > 1:
            without = alive & ~torch.eye(self.num_experts, dtype=torch.bool, device=alive.device)
            return self.losses(without)
        k, own, routing = self.routing.top_k, self.index.shape[-1], self.routing
        members = torch.where(alive, self.rank, self.num_experts).topk(k + 1, -1, largest=False).indices
        score = self.scores.gather(-1, members)  # [token, k + 1], the last one is the next in line
        total = (self.scores * alive).sum(-1, keepdim=True)
        now = routing.weights(score[:, :k], total)
        union = torch.cat([self.index, members], -1)
        token = torch.arange(len(self.gram), device=alive.device)[:, None, None]
        gram = self.gram[token, union[:, :, None], union[:, None, :]]  # [token, own + k + 1, own + k + 1]

        def distance(weights: torch.Tensor) -> torch.Tensor:  # [token, column, k + 1] -> [token, column]
            delta = torch.cat([-self.weights[:, None].expand(-1, weights.shape[1], -1), weights], -1)
            return torch.einsum("tsi,tij,tsj->ts", delta, gram, delta)

        zero = torch.zeros_like(now[:, :1])
        current = distance(torch.cat([now, zero], -1)[:, None])  # [token, 1]
        if routing.renormalise or routing.scoring != "softmax":
            after = current.expand(-1, self.num_experts).clone()
        else:
            kept = slice(own, own + k)
            old = torch.einsum("ti,tij,tj->t", self.weights, gram[:, :own, :own], self.weights)[:, None]
            mixed = torch.einsum("ti,tij,tj->t", self.weights, gram[:, :own, kept], now)[:, None]
            new = torch.einsum("ti,tij,tj->t", now, gram[:, kept, kept], now)[:, None]
            factor = total / (total - self.scores)  # [token, expert]
            after = old - 2 * factor * mixed + factor.square() * new
        slots = torch.arange(k, device=alive.device)
        others = torch.arange(k, device=alive.device).expand(k, -1) + (
            torch.arange(k, device=alive.device) >= slots[:, None]
        )
        left = score[:, others]  # [token, dropped slot, slot]
        moved = routing.weights(left, (total - score[:, :k])[..., None])
        weights = torch.zeros(*moved.shape[:2], k + 1, dtype=torch.float64, device=alive.device)
        weights.scatter_(-1, others.expand(len(score), -1, -1), moved)
        after.scatter_(-1, members[:, :k], distance(weights))
        return self._summed(after)


class WorstCorpusProducts(Products):
    """`Products` with the loss of the worst corpus: a batch is a whole corpus, its error is relative to its output."""

    def __init__(
        self,
        experts: torch.nn.Module,
        routing: Routing,
        hidden: Sequence[torch.Tensor],
        logits: torch.Tensor,
        target: torch.Tensor | None = None,
    ) -> None:
        import torch

        super().__init__(experts, routing, hidden, logits, target)
        token = torch.arange(len(self.gram), device=self.gram.device)[:, None, None]
        own = self.gram[token, self.index[:, :, None], self.index[:, None, :]]
        squares = torch.einsum("ti,tij,tj->t", self.weights, own, self.weights)
        self.output = segment_sums(squares, self.batch, self.num_batches).clamp_(min=torch.finfo(torch.float64).tiny)

    def _summed(self, distances: torch.Tensor) -> torch.Tensor:
        """The largest over corpora of the normalised errors, from squared distances ``[token, column]``."""
        squares = segment_sums(distances, self.batch, self.num_batches).clamp_(min=0)
        return (squares / self.output[:, None]).sqrt_().amax(0)
