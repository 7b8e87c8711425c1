"""A router as a function of its logits, recognised by its behaviour, so that a search can re-route without running it.

Reads a live router and hidden states; gives a `Routing`, or refuses a router of unknown kind. A router is recognised by
its outputs on all experts and on a reduced set, never by the name of its family.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.structure import Structure
from moecover.checkpoints.topology import Topology
from moecover.errors import InputError, arg
from moecover.runtime.masking import masked_layer, router_tensors

if TYPE_CHECKING:
    import torch

AskRouter = Callable[["torch.Tensor"], Any]  # from hidden states to what the router returns: logits, weights, ids, ...


@dataclass(frozen=True)
class Routing:
    """How a router gets from logits to the experts of a token and their weights.

    Attributes:
        scoring: ``softmax`` over all experts, or ``sigmoid``.
        renormalise: weights divided by the sum over the token's experts.
        scale: factor on the weights.
        top_k: experts per token.
        bias: added to the scores for the choice alone, float64 ``[expert]``; None without.
        num_groups: groups of experts that are chosen first; 1 for none.
        top_groups: groups that a token may use.
        group_best: a group's score is the sum of its best 1 or 2.
    """

    scoring: str
    renormalise: bool
    scale: float
    top_k: int
    bias: torch.Tensor | None = None
    num_groups: int = 1
    top_groups: int = 1
    group_best: int = 1

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores of all experts, float64 ``[token, expert]``."""
        import torch

        logits = logits.double()
        return torch.softmax(logits, -1) if self.scoring == "softmax" else torch.sigmoid(logits)

    def choice(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores that experts are chosen by, ``[..., expert]``; minus infinity outside the groups a token may use."""
        import torch

        choice = scores if self.bias is None else scores + self.bias
        if self.num_groups == 1:
            return choice
        groups = choice.reshape(*choice.shape[:-1], self.num_groups, -1)
        best = groups.topk(self.group_best, dim=-1).values.sum(-1)
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(self.top_groups, -1).indices, True)
        return torch.where(allowed[..., None], groups, -torch.inf).flatten(-2)

    def weights(self, selected: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Weights of selected experts from their scores ``[..., slot]`` and the sum over all remaining experts.

        With dropped experts' logits at minus infinity, a softmax runs over the others: their scores over ``total``.
        """
        if self.renormalise:
            return self.scale * selected / selected.sum(-1, keepdim=True)
        return self.scale * (selected / total if self.scoring == "softmax" else selected)


def describe(routing: Routing) -> str:
    """A routing in words, such as ``softmax, renormalised``."""
    bias = "" if routing.bias is None else " + bias for the choice"
    groups = "" if routing.num_groups == 1 else ", best groups first"
    return f"{routing.scoring}{bias}{groups}{', renormalised' if routing.renormalise else ''}"


def _fits(routing: Routing, logits: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> float | None:
    """The scale with which a routing explains a router's output; None where it does not."""
    import torch

    rough = 2e-2 if logits.dtype in (torch.bfloat16, torch.float16) or weights.dtype != torch.float32 else 1e-4
    scores = routing.scores(logits)
    choice = routing.choice(scores)
    best = choice.topk(routing.top_k, -1).values
    found = choice.gather(-1, index).sort(-1, descending=True).values
    if not torch.allclose(found, best, rtol=rough, atol=1e-6):  # by value, so that ties fit whichever way they fell
        return None
    expected = routing.weights(scores.gather(-1, index), scores.sum(-1, keepdim=True))
    scale = float((weights.double() / expected).median())
    return scale if torch.allclose(scale * expected, weights.double(), rtol=rough, atol=1e-6) else None


def recognise(
    model: torch.nn.Module,
    structure: Structure,
    router: torch.nn.Module,
    ask: AskRouter,
    layer: int,
    hidden: torch.Tensor,
) -> Routing:
    """The routing of a MoE layer's router.

    Args:
        model: the live model.
        structure: its checkpoint.
        router: of the layer.
        ask: calls it as the model does.
        layer: MoE layer.
        hidden: what enters the router, ``[token, hidden]``.

    Raises:
        InputError: the router is of another kind.
    """
    import torch

    topology = structure.topology
    hidden = hidden[:256]
    fewer = _reduced(topology)
    whole = ask(hidden)
    with masked_layer(model, structure, router, layer, fewer):
        reduced = ask(hidden)
    ids = torch.tensor(fewer, device=hidden.device)
    position = torch.full((topology.num_experts,), -1, device=hidden.device)
    position[ids] = torch.arange(len(ids), device=hidden.device)
    state = dict(model.state_dict())
    biases: list[torch.Tensor | None] = [None]
    vectors = [state[name] for name in router_tensors(structure, layer)]
    biases += [v.flatten().double() for v in vectors if v.numel() == topology.num_experts]
    group_bests = (1, 2) if topology.num_groups > 1 else (1,)
    for scoring, renormalise, bias, best in itertools.product(
        ("softmax", "sigmoid"), (False, True), biases, group_bests
    ):
        groups = topology.num_groups, topology.top_groups, best
        tried = Routing(scoring, renormalise, 1.0, topology.top_k, bias, *groups)
        scale = _fits(tried, whole[0], whole[1], whole[2])
        if scale is None:
            continue
        cut = dataclasses.replace(tried, bias=None if bias is None else bias[ids])
        again = _fits(cut, reduced[0], reduced[1], position[reduced[2]])
        if again is not None and abs(again / scale - 1) < 0.01:
            return dataclasses.replace(tried, scale=scale)
    raise InputError(
        f"the router of decoder layer {topology.decoder_layers[layer]} of {topology.family} is of a kind that a search "
        f"cannot re-route. Use another {arg('method')}"
    )


def _reduced(topology: Topology) -> list[int]:
    """Half of the experts of every group, or as many as the router needs."""
    size = topology.num_experts // topology.num_groups
    count = max(2, -(-size // 2), -(-topology.top_k // topology.top_groups))
    return [e for e in range(topology.num_experts) if e % size < count]


class _Calls:
    """What the routers of a model were called with in one pass, and where their blocks and experts were called."""

    def __init__(self, model: torch.nn.Module, structure: Structure, modules: Sequence[torch.nn.Module]) -> None:
        self.model, self.structure, self.modules = model, structure, modules
        self.seen: dict[tuple[str, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.names: dict[int, dict[int, str]] = {}  # by layer: names of the router's tensors by their id in the pass

    def block(self, layer: int) -> torch.nn.Module:
        """The MoE block: router and experts."""
        return self.model.get_submodule(self.structure.experts_modules[layer].rpartition(".")[0])

    def tensor(self, name: str) -> Any:
        """A tensor of the model as it is now."""
        owner, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), leaf)

    def observe(self, forward: Callable[[], object]) -> None:
        """Run the model once and record the calls."""
        import torch

        hooks = []
        for layer, module in enumerate(self.modules):
            experts = self.model.get_submodule(self.structure.experts_modules[layer])
            for what, watched in (("block", self.block(layer)), ("router", module), ("experts", experts)):
                record = functools.partial(self._record, what, layer)
                hooks.append(watched.register_forward_pre_hook(record, with_kwargs=True))
        try:
            with torch.inference_mode():
                forward()
        finally:
            for hook in hooks:
                hook.remove()

    def _record(
        self, what: str, layer: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.seen[what, layer] = (args, kwargs)
        self.names.setdefault(layer, {id(self.tensor(n)): n for n in router_tensors(self.structure, layer)})

    def repeat(self, layer: int, hidden: torch.Tensor) -> Any:
        """Call a router again, on other hidden states ``[token, hidden]``; its tensors are looked up again."""
        (first, *args), kwargs = self.seen["router", layer]
        names = self.names[layer]

        def current(value: Any) -> Any:
            return self.tensor(names[id(value)]) if id(value) in names else value

        shaped = hidden.reshape(*(1,) * (first.dim() - 2), *hidden.shape)  # some routers need a batch axis
        return self.modules[layer](shaped, *map(current, args), **{k: current(v) for k, v in kwargs.items()})

    def same(self, one: str, two: str, layer: int) -> bool:
        """Whether two modules of a layer were called with the same hidden states."""
        import torch

        (first, *_), (second, *_) = self.seen[one, layer][0] or (None,), self.seen[two, layer][0]
        return (
            first is not None and first.numel() == second.numel() and torch.equal(first.reshape(second.shape), second)
        )


def check_searchable(structure: Structure) -> None:
    """Refuse a model with routers that choose by token id: no hidden states say which experts another set would get.

    Raises:
        InputError: says so.
    """
    if structure.tables:
        raise InputError(
            f"routers of {structure.topology.family} look up experts by token id, so that no search can run on it. Use "
            f"another {arg('method')}"
        )


def observe_calls(
    model: torch.nn.Module, structure: Structure, modules: Sequence[torch.nn.Module], forward: Callable[[], object]
) -> tuple[list[AskRouter], list[torch.nn.Module]]:
    """How the model calls the router of every MoE layer, as a function of the hidden states, and where these arrive.

    Some families hand a router more than the hidden states: a bias that belongs to the block. It is looked up at every
    call, so that a masked layer's bias is the masked one. For the same reason a pass that is to stop before a layer's
    routing stops at the block, before the bias is looked up, if the block sees what its router sees.

    Args:
        model: the live model.
        structure: its checkpoint.
        modules: the routers.
        forward: runs the model once on a few tokens.

    Returns:
        The functions, and the modules to stop at.

    Raises:
        InputError: a router sees other hidden states than its experts, or chooses by token id.
    """
    check_searchable(structure)
    calls = _Calls(model, structure, modules)
    calls.observe(forward)
    stops = []
    for layer, module in enumerate(modules):
        stops.append(calls.block(layer) if calls.same("block", "router", layer) else module)
        if not calls.same("router", "experts", layer):
            raise InputError(
                f"the routers of {structure.topology.family} see other hidden states than its experts, so that no "
                f"search can run on it. Use another {arg('method')}"
            )
    return [functools.partial(calls.repeat, layer) for layer in range(len(modules))], stops
