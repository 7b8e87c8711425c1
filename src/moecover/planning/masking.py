"""The model as a plan leaves it, other experts masked: `runtime.masking` and `runtime.fewer` for a plan that fits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from moecover.planning.artifact import Plan
from moecover.planning.fitting import check_plan
from moecover.runtime import masking
from moecover.runtime.fewer import with_top_k

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.structure import Structure


def masked_layers(
    model: torch.nn.Module, structure: Structure, plan: Plan
) -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """By decoder layer, a context in which all experts but the plan's are masked; see `Running.run`.

    Raises:
        InputError: the plan does not fit the model.
    """
    check_plan(plan, structure, other_weights=True, unequal=True)
    within = masking.masked_layers(model, structure, plan.kept, plan.channels)
    return within if plan.top_k is None else with_top_k(model, structure, within, plan.top_k)


@contextlib.contextmanager
def masked(model: torch.nn.Module, structure: Structure, plan: Plan) -> Iterator[torch.nn.Module]:
    """The model with the router logits of all experts outside the plan at minus infinity, until the block ends.

    Raises:
        InputError: the plan does not fit the model.
    """
    within = masked_layers(model, structure, plan)
    with contextlib.ExitStack() as stack:
        for number in structure.topology.decoder_layers:
            stack.enter_context(within(number))
        yield model
