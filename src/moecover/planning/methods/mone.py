"""MoNE's score: experts that are used much and whose outputs vary (arXiv 2507.00390, its authors' code)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moecover.planning.method import METHODS

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from moecover.checkpoints.structure import Structure
    from moecover.corpora.packing import Corpus
    from moecover.planning.artifact import LayerPlan
    from moecover.planning.search.live_layer import LiveLayer
    from moecover.planning.selection import Budget
    from moecover.profiling.artifact import Profile
    from moecover.runtime.running import Running


@METHODS("mone", label="MoNE's score", paper="arXiv 2507.00390", together=True, rank=8)
def mone(
    profile: Profile,
    budgets: Sequence[Budget],
    *,
    model: torch.nn.Module | Running,
    structure: Structure,
    sample: Sequence[Corpus] | None = None,
    advance: Callable[[int], None] = lambda layers: None,
) -> list[list[LayerPlan]]:
    """The experts with the highest routing weights times fluctuation of the output, on a sample of the text.

    The score is the sum of an expert's routing weights times the root of the total variance of its outputs over its
    tokens. The paper replaces the other experts by their mean outputs; here they are removed. It costs a pass of the
    sample through the experts that its tokens are routed to.

    Args:
        profile: of the model.
        budgets: experts to keep.
        model: the live model, from `load_model`, or a `Running` one.
        structure: its checkpoint.
        sample: token ids to run on instead of the sample that the profile keeps.
        advance: called with 1 after every layer.

    Raises:
        InputError: the model is not the profile's, or there is no sample.
    """
    import numpy as np

    from moecover.corpora.sources import ALL_CORPORA
    from moecover.planning.search.walk import over_layers
    from moecover.planning.selection import layer_plan, ranked

    scores = over_layers(_scores, profile, model, structure, sample=sample, advance=advance)
    utility = {ALL_CORPORA: np.stack(scores)}
    orders, plans = ranked(utility[ALL_CORPORA]).tolist(), []
    for budget in budgets:
        rooms = [budget.room(layer) for layer in range(len(orders))]
        chosen = [room.fill(order) for room, order in zip(rooms, orders, strict=True)]
        plans.append([layer_plan(profile, at, rooms[at], filled, utility=utility) for at, filled in enumerate(chosen)])
    return plans


def _scores(live: LiveLayer, hidden: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """The score of every expert of a layer, ``[expert]``."""
    import torch

    from moecover.runtime.devices import has_float64

    experts = live.structure.topology.num_experts
    size = hidden[0].shape[-1]
    device = hidden[0].device if has_float64(hidden[0].device) else torch.device("cpu")
    counts, used, squares = torch.zeros(3, experts, dtype=torch.float64, device=device)
    sums = torch.zeros(experts, size, dtype=torch.float64, device=device)
    for batch in hidden:
        _, weights, index, *_ = live.ask(batch)
        for expert in index.unique().tolist():
            tokens, slots = (index == expert).nonzero(as_tuple=True)
            alone, ones = index.new_full((len(tokens), 1), expert), weights.new_ones(len(tokens), 1)
            outputs = live.experts(batch[tokens], alone, ones).to(device).double()
            counts[expert] += len(tokens)
            used[expert] += weights[tokens, slots].to(device).double().sum()
            squares[expert] += outputs.square().sum()
            sums[expert] += outputs.sum(0)
    each = counts.clamp(min=1)
    variance = squares / each - (sums / each[:, None]).square().sum(-1)
    scores: NDArray[np.float64] = (used * variance.clamp_(min=0).sqrt()).cpu().numpy()
    return scores
