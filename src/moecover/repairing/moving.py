"""The refit of a live MoE block: reads its parameters, runs it with other ones, gives those that are better.

The layer is masked and solved in closed form already (`layers`). The parameters of the experts module are taken for the
kept experts only; a step spreads them over all experts' places, which the router's ids name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moecover.repairing.applied import LayerRepair
from moecover.repairing.refit import refit

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.structure import Structure
    from moecover.repairing.block_tensors import Parameters
    from moecover.repairing.calibration import Calibration


@contextlib.contextmanager
def restored(block: torch.nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Give a block its own forward, until the context exits."""
    other = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if other is None:
            block.__dict__.pop("forward")
        else:
            block.forward = other


def moved_block(
    model: torch.nn.Module,
    structure: Structure,
    layer: int,
    kept: Sequence[int],
    where: Parameters,
    solved: LayerRepair,
    inputs: torch.Tensor,
    target: torch.Tensor,
    calibration: Calibration,
) -> LayerRepair:
    """Refit all parameters of a block, see `refit`.

    Args:
        model: the layer's weights are in memory, masked, with ``solved`` in place.
        structure: the original.
        layer: index of the MoE layer.
        kept: ids of the kept experts, ascending.
        where: the block's parameters, and the dtypes in which they are stored.
        solved: the repair in closed form.
        inputs: of the block, ``[token, hidden]``.
        target: the original's output, ``[token, hidden]``.
        calibration: how the tokens count.

    Returns:
        The repair with all parameters; ``solved`` where the held-out tokens are not fitted better.
    """
    import torch

    inside = f"{structure.experts_modules[layer]}."
    name = inside[:-1].rpartition(".")[0]
    block = model.get_submodule(name)
    with torch.inference_mode(False), torch.no_grad():  # what a gradient passes through is no tensor of inference mode
        ids = torch.tensor(list(kept), device=inputs.device)
        others = {key: (b.float() if b.is_floating_point() else b).clone() for key, b in block.named_buffers()}
        start = {
            key: model.get_parameter(key)[ids] if key.startswith(inside) else model.get_parameter(key) for key in where
        }
    places = {key: len(model.get_parameter(key)) for key in where if key.startswith(inside)}

    def run(values: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        whole = {key: _spread(value, ids, places[key]) if key in places else value for key, value in values.items()}
        given = {key.removeprefix(f"{name}."): value for key, value in whole.items()}
        output: torch.Tensor = torch.func.functional_call(block, {**others, **given}, (hidden[None],))
        return output.reshape(hidden.shape)

    dtypes = {key: getattr(torch, rows[0].dtype) for key, rows in where.items()}
    found = refit(run, start, inputs, target, calibration, dtypes, solved.fit.before)
    if found is None:
        return solved
    fit = replace(solved.fit, weights={}, after=found.errors, kept={})
    return LayerRepair(solved.decoder_layer, {}, None, fit, found.values, tuple(kept), found.held)


def _spread(values: torch.Tensor, ids: torch.Tensor, number: int) -> torch.Tensor:
    """The rows of the kept experts at their places among all of them."""
    return values.new_zeros(number, *values.shape[1:]).index_copy(0, ids, values)
