"""The model with all experts but a plan's masked: `runtime.masking` for a plan that fits the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from moecover.planning.artifact import Plan
from moecover.planning.fitting import check_plan
from moecover.runtime import masking

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
    check_plan(plan, structure, other_weights=True)
    return masking.masked_layers(model, structure, plan.kept, plan.channels)


@contextlib.contextmanager
def masked(model: torch.nn.Module, structure: Structure, plan: Plan) -> Iterator[torch.nn.Module]:
    """The model with the router logits of all experts outside the plan at minus infinity, until the block ends.

    Raises:
        InputError: the plan does not fit the model.
    """
    check_plan(plan, structure, other_weights=True)
    with masking.masked(model, structure, plan.kept, plan.channels) as inside:
        yield inside
