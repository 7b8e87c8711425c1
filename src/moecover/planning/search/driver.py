"""Stage 3c, search: reads the inputs of every MoE layer, gives the subsets of experts with the smallest reconstruction loss.

ExpertSparsity (arXiv 2402.14800): a layer keeps the subset S that minimises the sum over calibration batches of
||Z - Z_S||_F, with Z the routed output and Z_S the output when the dropped experts' router logits are minus infinity
before scoring and top-k. Its code tries every subset, which 60 experts do not allow. Here the outputs of all experts are
computed once per token; their Gram matrices turn the loss of any subset into small products. Every subset is tried
where there are at most 100,000; else experts are eliminated one by one, each time the one whose loss after is least.
The loss that a plan states is measured on the chosen subset by forward passes in the model's dtype, differences in
float64.

The same search with another loss is the method worst-corpus: the largest over the corpora of ||Z - Z_S||_F / ||Z||_F, each
over all tokens of the corpus. After the elimination, a kept expert is exchanged for one that is not as long as that helps.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.structure import Structure
from moecover.corpora.batches import batches
from moecover.corpora.packing import Corpus
from moecover.errors import InputError
from moecover.planning.artifact import LayerPlan
from moecover.planning.search.routing import Routing, observe_calls, recognise
from moecover.planning.selection import Budget
from moecover.profiling.artifact import Profile
from moecover.runtime.loading import backbone_of, routers
from moecover.runtime.masking import masked_layer
from moecover.runtime.running import Running, running

if TYPE_CHECKING:
    import torch

EXHAUSTIVE = 100_000  # subsets; above it the search is greedy
CHUNK_BYTES = 2**28  # of expert outputs held at a time
LEAST_GAIN = 1e-9  # an exchange that lowers the loss by a smaller share is rounding


class Products:
    """One MoE layer as its loss sees it: Gram matrices of the expert outputs and scores, per token.

    Memory: 8 T N^2 bytes for T tokens and N experts, and `CHUNK_BYTES` while it is made.

    Args:
        experts: the experts module.
        routing: of the layer's router.
        hidden: calibration batches, each ``[token, hidden]``.
        logits: the router's, ``[token, expert]``, over all batches.
    """

    def __init__(
        self, experts: torch.nn.Module, routing: Routing, hidden: Sequence[torch.Tensor], logits: torch.Tensor
    ) -> None:
        import torch

        tokens = torch.cat(list(hidden))
        device, (count, num_experts) = tokens.device, logits.shape
        self.routing, self.num_experts = routing, num_experts
        self.batch = torch.repeat_interleave(
            torch.arange(len(hidden), device=device), torch.tensor([len(h) for h in hidden], device=device)
        )
        self.num_batches = len(hidden)
        self.scores = routing.scores(logits)
        order = routing.choice(self.scores) if routing.num_groups == 1 else self.scores
        rank = torch.sort(order, dim=-1, descending=True, stable=True).indices
        self.rank = torch.empty_like(rank).scatter_(
            -1, rank, torch.arange(num_experts, device=device).expand_as(rank).contiguous()
        )
        self.gram = torch.empty(count, num_experts, num_experts, dtype=torch.float64, device=device)
        step = max(1, CHUNK_BYTES // (num_experts * tokens.shape[-1] * tokens.element_size()))
        ones = torch.ones(step, 1, dtype=tokens.dtype, device=device)
        for start in range(0, count, step):
            chunk = tokens[start : start + step]
            outputs = torch.empty(len(chunk), num_experts, tokens.shape[-1], dtype=tokens.dtype, device=device)
            for expert in range(num_experts):
                index = torch.full((len(chunk), 1), expert, device=device)
                outputs[:, expert] = experts(chunk, index, ones[: len(chunk)])
            for first in range(0, len(chunk), 64):
                wide = outputs[first : first + 64].double()
                torch.bmm(wide, wide.transpose(1, 2), out=self.gram[start + first : start + first + len(wide)])
        everyone = torch.ones(1, num_experts, dtype=torch.bool, device=device)
        index, weights = self.route(everyone)
        self.index, self.weights = index[0], weights[0]

    def route(self, alive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts and weights of every token in every set, ``[set, token, slot]``; ``alive`` is bool ``[set, expert]``."""
        import torch

        k, sets = self.routing.top_k, alive[:, None, :]
        if self.routing.num_groups == 1:
            index = torch.where(sets, self.rank, self.num_experts).topk(k, -1, largest=False).indices
        else:
            choice = self.routing.choice(torch.where(sets, self.scores, -torch.inf))
            index = torch.sort(choice, dim=-1, descending=True, stable=True).indices[..., :k]
        scores = self.scores.expand(len(alive), -1, -1)
        total = (scores * sets).sum(-1, keepdim=True)
        return index, self.routing.weights(scores.gather(-1, index), total)

    def _distances(self, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """||z - z_S||^2 of tokens ``[..., token]`` from experts and weights ``[..., token, slot]``."""
        import torch

        index = torch.cat([self.index.expand(*index.shape[:-1], -1), index], -1)
        delta = torch.cat([-self.weights.expand(*weights.shape[:-1], -1), weights], -1)
        token = torch.arange(len(self.gram), device=index.device)[:, None, None]
        gram = self.gram[token, index[..., :, None], index[..., None, :]]
        return torch.einsum("...i,...ij,...j->...", delta, gram, delta)

    def _summed(self, distances: torch.Tensor) -> torch.Tensor:
        """Sum over batches of the Frobenius norms, from squared distances ``[token, column]``."""
        import torch

        sums = torch.zeros(self.num_batches, distances.shape[1], dtype=torch.float64, device=distances.device)
        return sums.index_add_(0, self.batch, distances).clamp_(min=0).sqrt_().sum(0)

    def losses(self, alive: torch.Tensor) -> torch.Tensor:
        """Loss of every set, float64 ``[set]``; ``alive`` is bool ``[set, expert]``."""
        import torch

        step = max(1, 2**23 // (len(self.gram) * max(self.num_experts, 4 * self.routing.top_k**2)))
        return torch.cat([self._summed(self._distances(*self.route(sets)).T) for sets in torch.split(alive, step)])

    def losses_without(self, alive: torch.Tensor) -> torch.Tensor:
        """Loss after dropping each expert of one set, float64 ``[expert]``; ``alive`` is bool ``[expert]``.

        Only tokens that route to an expert are re-routed when it goes; where the router does not renormalise, the
        others' weights grow by one factor per token.
        """
        import torch

        if self.routing.num_groups > 1:
            without = alive & ~torch.eye(self.num_experts, dtype=torch.bool, device=alive.device)
            return self.losses(without)
        k, routing = self.routing.top_k, self.routing
        members = torch.where(alive, self.rank, self.num_experts).topk(k + 1, -1, largest=False).indices
        score = self.scores.gather(-1, members)  # [token, k + 1], the last one is the next in line
        total = (self.scores * alive).sum(-1, keepdim=True)
        now = routing.weights(score[:, :k], total)
        union = torch.cat([self.index, members], -1)
        token = torch.arange(len(self.gram), device=alive.device)[:, None, None]
        gram = self.gram[token, union[:, :, None], union[:, None, :]]  # [token, 2k + 1, 2k + 1]

        def distance(weights: torch.Tensor) -> torch.Tensor:  # [token, column, k + 1] -> [token, column]
            delta = torch.cat([-self.weights[:, None].expand(-1, weights.shape[1], -1), weights], -1)
            return torch.einsum("tsi,tij,tsj->ts", delta, gram, delta)

        zero = torch.zeros_like(now[:, :1])
        current = distance(torch.cat([now, zero], -1)[:, None])  # [token, 1]
        if routing.renormalise or routing.scoring != "softmax":
            after = current.expand(-1, self.num_experts).clone()
        else:
            old = torch.einsum("ti,tij,tj->t", self.weights, gram[:, :k, :k], self.weights)[:, None]
            mixed = torch.einsum("ti,tij,tj->t", self.weights, gram[:, :k, k : 2 * k], now)[:, None]
            new = torch.einsum("ti,tij,tj->t", now, gram[:, k : 2 * k, k : 2 * k], now)[:, None]
            factor = total / (total - self.scores)  # [token, expert]
            after = old - 2 * factor * mixed + factor.square() * new
        slots = torch.arange(k, device=alive.device)
        others = torch.arange(k, device=alive.device).expand(k, -1) + (
            torch.arange(k, device=alive.device) >= slots[:, None]
        )
        kept = score[:, others]  # [token, dropped slot, slot]
        moved = routing.weights(kept, (total - score[:, :k])[..., None])
        weights = torch.zeros(*moved.shape[:2], k + 1, dtype=torch.float64, device=alive.device)
        weights.scatter_(-1, others.expand(len(score), -1, -1), moved)
        after.scatter_(-1, members[:, :k], distance(weights))
        return self._summed(after)


class Corpora(Products):
    """The same with the loss of the worst corpus: its batches are the corpora, each weighed by the size of its output."""

    def __init__(
        self, experts: torch.nn.Module, routing: Routing, hidden: Sequence[torch.Tensor], logits: torch.Tensor
    ) -> None:
        import torch

        super().__init__(experts, routing, hidden, logits)
        token = torch.arange(len(self.gram), device=self.gram.device)[:, None, None]
        own = self.gram[token, self.index[:, :, None], self.index[:, None, :]]
        squares = torch.einsum("ti,tij,tj->t", self.weights, own, self.weights)
        self.output = torch.zeros(self.num_batches, dtype=torch.float64, device=squares.device)
        self.output.index_add_(0, self.batch, squares).clamp_(min=torch.finfo(torch.float64).tiny)

    def _summed(self, distances: torch.Tensor) -> torch.Tensor:
        """The largest over corpora of the normalised errors, from squared distances ``[token, column]``."""
        import torch

        sums = torch.zeros(self.num_batches, distances.shape[1], dtype=torch.float64, device=distances.device)
        squares = sums.index_add_(0, self.batch, distances).clamp_(min=0)
        return (squares / self.output[:, None]).sqrt_().amax(0)


def exchange(products: Products, kept: Sequence[int], budget: Budget, required: frozenset[int]) -> list[int]:
    """A set after exchanges, each of which lowers the loss; ends when no single exchange does.

    Experts from outside are tried in order, each for the kept expert whose place it takes best (of its own router group,
    none of the required); among equals the highest id goes.
    """
    import torch

    size = budget.num_experts // budget.num_groups
    alive = torch.zeros(budget.num_experts, dtype=torch.bool, device=products.gram.device)
    alive[list(kept)] = True
    loss, since = float(products.losses(alive[None])[0]), 0
    for enters in itertools.cycle(range(budget.num_experts)):
        if since == budget.num_experts:  # every one was tried since the last exchange
            return [int(e) for e in alive.nonzero().flatten()]
        since += 1
        places = [
            e for e in range(budget.num_experts) if alive[e] and e // size == enters // size and e not in required
        ]
        if alive[enters] or not places:
            continue
        alive[enters] = True
        losses = products.losses_without(alive).tolist()
        leaves = min(places, key=lambda e: (losses[e], -e))
        better = losses[leaves] < loss * (1 - LEAST_GAIN)
        alive[leaves if better else enters] = False
        if better:
            loss, since = losses[leaves], 0
    raise AssertionError("unreachable")


def eliminate(products: Products, budgets: Sequence[Budget], required: frozenset[int]) -> list[list[int]]:
    """Kept experts of every budget by greedy elimination, nested; among equals the highest id goes first.

    With router groups every group loses one expert a round, so that they stay equal.
    """
    import torch

    groups = budgets[0].num_groups
    size = products.num_experts // groups
    alive = torch.ones(products.num_experts, dtype=torch.bool, device=products.gram.device)
    free = [e for e in range(products.num_experts) if e not in required]
    kept: dict[int, list[int]] = {products.num_experts: list(range(products.num_experts))}
    while int(alive.sum()) > min(b.keep for b in budgets):
        counts = alive.view(groups, size).sum(1).tolist()
        losses = products.losses_without(alive).tolist()
        candidates = [e for e in free if counts[e // size] == max(counts)]
        worst = min(candidates, key=lambda e: (losses[e], -e))
        alive[worst] = False
        free.remove(worst)
        kept[int(alive.sum())] = alive.nonzero().flatten().tolist()
    return [kept[budget.keep] for budget in budgets]


def subsets(budget: Budget, required: frozenset[int]) -> Iterator[tuple[int, ...]]:
    """All subsets that a budget allows, in lexicographic order within every group."""
    size, share = budget.num_experts // budget.num_groups, budget.keep // budget.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(budget.num_groups)]
    for parts in itertools.product(*(itertools.combinations(group, share) for group in groups)):
        subset = tuple(itertools.chain(*parts))
        if required <= set(subset):
            yield subset


def count_subsets(budget: Budget) -> int:
    """How many subsets a budget allows, required experts not considered."""
    size = budget.num_experts // budget.num_groups
    return int(math.comb(size, budget.keep // budget.num_groups) ** budget.num_groups)


def exhaust(products: Products, budget: Budget, required: frozenset[int]) -> list[int]:
    """The subset of least loss; among equals the first in lexicographic order."""
    import torch

    best: tuple[float, tuple[int, ...]] = (math.inf, ())
    allowed = subsets(budget, required)
    while chunk := list(itertools.islice(allowed, 1024)):
        alive = torch.zeros(len(chunk), products.num_experts, dtype=torch.bool, device=products.gram.device)
        alive.scatter_(1, torch.tensor(chunk, device=alive.device), True)
        losses = products.losses(alive)
        first = int(losses.argmin())
        best = min(best, (float(losses[first]), chunk[first]), key=lambda pair: pair[0])
    return list(best[1])


def true_squares(
    model: torch.nn.Module, structure: Structure, router: torch.nn.Module, ask: Callable[[torch.Tensor], Any],
    layer: int, kept: Sequence[int], hidden: Sequence[torch.Tensor],
) -> list[tuple[float, float]]:  # fmt: skip
    """||Z - Z_S||^2 and ||Z||^2 of every batch: forwards in the model's dtype, differences in float64."""
    experts = model.get_submodule(structure.experts_modules[layer])

    def routed() -> list[torch.Tensor]:
        found = []
        for batch in hidden:
            _, weights, index, *_ = ask(batch)
            found.append(experts(batch, index, weights))
        return found

    whole = routed()
    with masked_layer(model, structure, router, layer, kept):
        cut = routed()
    return [
        (float((a.double() - b.double()).square().sum()), float(a.double().square().sum()))
        for a, b in zip(whole, cut, strict=True)
    ]


def search_layer(
    model: torch.nn.Module, structure: Structure, router: torch.nn.Module, ask: Callable[[torch.Tensor], Any], layer: int,
    hidden: Sequence[torch.Tensor], budgets: Sequence[Budget], search: str, corpus_of: Sequence[int] | None = None,
) -> list[LayerPlan]:  # fmt: skip
    """The best subset of one MoE layer for every budget.

    Args:
        model: the live model.
        structure: its checkpoint.
        router: of the layer.
        ask: calls the router as the model does, see `observe_calls`.
        layer: MoE layer.
        hidden: what enters the layer, calibration batches of ``[token, hidden]``.
        budgets: experts to keep.
        search: ``auto``, ``exhaustive`` or ``greedy``.
        corpus_of: number of every batch's corpus, for the loss of the worst corpus; None for ExpertSparsity's.

    Raises:
        InputError: the router cannot be re-routed, or an exhaustive search was asked for that would never end.
    """
    import torch

    experts = model.get_submodule(structure.experts_modules[layer])
    required = budgets[0].required[layer] if budgets[0].required else frozenset()
    for budget in budgets:
        budget.room(layer)  # the required experts fit
    routing = recognise(model, structure, router, ask, layer, torch.cat(list(hidden))[:256])
    logits, text, kind = torch.cat([ask(batch)[0] for batch in hidden]), list(hidden), Products
    if corpus_of is not None:
        sizes = [0] * (1 + max(corpus_of))
        for batch, corpus in zip(hidden, corpus_of, strict=True):
            sizes[corpus] += len(batch)
        text, kind = list(torch.split(torch.cat(text), sizes)), Corpora
    products = kind(experts, routing, text, logits)
    ways = [kind_of_search(budget, search) for budget in budgets]
    by_elimination = [b for b, way in zip(budgets, ways, strict=True) if way == "greedy"]
    eliminated = iter(eliminate(products, by_elimination, required) if by_elimination else [])
    found = []
    for budget, way in zip(budgets, ways, strict=True):
        kept = next(eliminated) if way == "greedy" else exhaust(products, budget, required)
        if way == "greedy" and corpus_of is not None:
            kept, way = exchange(products, kept, budget, required), "greedy with exchanges"
        squares = true_squares(model, structure, router, ask, layer, kept, hidden)
        found.append(
            LayerPlan(
                decoder_layer=structure.topology.decoder_layers[layer],
                kept=kept,
                required=sorted(required),
                filled=[e for e in kept if e not in required],
                search=way,
                tokens=sum(map(len, hidden)),
                loss=sum(math.sqrt(d) for d, _ in squares) if corpus_of is None else worst_error(squares, corpus_of),
            )
        )
    return found


def worst_error(squares: Sequence[tuple[float, float]], corpus_of: Sequence[int]) -> float:
    """The largest over corpora of ||Z - Z_S||_F / ||Z||_F, from the squares of every batch."""
    sums = [[0.0, 0.0] for _ in range(1 + max(corpus_of))]
    for (difference, whole), corpus in zip(squares, corpus_of, strict=True):
        sums[corpus][0] += difference
        sums[corpus][1] += whole
    return max(math.sqrt(difference / whole) if whole else 0.0 for difference, whole in sums)


def kind_of_search(budget: Budget, search: str) -> str:
    """``exhaustive`` or ``greedy`` for a budget.

    Raises:
        InputError: an exhaustive search of too many subsets.
    """
    number = count_subsets(budget)
    if search == "exhaustive" and number > 100 * EXHAUSTIVE:
        raise InputError(f"--search exhaustive would try {number:.3g} subsets of {budget.num_experts} experts in every layer. Use --search greedy")  # fmt: skip
    if search == "auto":
        return "exhaustive" if number <= EXHAUSTIVE else "greedy"
    return search


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
    """The best subsets of all MoE layers, a list of layers for every budget; see `planning.expert_sparsity`.

    With ``worst``, by the loss of the worst corpus; see `planning.worst_corpus`.

    Raises:
        InputError: another model than the profile's, no sample, or what `search_layer` raises.
    """
    import torch

    if structure.model_fingerprint != profile.model["fingerprint"]:
        raise InputError(f"the profile is of another model ({profile.model['name']}), not of {structure.checkpoint.name}: topology or routers differ. Give the --model that was profiled")  # fmt: skip
    inputs = profile.inputs
    if sample is None and inputs is None:
        raise InputError("the search needs the inputs of the layers, which this profile does not hold. Make it with `moecover profile ... --keep-inputs 8192`")  # fmt: skip
    for budget in budgets:
        kind_of_search(budget, search)
    batch_size = inputs.batch_size if sample is None and inputs is not None else profile.settings["batch_size"]
    runs = running(model, structure)
    live, dtype, device = runs.module, runs.dtype, runs.device
    modules = routers(live, structure)
    texts = sample if sample is not None else (inputs.sequences() if inputs is not None else [])
    found: list[list[LayerPlan]] = [[] for _ in budgets]
    corpus_of = [i for i, corpus in enumerate(texts) for _ in range(0, len(corpus.tokens), batch_size)]
    passes = [
        {key: value.to(device) for key, value in one.items()} for corpus in texts for one in batches(corpus, batch_size)
    ]

    def from_text() -> Generator[list[torch.Tensor]]:
        """Inputs of layer after layer, as the layers before it leave them."""
        backbone = backbone_of(live)
        batch_calls = [functools.partial(backbone, **one, use_cache=False) for one in passes]
        with contextlib.closing(runs.arrivals(batch_calls, stops)) as steps:
            for arrived in steps:
                yield [
                    h.reshape(-1, h.shape[-1])[
                        p["attention_mask"].flatten().bool() if "attention_mask" in p else slice(None)
                    ]
                    for h, p in zip(arrived, passes, strict=True)
                ]

    def from_disk() -> Generator[list[torch.Tensor]]:
        assert inputs is not None
        for layer, number in enumerate(structure.topology.decoder_layers):
            with runs.loaded(number):
                yield [h.to(device, dtype) for h in inputs.layer(layer)]

    few = functools.partial(backbone_of(live), input_ids=torch.arange(4, device=device)[None], use_cache=False)
    calls, stops = observe_calls(live, structure, modules, lambda: runs.run([few], head=False))
    rounds = [list(range(len(budgets)))] if mode == "layerwise" else [[i] for i in range(len(budgets))]
    for chosen in rounds:
        source = from_disk() if mode == "layerwise" and sample is None else from_text()
        with torch.inference_mode(), contextlib.closing(source), contextlib.ExitStack() as stack:
            for layer, hidden in enumerate(source):
                rows = search_layer(
                    live, structure, modules[layer], calls[layer], layer, hidden, [budgets[i] for i in chosen], search,
                    corpus_of if worst else None,
                )  # fmt: skip
                for i, row in zip(chosen, rows, strict=True):
                    found[i].append(row)
                if mode == "progressive":
                    stack.enter_context(masked_layer(live, structure, modules[layer], layer, rows[0].kept))
                advance(1)
    return found
