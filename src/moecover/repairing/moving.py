"""The refit of a live MoE block: reads its parameters, runs it with other ones, gives those that are better.

The layer is masked, and solved in closed form (`layers`). The parameters of the experts module are taken for the kept
experts only; a step spreads them over all experts' places, which the router's ids name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moecover.repairing.applied import LayerRepair, repaired_layer
from moecover.repairing.refit import refit

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.structure import Structure
    from moecover.repairing.calibration import Calibration
    from moecover.repairing.targets import Place


def moved_block(
    model: torch.nn.Module,
    structure: Structure,
    layer: int,
    place: Place,
    kept: Sequence[int],
    solved: tuple[LayerRepair, LayerRepair],
    inputs: torch.Tensor,
    target: torch.Tensor,
    calibration: Calibration,
) -> LayerRepair:
    """Refit all parameters of a block, see `refit`.

    Args:
        model: the layer's weights are in memory, masked.
        structure: the original.
        layer: index of the MoE layer.
        place: where the block's parameters are stored.
        kept: ids of the kept experts, ascending.
        solved: the repair in closed form, without the tokens that are held out and with them.
        inputs: of the block, ``[token, hidden]``.
        target: the original's output, ``[token, hidden]``.
        calibration: how the tokens count.

    Returns:
        The repair with all parameters; the second of ``solved`` where steps do not help on the held-out tokens.
    """
    import torch

    where, inside = place.parameters, f"{structure.experts_modules[layer]}."
    assert not isinstance(where, str)
    name = inside[:-1].rpartition(".")[0]
    block = model.get_submodule(name)
    with torch.inference_mode(False), torch.no_grad():  # what a gradient passes through is no tensor of inference mode
        ids = torch.tensor(list(kept), device=inputs.device)
        others = {key: (b.float() if b.is_floating_point() else b).clone() for key, b in block.named_buffers()}
        starts = []
        for one in solved:
            with repaired_layer(model, structure, layer, one):
                values = {key: model.get_parameter(key) for key in where}
                starts.append(
                    {key: (v[ids] if key.startswith(inside) else v).float().clone() for key, v in values.items()}
                )
    places = {key: len(model.get_parameter(key)) for key in where if key.startswith(inside)}

    def run(values: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        whole = {key: _spread(value, ids, places[key]) if key in places else value for key, value in values.items()}
        given = {key.removeprefix(f"{name}."): value for key, value in whole.items()}
        output: torch.Tensor = torch.func.functional_call(block, {**others, **given}, (hidden[None],))
        return output.reshape(hidden.shape)

    dtypes, final = {key: getattr(torch, rows[0].dtype) for key, rows in where.items()}, solved[1]
    found = refit(run, starts[0], starts[1], inputs, target, calibration, dtypes, final.fit.before)
    if found is None:
        return final
    fit = replace(final.fit, weights={}, after=found.errors, kept={})
    return LayerRepair(final.decoder_layer, {}, None, fit, found.values, tuple(kept), found.held)


def _spread(values: torch.Tensor, ids: torch.Tensor, number: int) -> torch.Tensor:
    """The rows of the kept experts at their places among all of them."""
    return values.new_zeros(number, *values.shape[1:]).index_copy(0, ids, values)
