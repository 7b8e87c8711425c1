"""Worst corpus: ExpertSparsity's search, with the largest normalised error over the corpora as its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moecover.planning.method import METHODS
from moecover.planning.options import MODE, SEARCH

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.structure import Structure
    from moecover.corpora.packing import Corpus
    from moecover.planning.artifact import LayerPlan
    from moecover.planning.selection import Budget
    from moecover.profiling.artifact import Profile
    from moecover.runtime.running import Running


@METHODS(
    "worst-corpus",
    label="worst corpus",
    paper="this project",
    options=(MODE, SEARCH),
    together=True,
    rank=4,
)
def worst_corpus(
    profile: Profile,
    budgets: Sequence[Budget],
    *,
    mode: str = "layerwise",
    search: str = "auto",
    model: torch.nn.Module | Running,
    structure: Structure,
    sample: Sequence[Corpus] | None = None,
    advance: Callable[[int], None] = lambda layers: None,
) -> list[list[LayerPlan]]:
    """The subset whose re-routed output has the smallest relative error on the corpus where that error is largest.

    Args:
        profile: of the model.
        budgets: experts to keep; a greedy layerwise search serves all of them at once, then each has its own exchanges.
        mode: ``layerwise``, ``progressive`` or ``progressive-local``, see `search_layers`.
        search: ``exhaustive``; ``greedy``: elimination, then single exchanges until none helps; or ``auto``:
            exhaustive if there are at most 100,000 subsets.
        model: the live model, from `load_model`, or a `Running` one.
        structure: its checkpoint.
        sample: token ids to search on instead of the sample that the profile keeps.
        advance: called with 1 after every layer.

    Raises:
        InputError: see `search_layers`.
    """
    from moecover.planning.search.driver import search_layers

    return search_layers(
        profile, budgets, model, structure, mode=mode, search=search, worst=True, sample=sample, advance=advance
    )
