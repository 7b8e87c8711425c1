"""Repair through the layers: reads a model, a plan and calibration text, gives new down projections for every MoE layer.

Two passes run side by side over the same text, the original's and the pruned model's, a decoder layer at a time. A layer with
experts runs twice: first up to its MoE block, whose output is then made here, for both: the original's is the target, the
pruned one's is repaired (`repair`) before it goes on; then with these outputs in the block's place. So every layer is
fitted on what the repaired layers before it give, its weights are read once for both, and all else stays the model's
own. Nothing stays changed in the model.

No table of families: routing weights are what the experts are called with, the shared expert's factor is what the block's
own output says (`repairable` says which module it is). The linear form that comes of it is compared with the block's
output; a family that it does not fit is refused.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.structure import Structure
from moecover.corpora.batches import batches
from moecover.corpora.packing import Corpus
from moecover.errors import InputError
from moecover.planning.artifact import Plan, check_plan
from moecover.repairing.solver import Block, Fit, fit, peak_bytes
from moecover.repairing.targets import Place, check_dtype, places, refused
from moecover.runtime.loading import backbone_of, routers
from moecover.runtime.lockstep import Here, Passing
from moecover.runtime.masking import masked_layer
from moecover.runtime.running import Running, Within, running

if TYPE_CHECKING:
    import torch

SHARED = "shared"
TOKENS = 65_536  # of calibration text that a repair runs on when nothing else is said
ROUNDING = {
    "float32": 1e-4,
    "float16": 1e-2,
    "bfloat16": 5e-2,
}  # share of the output's norm that the linear form may miss


class _ArrivedError(Exception):
    """Ends a layer's run at its MoE block, which is called with ``hidden``."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


@dataclass(frozen=True)
class LayerRepair:
    """The repair of one MoE layer.

    Attributes:
        decoder_layer: its index.
        experts: new down projections ``[hidden, width]`` by the expert's id in the original.
        shared: name of the shared expert's down projection in the model and its new weight, None where it stays.
        fit: how well it fits.
    """

    decoder_layer: int
    experts: dict[int, torch.Tensor]
    shared: tuple[str, torch.Tensor] | None
    fit: Fit


@contextlib.contextmanager
def repaired_layer(model: torch.nn.Module, structure: Structure, layer: int, repair: LayerRepair) -> Iterator[None]:
    """One MoE layer with its repair; the block's end takes it out again. Its weights have to be in memory."""
    import torch

    experts: Any = model.get_submodule(structure.experts_modules[layer])
    places = [(experts.down_proj.data[expert], weight) for expert, weight in repair.experts.items()]
    if repair.shared is not None:
        places.append((model.get_parameter(repair.shared[0]).data, repair.shared[1]))
    with torch.inference_mode():
        originals = [place.clone() for place, _ in places]
        for place, weight in places:
            place.copy_(weight)
    try:
        yield
    finally:
        with torch.inference_mode():
            for (place, _), original in zip(places, originals, strict=True):
                place.copy_(original)


def with_repairs(
    model: torch.nn.Module, structure: Structure, within: Within, repair_of: Callable[[int], LayerRepair]
) -> Within:
    """A context for every decoder layer that adds a MoE layer's repair, made when it is entered, to another one."""
    layer_of = {number: layer for layer, number in enumerate(structure.topology.decoder_layers)}

    @contextlib.contextmanager
    def both(number: int) -> Iterator[None]:
        with within(number), contextlib.ExitStack() as stack:
            if number in layer_of:
                layer = layer_of[number]
                stack.enter_context(repaired_layer(model, structure, layer, repair_of(layer)))
            yield

    return both


@contextlib.contextmanager
def repaired(model: torch.nn.Module, structure: Structure, repairs: Sequence[LayerRepair]) -> Iterator[torch.nn.Module]:
    """A model in memory with all repairs; use it within `masking.masked`."""
    with contextlib.ExitStack() as stack:
        for layer, repair in enumerate(repairs):
            stack.enter_context(repaired_layer(model, structure, layer, repair))
        yield model


def _activations(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """What enters an expert's down projection, ``[row, width]``, by the experts module's own functions."""
    import torch

    if experts.has_gate:
        activated: torch.Tensor = experts._apply_gate(torch.nn.functional.linear(hidden, experts.gate_up_proj[expert]))
    else:
        activated = experts.act_fn(torch.nn.functional.linear(hidden, experts.up_proj[expert]))
    return activated


def _blocks(
    model: torch.nn.Module, structure: Structure, layer: int, place: Place, forward: Callable[[Any], Any],
    arrived: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], kept: Sequence[int],
) -> list[Block]:  # fmt: skip
    """All that adds to a masked layer's output, over the tokens of all batches that are no padding.

    The experts themselves run on the first batch only, for the comparison; beyond it their place is taken by zeros.

    Raises:
        InputError: the block's output is something else than their sum.
    """
    import torch

    experts: Any = model.get_submodule(structure.experts_modules[layer])
    stored = getattr(torch, place.dtype)
    total = sum(int(mask.sum()) for mask in masks)
    seen: dict[str, Any] = {}

    def before_experts(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        seen["experts"] = args

    def after_experts(module: Any, args: Any, output: torch.Tensor) -> None:
        seen["routed"] = output

    def after_shared(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen["shared"] = args[0].flatten(0, -2), output.flatten(0, -2)

    handles = [experts.register_forward_pre_hook(before_experts), experts.register_forward_hook(after_experts)]
    if place.shared is not None:
        handles.append(model.get_submodule(place.shared[0].removesuffix(".weight")).register_forward_hook(after_shared))
    called: tuple[list[torch.Tensor], ...] = [], [], []  # what the experts are called with
    beside = torch.empty(total, place.widths[1], device=experts.down_proj.device)
    at, missed, norm, first = 0, 0.0, 0.0, torch.empty(0)
    try:
        for batch, mask in zip(arrived, masks, strict=True):
            output = _output(structure, forward(batch))[mask].double()
            if len(seen["experts"]) != 3 or seen["routed"].shape != seen["experts"][0].shape:
                raise refused(structure, "its experts are not called with hidden states, experts and weights")
            for values, given in zip(called, seen["experts"], strict=True):
                values.append(given[mask])
            rest = output - seen["routed"].reshape(-1, output.shape[-1])[mask].double()
            if place.shared is not None:
                activated, added = (part[mask] for part in seen["shared"])
                added = added.double()
                factor = (rest * added).sum(-1) / added.square().sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
                beside[at : at + len(output)] = activated.float() * factor.float()[:, None]
                rest -= factor[:, None] * added
            missed, norm = missed + float(rest.square().sum()), norm + float(output.square().sum())
            at += len(output)
            if "forward" not in experts.__dict__:
                first = output
                experts.forward = lambda hidden, *others: torch.zeros_like(hidden)
    finally:
        experts.__dict__.pop("forward", None)
        for handle in handles:
            handle.remove()
    tokens, experts_of, weight_of = (torch.cat(part) for part in called)
    blocks = []
    for expert in kept:
        token, slot = (experts_of == expert).nonzero(as_tuple=True)
        features = _activations(experts, expert, tokens[token]).float() * weight_of[token, slot].float()[:, None]
        blocks.append(Block(str(expert), experts.down_proj.data[expert].to(stored), token, features))
    if place.shared is not None:
        everyone = torch.arange(len(tokens), device=tokens.device)
        blocks.append(Block(SHARED, model.get_parameter(place.shared[0]).data.to(stored), everyone, beside))
    squared = float(first.square().sum())
    for block in blocks:
        rows = block.tokens < len(first)
        first.index_add_(0, block.tokens[rows], (block.features[rows] @ block.weight.float().T).double(), alpha=-1)
    allowed = ROUNDING[str(experts.down_proj.dtype).removeprefix("torch.")]
    if missed**0.5 > allowed * norm**0.5 or float(first.square().sum()) ** 0.5 > allowed * squared**0.5:
        raise refused(structure, "its block adds something else than its experts' outputs and one shared expert's")
    return blocks


def _output(structure: Structure, output: Any) -> torch.Tensor:
    """A block's output ``[token, hidden]``."""
    import torch

    if not torch.is_tensor(output):
        raise refused(structure, "its block gives more than the hidden states")
    return output.reshape(-1, output.shape[-1])


def needed_bytes(structure: Structure, where: Sequence[Place], *, keep: int, tokens: int, dtype: str) -> int:
    """Bytes that the repair of the largest layer takes beside the model, hidden states of both passes included.

    Args:
        structure: the checkpoint.
        where: from `places`.
        keep: experts kept per layer.
        tokens: of all corpora.
        dtype: of the model, by torch's name, ``auto`` for the stored one.
    """
    import torch

    hidden, slots = structure.topology.hidden_size, structure.topology.top_k

    def of_layer(place: Place) -> int:
        width, shared = place.widths
        features = 4 * tokens * (slots * width + shared)
        # Target, inputs of the experts, outputs of both blocks; hidden states of both passes, twice as in `fitting`.
        held = 8 * tokens * hidden * int(getattr(torch, place.dtype if dtype == "auto" else dtype).itemsize)
        widths = [width] * keep + [shared] * (shared > 0)
        return features + held + peak_bytes(tokens=tokens, hidden_size=hidden, widths=widths)

    return max(map(of_layer, where))


def repair_layers(
    model: torch.nn.Module | Running,
    structure: Structure,
    plan: Plan,
    corpora: Sequence[Corpus],
    *,
    kind: str,
    batch_size: int = 4,
    done: Callable[[int], LayerRepair | None] = lambda layer: None,
    **options: Any,
) -> Generator[LayerRepair]:
    """Refitted down projections of a plan's kept experts and of the shared one, layer after layer.

    Args:
        model: from `load_model` or `streamed`; it is left as it was.
        structure: its checkpoint.
        plan: which experts stay; corpora count by its weights, the same where it has none.
        corpora: calibration text.
        kind: ``scale`` or ``ridge``, see `repair.fit`.
        batch_size: sequences per forward pass.
        done: the repair of a MoE layer that an earlier run has made, which is not made again; None where there is none.
        options: of `repair.fit`.

    Raises:
        InputError: the plan does not fit, every corpus has weight 0, the model runs in a dtype narrower than the stored
            one, or the family cannot be repaired; says why.
    """
    import torch

    check_plan(plan, structure, other_weights=True)
    runs = running(model, structure)
    live, device = runs.module, runs.device
    where, modules = places(structure, live), routers(live, structure)
    check_dtype(structure, where, str(runs.dtype).removeprefix("torch."))
    said = plan.options.get("weights") or {}
    weights = [float(said.get(corpus.name, 1.0)) for corpus in corpora]
    if not sum(weights) > 0:
        raise InputError("every corpus has weight 0 in the plan: there is nothing to repair on")
    passes, masks, numbers = [], [], []
    for number, corpus in enumerate(corpora):
        for one in batches(corpus, batch_size):
            passes.append({key: value.to(device) for key, value in one.items()})
            masks.append(one.get("attention_mask", torch.ones_like(one["input_ids"])).flatten().bool().to(device))
            numbers.append(torch.full((int(masks[-1].sum()),), number, device=device))
    backbone, corpus_of = backbone_of(live), torch.cat(numbers)
    calls = [functools.partial(backbone, **one, use_cache=False) for one in passes] * 2  # original, pruned
    blocks = [live.get_submodule(name.rpartition(".")[0]) for name in structure.experts_modules]
    given: dict[int, Any] = {}
    forwards = [block.forward for block in blocks]
    going: list[int] = []  # the pass whose layer runs

    def arriving(hidden: torch.Tensor, *others: Any, **more: Any) -> Any:
        if others or more:
            raise refused(structure, "its block is called with more than the hidden states")
        raise _ArrivedError(hidden)

    def taken(hidden: torch.Tensor) -> Any:
        return given.pop(going[0])

    def arrived_at(layer: int, passing: Passing) -> torch.Tensor:
        """What a MoE block is called with in a pass."""
        blocks[layer].forward = arriving
        try:
            stops[layer](*passing.args, **passing.kwargs)
        except _ArrivedError as arrived:
            return arrived.hidden
        raise refused(structure, "a layer does not run its block")

    def run(layer: int, waiting: Sequence[Passing]) -> LayerRepair:
        """The repair of a layer that all passes wait at; leaves what its block gives them."""
        forward, kept, place = forwards[layer], plan.layers[layer].kept, where[layer]
        pruned = [arrived_at(layer, passing) for passing in waiting[len(passes) :]]
        originals = [arrived_at(layer, passing) for passing in waiting[: len(passes)]]
        given.update((i, forward(batch)) for i, batch in enumerate(originals))
        del originals
        blocks[layer].forward = taken
        repair = done(layer)
        with masked_layer(live, structure, modules[layer], layer, kept):
            if repair is None:
                target = torch.cat([_output(structure, given[i])[mask] for i, mask in enumerate(masks)])
                parts = _blocks(live, structure, layer, place, forward, pruned, masks, kept)
                made = fit(parts, target, corpus_of, kind=kind, weights=weights, **options)
                del parts, target
                experts = {int(name): weight for name, weight in made.weights.items() if name != SHARED}
                shared = (place.shared[0], made.weights[SHARED]) if place.shared and SHARED in made.weights else None
                repair = LayerRepair(structure.topology.decoder_layers[layer], experts, shared, made)
            if layer < len(blocks) - 1:
                with repaired_layer(live, structure, layer, repair):
                    given.update((len(passes) + i, forward(batch)) for i, batch in enumerate(pruned))
        return repair

    stops = [live.get_submodule(runs.layers[number]) for number in structure.topology.decoder_layers]
    layer_of = {number: layer for layer, number in enumerate(structure.topology.decoder_layers)}
    here = Here(before=lambda passing: going.__setitem__(slice(None), [passing.call]))
    try:
        with contextlib.closing(runs.at_layers(calls, here)) as steps:
            for number, waiting in enumerate(steps):
                if (layer := layer_of.get(number)) is None:
                    continue
                with torch.inference_mode():
                    repair = run(layer, waiting)
                yield repair
                if layer == len(blocks) - 1:
                    break
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
