"""Energy of the experts' channels: reads what enters their down projections, gives one sum an expert and channel.

A channel is one entry of h = act(gate x) * up x, the input of the down projection. The energy of channel j of an expert
is the sum over its tokens of g^2 h_j^2 ||W_down[:, j]||^2, with the routing weight g of the output: the squared norm of
what the channel adds to the layer's output (before the norm, in families that normalise the output of an expert).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.structure import Structure
from moecover.profiling.reductions import Buffers, scratch, weighted_squares
from moecover.runtime.devices import has_float64
from moecover.runtime.finite import is_finite

if TYPE_CHECKING:
    import torch


def width_of(model: torch.nn.Module, structure: Structure) -> int | None:
    """Number of channels of every expert of a model, which may be on ``meta``.

    None where the experts are not gated MLPs of one width, hold their weights in eight bits or fewer, or compute in a
    way in which h cannot be seen.
    """
    widths = {_width(model.get_submodule(name)) for name in structure.experts_modules}
    return widths.pop() if len(widths) == 1 else None


def _width(experts: Any) -> int | None:
    import torch

    up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not isinstance(up, torch.Tensor) or not isinstance(down, torch.Tensor) or up.dim() != 3 or down.dim() != 3:
        return None
    if not down.is_floating_point() or down.element_size() == 1:
        return None
    if not hasattr(experts, "_apply_gate") and len(inspect.signature(experts.forward).parameters) != 1:
        return None
    if _is_transposed(experts):
        return down.shape[1] if up.shape[1:] == (down.shape[2], 2 * down.shape[1]) else None
    return down.shape[2] if up.shape[1:] == (2 * down.shape[2], down.shape[1]) else None


def down_projections(experts: Any) -> torch.Tensor:
    """The stacked down projections of a module of experts, ``[expert, hidden, channel]``."""
    down: torch.Tensor = experts.down_proj
    return down.transpose(1, 2) if _is_transposed(experts) else down


def _is_transposed(experts: Any) -> bool:
    """Whether the weights are ``[expert, in, out]`` and not ``[expert, out, in]``."""
    return bool(experts.gate_up_proj.shape[1] == experts.down_proj.shape[2])


class Channels:
    """The channels of one MoE layer, batch by batch.

    Args:
        number: of experts.
        columns: gives the down projection of every expert in turn, ``[hidden, channel]``; called when the layer first
            runs.
        width: channels of an expert.
        buffers: scratch memory, shared by all layers.

    Attributes:
        squares: sum of g^2 h^2 in the batch, float32 (float64 where that overflows) ``[expert, channel]``; None before
            the layer has run.
    """

    def __init__(
        self,
        number: int,
        columns: Callable[[], Iterable[torch.Tensor]],
        width: int,
        buffers: Buffers,
    ) -> None:
        self._number, self._columns, self._width, self._buffers = number, columns, width, buffers
        self._norms: torch.Tensor | None = None  # of the columns, squared, [expert, channel]
        self.squares: torch.Tensor | None = None

    def record(
        self, values: torch.Tensor, factors: torch.Tensor, experts: torch.Tensor, keep: torch.Tensor | None
    ) -> None:
        """Record a batch, sorted by expert.

        Args:
            values: h, ``[pair, channel]``.
            factors: g, ``[pair]``.
            experts: ascending int64 ``[pair]``.
            keep: bool ``[pair]``, False for padding; None where every pair counts.
        """
        self.squares = self._finite(
            values.device,
            lambda buffer: weighted_squares(
                values.to(buffer.device),
                factors.to(buffer.device),
                experts.to(buffer.device),
                self._number,
                buffer,
                None if keep is None else keep.to(buffer.device),
            ),
        )
        if self._norms is None:
            self._norms = self._finite(values.device, self._squared_norms)

    def _squared_norms(self, buffer: torch.Tensor) -> torch.Tensor:
        """Squared norms of the columns of all down projections, ``[expert, channel]``."""
        import torch

        def of_one(columns: torch.Tensor) -> torch.Tensor:
            ones = buffer.new_ones(len(columns))
            return weighted_squares(columns, ones, torch.zeros_like(ones, dtype=torch.int64), 1, buffer)

        return torch.cat([of_one(columns.to(buffer.device)) for columns in self._columns()])

    def _finite(self, device: torch.device, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What is computed through a float32 buffer, or through one of float64 where that overflows."""
        import torch

        buffer = scratch(self._buffers, self._width, device)
        if is_finite(found := compute(buffer)):
            return found
        return compute(torch.empty_like(buffer, dtype=torch.float64, device=device if has_float64(device) else "cpu"))

    def energy(self, device: torch.device) -> torch.Tensor:
        """Energies of the batch, float64 ``[expert, channel]``, on a device; 0 where no token went to the expert."""
        assert self.squares is not None
        assert self._norms is not None
        squares, norms = self.squares.to(device).double(), self._norms.to(device).double()
        return (squares * norms).masked_fill_(squares == 0, 0)


@contextlib.contextmanager
def entering(experts: Any) -> Iterator[list[torch.Tensor]]:
    """What is multiplied by the stacked down projections within the block, ``[expert, token, channel]``, in order."""
    import torch
    from torch.overrides import TorchFunctionMode

    seen, down = list[torch.Tensor](), getattr(experts, "down_proj", None)

    class Products(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if len(args) > 1 and args[1] is down and isinstance(args[0], torch.Tensor) and down is not None:
                seen.append(args[0])
            return function(*args, **(kwargs or {}))

    with Products():
        yield seen
