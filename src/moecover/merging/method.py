"""The registry of merges: what the rest of the program knows of one, apart from its arithmetic.

A merge is a function from the statistics of a layer to groups of experts, entered with `MERGES`, and perhaps one that
says how well channels of two experts match. The built-in ones are the modules of `merging.methods`; import `MERGES`
from there to have them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.registry import Registry, guarded

if TYPE_CHECKING:
    import torch

    from moecover.merging.facts import Groups, LayerFacts

NONE = "none"  # the merge that removes experts
SALIENCY, ROUTER, OUTPUTS, GATED = "saliency", "router", "outputs", "gated"  # see `LayerFacts`

Function = Callable[["LayerFacts"], "Groups"]


@dataclass(frozen=True)
class Pair:
    """The channels of two experts that become one.

    Attributes:
        centre: weights of every channel of the kept expert (of gate, up and down projection, one after the other),
            float32 ``[channel, number]``.
        member: the same of the other one.
        activations: cosine between what enters the down projections over all tokens, a channel of the kept expert by
            one of the other, ``[channel, channel]``; None where the merge does not ask for it.
    """

    centre: torch.Tensor
    member: torch.Tensor
    activations: torch.Tensor | None


Cost = Callable[[Pair], "torch.Tensor"]


@dataclass(frozen=True)
class Merge:
    """A merge.

    Attributes:
        name: as it is asked for and written to manifests.
        function: the groups of a layer.
        label: name in tables, figures and reports.
        summary: one line.
        paper: source of the method.
        needs: statistics of `LayerFacts` that it looks at, beside the counts.
        sequential: statistics are of the layer behind merged ones, not of the original's.
        cost: of a match of every channel of the kept expert with every one of another, ``[channel, channel]``; the
            channels are matched one to one at the least cost in all. None averages channels of the same index.
        by_activations: the cost looks at activations.
    """

    name: str
    function: Function
    label: str
    summary: str
    paper: str
    needs: frozenset[str] = frozenset()
    sequential: bool = False
    cost: Cost | None = None
    by_activations: bool = False


class MergeRegistry(Registry[Merge]):
    """Merges by name; used as a decorator, it enters one."""

    def __call__(  # type: ignore[override]
        self,
        name: str,
        *,
        label: str,
        paper: str,
        needs: tuple[str, ...] = (),
        sequential: bool = False,
        cost: Cost | None = None,
        by_activations: bool = False,
    ) -> Callable[[Function], Function]:
        """Decorator that enters a function as a merge; see `Merge` for the arguments.

        Raises:
            InputError: a plugin uses a name that is taken.
        """

        def enter(function: Function) -> Function:
            priced = cost if cost is None else guarded(cost, f"merge {name}")
            own, summary = guarded(function, f"merge {name}"), (function.__doc__ or "").strip().split("\n")[0]
            asked = frozenset(needs)
            self.add(name, Merge(name, own, label, summary, paper, asked, sequential, priced, by_activations))
            return function

        return enter


MERGES = MergeRegistry("merge")
