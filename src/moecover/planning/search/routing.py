"""A router as a function of its logits, recognised from what it does: for searches that re-route without running it.

Reads a live router and hidden states; gives a `Routing`, or says that the router is of no kind that is known here. It is
recognised by its outputs on the whole and on a reduced set of experts, never by the name of its family.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.structure import Structure
from moecover.errors import InputError
from moecover.runtime.masking import masked_layer, router_tensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Routing:
    """How a router goes from logits to the experts of a token and their weights.

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
        """What the choice goes by, ``[..., expert]``; minus infinity outside the groups that a token may use."""
        import torch

        choice = scores if self.bias is None else scores + self.bias
        if self.num_groups == 1:
            return choice
        groups = choice.reshape(*choice.shape[:-1], self.num_groups, -1)
        best = groups.topk(self.group_best, dim=-1).values.sum(-1)
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(self.top_groups, -1).indices, True)
        return torch.where(allowed[..., None], groups, -torch.inf).flatten(-2)

    def weights(self, selected: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Weights of selected experts from their scores ``[..., slot]`` and the sum over the experts that are there.

        With dropped experts' logits at minus infinity a softmax runs over the others: their scores over ``total``.
        """
        if self.renormalise:
            return self.scale * selected / selected.sum(-1, keepdim=True)
        return self.scale * (selected / total if self.scoring == "softmax" else selected)


def describe(routing: Routing) -> str:
    """A routing in words, without its numbers."""
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
    model: torch.nn.Module, structure: Structure, router: torch.nn.Module, ask: Callable[[torch.Tensor], Any], layer: int,
    hidden: torch.Tensor,
) -> Routing:  # fmt: skip
    """The routing of a MoE layer's router.

    Args:
        model: the live model.
        structure: its checkpoint.
        router: of the layer.
        ask: calls it as the model does.
        layer: MoE layer.
        hidden: what enters the router, ``[token, hidden]``.

    Raises:
        InputError: the router does something else.
    """
    import torch

    topology = structure.topology
    hidden = hidden[:256]
    size = topology.num_experts // topology.num_groups
    fewer = sorted(e for e in range(topology.num_experts) if e % size < max(2, -(-size // 2), -(-topology.top_k // topology.top_groups)))  # fmt: skip
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
    kinds = itertools.product(("softmax", "sigmoid"), (False, True), biases, (1, 2) if topology.num_groups > 1 else (1,))  # fmt: skip
    for scoring, renormalise, bias, best in kinds:
        tried = Routing(scoring, renormalise, 1.0, topology.top_k, bias, topology.num_groups, topology.top_groups, best)
        scale = _fits(tried, whole[0], whole[1], whole[2])
        cut = Routing(scoring, renormalise, 1.0, topology.top_k, None if bias is None else bias[ids], topology.num_groups, topology.top_groups, best)  # fmt: skip
        again = None if scale is None else _fits(cut, reduced[0], reduced[1], position[reduced[2]])
        if scale is not None and again is not None and abs(again / scale - 1) < 0.01:
            return Routing(scoring, renormalise, scale, topology.top_k, bias, topology.num_groups, topology.top_groups, best)  # fmt: skip
    raise InputError(f"the router of decoder layer {topology.decoder_layers[layer]} of {topology.family} is of a kind that a search cannot re-route. Use another --method")  # fmt: skip


def observe_calls(
    model: torch.nn.Module, structure: Structure, modules: Sequence[torch.nn.Module], forward: Callable[[], Any]
) -> tuple[list[Callable[[torch.Tensor], Any]], list[torch.nn.Module]]:
    """How the model calls the router of every MoE layer, as a function of the hidden states alone, and where it arrives.

    Some families hand a router more than the hidden states: a bias that lies in the block. It is looked up at every
    call, so that a masked layer's bias is the masked one. For the same reason a pass that is to be stopped before a
    layer's routing is stopped at the block, before it looks the bias up, where the block sees what its router sees.

    Args:
        model: the live model.
        structure: its checkpoint.
        modules: the routers.
        forward: runs the model once on a few tokens.

    Returns:
        The functions, and the modules at which to stop.

    Raises:
        InputError: a router sees something else than its experts.
    """
    import torch

    seen: dict[tuple[str, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}
    names: dict[int, dict[int, str]] = {}  # by layer: the router's tensors, by what they are while it is called

    def owner_of(key: str) -> tuple[Any, str]:
        owner, _, leaf = key.rpartition(".")
        return model.get_submodule(owner), leaf

    def note(what: str, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[what, layer] = (args, kwargs)
        names.setdefault(layer, {id(getattr(*owner_of(key))): key for key in router_tensors(structure, layer)})

    hooks = []
    for layer, module in enumerate(modules):
        experts_name = structure.experts_modules[layer]
        block = model.get_submodule(experts_name.rpartition(".")[0])
        for what, watched in (("block", block), ("router", module), ("experts", model.get_submodule(experts_name))):
            hooks.append(watched.register_forward_pre_hook(functools.partial(note, what, layer), with_kwargs=True))
    try:
        with torch.inference_mode():
            forward()
    finally:
        for hook in hooks:
            hook.remove()

    def call(layer: int, hidden: torch.Tensor) -> Any:
        (first, *args), kwargs = seen["router", layer]

        def current(value: Any) -> Any:
            return getattr(*owner_of(names[layer][id(value)])) if id(value) in names[layer] else value

        shaped = hidden.reshape(*(1,) * (first.dim() - 2), *hidden.shape)  # some routers ask for a batch axis
        return modules[layer](shaped, *map(current, args), **{k: current(v) for k, v in kwargs.items()})

    stops = []
    for layer, module in enumerate(modules):
        router, experts = seen["router", layer][0][0], seen["experts", layer][0][0]
        block_args = seen["block", layer][0]
        alike = bool(block_args) and block_args[0].numel() == router.numel() and torch.equal(block_args[0].reshape(router.shape), router)  # fmt: skip
        stops.append(model.get_submodule(structure.experts_modules[layer].rpartition(".")[0]) if alike else module)
        if router.numel() != experts.numel() or not torch.equal(router.reshape(experts.shape), experts):
            raise InputError(f"the routers of {structure.topology.family} see something else than its experts: a search does not run on it. Use another --method")  # fmt: skip
    return [functools.partial(call, layer) for layer in range(len(modules))], stops
