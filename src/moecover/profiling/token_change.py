"""How far the routed experts turn a token: reads the hidden states around a MoE block, gives a number a token.

With x the residual stream that the block adds to and r the sum of its routed experts' weighted outputs, the change is
c(x) = max(1 - cos(x, x + r), 0); shared experts are left out (EASY-EP, arXiv 2504.06792, as its authors' code has it).

x is the input of the module whose output enters the block, the norm of a pre-norm decoder layer. Where none of the
layer's modules gives what enters the block, nothing is recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from moecover.checkpoints.structure import Structure
from moecover.runtime.devices import has_float64

ROWS = 512  # that are in float64 at a time


class Change:
    """The change of the tokens of one MoE layer.

    Attributes:
        values: float64 ``[token]`` of the last batch; None where the residual stream is not seen.
    """

    def __init__(self) -> None:
        self.values: torch.Tensor | None = None
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None  # input and output of the module before the block
        self._residual: torch.Tensor | None = None

    def clear(self) -> None:
        """Discard the batch."""
        self.values = self._seen = self._residual = None

    def after_sibling(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook after every other module of the decoder layer."""
        if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
            self._seen = args[0], output

    def before_block(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """Hook before the block."""
        before, self._seen, self._residual = self._seen, None, None
        if before is not None and args and before[1] is args[0] and before[0].shape == before[1].shape:
            self._residual = before[0]

    def after_experts(self, routed: torch.Tensor) -> None:
        """What the routed experts add, ``[token, hidden]``."""
        residual, self._residual, self.values = self._residual, None, None
        if residual is not None and residual.numel() == routed.numel():
            rows = torch.split(residual.reshape(routed.shape), ROWS), torch.split(routed, ROWS)
            self.values = torch.cat([_turned(before, added) for before, added in zip(*rows, strict=True)])


def _turned(before: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """1 - cos(x, x + r) of every row, float64 ``[token]``, without the cancellation of a cosine near 1."""
    device = before.device if has_float64(before.device) else torch.device("cpu")
    x, r = before.to(device, torch.float64), added.to(device, torch.float64)
    xx, xr, rr = ((a * b).sum(-1) for a, b in ((x, x), (x, r), (r, r)))
    lengths = (xx * (xx + 2 * xr + rr)).clamp_(min=0).sqrt_()  # ||x|| ||x + r||
    cosine = (xx + xr) / (lengths + (lengths == 0))
    squared_sine = ((xx * rr - xr.square()) / (lengths.square() + (lengths == 0))).clamp_(min=0)
    return torch.where(cosine > 0, squared_sine / (1 + cosine), 1 - cosine)


@contextlib.contextmanager
def watching(model: torch.nn.Module, structure: Structure, layer: int) -> Iterator[Change]:
    """Watch the residual stream of a MoE layer until the block ends.

    Args:
        model: the live model.
        structure: its checkpoint.
        layer: index of the MoE layer.
    """
    change, parts = Change(), structure.experts_modules[layer].split(".")
    number = str(structure.topology.decoder_layers[layer])
    at = len(parts) - 1 - parts[::-1].index(number) if number in parts else None
    if at is None or at + 2 > len(parts):
        yield change
        return
    decoder = model.get_submodule(".".join(parts[: at + 1]))
    block = decoder.get_submodule(parts[at + 1])
    handles = [block.register_forward_pre_hook(change.before_block)]
    handles += [m.register_forward_hook(change.after_sibling) for m in decoder.children() if m is not block]
    try:
        yield change
    finally:
        for handle in handles:
            handle.remove()
