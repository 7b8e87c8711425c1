"""Subset search over all MoE layers: for each, the experts whose re-routed output is nearest to the full layer's.

ExpertSparsity (arXiv 2402.14800) tries every subset, which is too much for 60 experts. Here every subset is tried if
there are at most 100,000 (`exhaust`); otherwise experts are eliminated one by one, each time the one whose removal
costs least (`eliminate`). The loss that a plan states is measured on the chosen subset by forward passes in the model's
dtype, with differences in float64.

With ``worst`` the loss is another: the largest over the corpora of ||Z - Z_S||_F / ||Z||_F, each over all tokens of the
corpus. After the elimination, kept experts are exchanged for dropped ones as long as that helps (`exchange`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from moecover.errors import arg
from moecover.planning.artifact import LayerPlan
from moecover.planning.fitting import check_model
from moecover.planning.options import LAYERWISE, PROGRESSIVE
from moecover.planning.search.eliminate import eliminate
from moecover.planning.search.exchange import exchange
from moecover.planning.search.exhaust import exhaust, kind_of_search
from moecover.planning.search.hidden_states import Sample, sample_of
from moecover.planning.search.live_layer import LiveLayer, squared_errors, worst_error
from moecover.planning.search.routing import observe_calls
from moecover.runtime.devices import check_float64
from moecover.runtime.distributed import shared_out
from moecover.runtime.finite import naming, not_finite, watched
from moecover.runtime.loading import backbone_of, routers
from moecover.runtime.running import Running, running
from moecover.runtime.world import check_alone

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.structure import Structure
    from moecover.corpora.packing import Corpus
    from moecover.planning.selection import Budget
    from moecover.profiling.artifact import Profile


def search_layer(
    live: LiveLayer,
    hidden: Sequence[torch.Tensor],
    budgets: Sequence[Budget],
    search: str,
    corpus_of: Sequence[int] | None = None,
    targets: Sequence[torch.Tensor] | None = None,
) -> list[LayerPlan]:
    """The best subset of one MoE layer for every budget.

    Args:
        live: the layer.
        hidden: what enters it, calibration batches ``[token, hidden]``.
        budgets: experts to keep.
        search: ``auto``, ``exhaustive`` or ``greedy``.
        corpus_of: index of every batch's corpus, for the loss of the worst corpus; None for ExpertSparsity's.
        targets: Z of every batch, ``[token, hidden]``; None for the layer's own output with all experts.

    Raises:
        InputError: the router cannot be re-routed, an exhaustive search would not end, or the layer gives numbers that
            are not finite.
    """
    required = budgets[0].required[live.layer] if budgets[0].required else frozenset()
    for budget in budgets:
        budget.room(live.layer)  # the required experts fit
    decoder_layer = live.structure.topology.decoder_layers[live.layer]
    with naming(f"decoder layer {decoder_layer}"):
        products = live.products(hidden, corpus_of, targets)
    kinds = [kind_of_search(budget, search) for budget in budgets]
    by_elimination = [budget for budget, kind in zip(budgets, kinds, strict=True) if kind == "greedy"]
    eliminated = iter(eliminate(products, by_elimination, required) if by_elimination else [])
    found = []
    for budget, kind in zip(budgets, kinds, strict=True):
        kept = next(eliminated) if kind == "greedy" else exhaust(products, budget, required)
        if kind == "greedy" and corpus_of is not None:
            kept, kind = exchange(products, kept, budget, required), "greedy with exchanges"
        squares = squared_errors(live, kept, hidden, targets)
        if not all(math.isfinite(value) for pair in squares for value in pair):
            raise not_finite(f"decoder layer {decoder_layer}", "the loss of the chosen experts is")
        found.append(
            LayerPlan(
                decoder_layer=decoder_layer,
                kept=kept,
                required=sorted(required),
                filled=[e for e in kept if e not in required],
                search=kind,
                tokens=sum(map(len, hidden)),
                loss=sum(math.sqrt(d) for d, _ in squares) if corpus_of is None else worst_error(squares, corpus_of),
            )
        )
    return found


def search_layers(
    profile: Profile,
    budgets: Sequence[Budget],
    model: torch.nn.Module | Running,
    structure: Structure,
    *,
    mode: str,
    search: str,
    worst: bool = False,
    sample: Sequence[Corpus] | None = None,
    advance: Callable[[int], None] = lambda layers: None,
) -> list[list[LayerPlan]]:
    """The best subsets of all MoE layers, a list of layers for every budget.

    Args:
        profile: of the model.
        budgets: experts to keep.
        model: the live model, from `load_model`, or a `Running` one.
        structure: its checkpoint.
        mode: ``layerwise`` (inputs of the full model), ``progressive`` (inputs that the pruned layers before leave; the
            target is the full model's output) or ``progressive-local`` (the same inputs; the target is the layer's own
            output with all experts on them).
        search: ``auto``, ``exhaustive`` or ``greedy``.
        worst: minimise the loss of the worst corpus, not ExpertSparsity's.
        sample: token ids to search on instead of the sample that the profile keeps.
        advance: called with 1 after every layer.

    Raises:
        InputError: the model is not the profile's, there is no sample, or what `search_layer` raises.
    """
    import torch

    check_model(profile, structure)
    text = sample_of(profile, sample)
    for budget in budgets:
        kind_of_search(budget, search)
    runs = running(model, structure)
    check_float64(runs.device, "a search")
    if mode != LAYERWISE:  # every layer waits for the one before
        check_alone(runs.world, arg("mode", mode))
    live, stops = live_layers(runs, structure)
    corpus_of = text.corpus_of if worst else None

    def searched(chosen: Sequence[Budget], mine: Callable[[int], bool]) -> list[list[LayerPlan]]:
        """The best subsets for some budgets, a list of budgets for every layer that is searched here."""
        kept: list[list[int]] = []
        found: list[list[LayerPlan]] = []
        walk = arriving(mode, text, runs, structure, stops, live, kept)
        with torch.inference_mode(), contextlib.closing(walk):
            for layer, (hidden, targets) in enumerate(walk):
                if mine(layer):
                    found.append(search_layer(live[layer], hidden, chosen, search, corpus_of, targets))
                    kept.append(found[-1][0].kept)
                advance(1)
        return found

    if mode == LAYERWISE:  # no layer waits for another one
        layers = shared_out(runs.world, range(len(live)), lambda some: searched(budgets, set(some).__contains__))
        return [list(rows) for rows in zip(*layers, strict=True)]
    return [[row for (row,) in searched([budget], lambda layer: True)] for budget in budgets]


def live_layers(runs: Running, structure: Structure) -> tuple[list[LiveLayer], list[torch.nn.Module]]:
    """The MoE layers, and the modules that see what their experts see; from a pass over four tokens."""
    import torch

    modules = routers(runs.module, structure)
    few = torch.arange(4, device=runs.device)[None]

    def once() -> None:
        with naming("a pass over four tokens"):
            backbone_of(runs.module)(input_ids=few, use_cache=False)

    with watched(runs):
        calls, stops = observe_calls(runs.module, structure, modules, lambda: runs.run([once], head=False))
    return [LiveLayer(runs.module, structure, modules[layer], ask, layer) for layer, ask in enumerate(calls)], stops


def arriving(
    mode: str,
    text: Sample,
    runs: Running,
    structure: Structure,
    stops: Sequence[torch.nn.Module],
    live: Sequence[LiveLayer],
    kept: Sequence[Sequence[int]],
) -> Generator[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor] | None]]:
    """What enters every MoE layer, and the targets where they are not the layer's own output; batch by batch.

    Args:
        mode: see `search_layers`.
        text: that is searched on.
        runs: the model.
        structure: its checkpoint.
        stops: modules that see what the experts of each MoE layer see.
        live: the MoE layers.
        kept: experts of the layers that are searched already; grows while this runs.
    """
    if mode == PROGRESSIVE:
        layer_of = {number: layer for layer, number in enumerate(structure.topology.decoder_layers)}

        def masked(number: int) -> contextlib.AbstractContextManager[None]:
            layer = layer_of.get(number)
            return contextlib.nullcontext() if layer is None else live[layer].masked(kept[layer])

        with contextlib.closing(text.side_by_side(runs, structure, stops, masked)) as both:
            for layer, (whole, pruned) in enumerate(both):
                yield pruned, live[layer].routed(whole)
        return
    stored = mode == LAYERWISE and text.stored is not None
    source = text.from_disk(runs, structure) if stored else text.running(runs, stops)
    with contextlib.closing(source), contextlib.ExitStack() as masks:
        for layer, hidden in enumerate(source):
            yield hidden, None
            if mode != LAYERWISE:
                masks.enter_context(live[layer].masked(kept[layer]))
