"""Repair through the layers: reads a model, a plan and calibration text, gives new down projections for every MoE layer.

Two passes run side by side over the same text, the original's and the pruned model's. Where both have arrived at a MoE
block its output is taken here, for both: the original's is the target, the pruned one's is repaired (`repair`) before
it goes on. So every layer is fitted on what the repaired layers before it give, its weights are read once for both,
and the passes between the blocks stay the model's own. Nothing stays changed in the model.

No table of families: routing weights are what the experts are called with, the shared expert is the one linear module of
the block that ends at the hidden size, its factor is what the block's own output says. The linear form that comes of it
is compared with the block's output; a family that it does not fit is refused.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moecover.corpus import Corpus
from moecover.errors import InputError
from moecover.lockstep import current_call, lockstep
from moecover.masking import masked_layer
from moecover.model import backbone_of, batches, routers
from moecover.plans import Plan, check_plan
from moecover.repair import Block, Fit, fit
from moecover.streaming import Streamed, arrivals
from moecover.topology import Structure

if TYPE_CHECKING:
    import torch

SHARED = "shared"
ROUNDING = {
    "float32": 1e-4,
    "float16": 1e-2,
    "bfloat16": 5e-2,
}  # share of the output's norm that the linear form may miss


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


@contextlib.contextmanager
def repaired(model: torch.nn.Module, structure: Structure, repairs: Sequence[LayerRepair]) -> Iterator[torch.nn.Module]:
    """A model in memory with all repairs; use it within `masking.masked`."""
    with contextlib.ExitStack() as stack:
        for layer, repair in enumerate(repairs):
            stack.enter_context(repaired_layer(model, structure, layer, repair))
        yield model


def _refused(structure: Structure, reason: str) -> InputError:
    return InputError(f"--repair does not run on {structure.topology.family}: {reason}. Use --repair none")


def check_repairable(model: torch.nn.Module, structure: Structure) -> list[str | None]:
    """The name of the shared expert's down projection in every MoE layer, None where there is none.

    Raises:
        InputError: quantised experts, or experts of another form than down projection x activation.
    """
    import torch

    if structure.quantised:
        raise _refused(structure, f"its experts are quantised ({structure.quantised}), a refitted weight would have to be quantised anew; repair the original that it was made from")  # fmt: skip
    found: list[str | None] = []
    for module in structure.experts_modules:
        experts: Any = model.get_submodule(module)
        name = module.rpartition(".")[0]
        block, down = model.get_submodule(name), getattr(experts, "down_proj", None)
        if not isinstance(down, torch.nn.Parameter) or not hasattr(experts, "has_post_expert_norm"):
            raise _refused(structure, "its experts hold no stacked down projection")
        if experts.has_bias or experts.is_transposed or experts.has_post_expert_norm:
            raise _refused(structure, "its experts have biases, a norm or transposed weights")
        inside = {id(m) for m in experts.modules()}
        linear = [
            f"{name}.{k}" for k, m in block.named_modules()
            if isinstance(m, torch.nn.Linear) and id(m) not in inside and m.out_features == down.shape[1]
        ]  # fmt: skip
        if len(linear) > 1:
            raise _refused(structure, f"{len(linear)} modules beside the experts end at the hidden size, one shared expert is known here")  # fmt: skip
        found.append(linear[0] if linear else None)
    return found


def _activations(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """What enters an expert's down projection, ``[row, width]``, by the experts module's own functions."""
    import torch

    if experts.has_gate:
        activated: torch.Tensor = experts._apply_gate(torch.nn.functional.linear(hidden, experts.gate_up_proj[expert]))
    else:
        activated = experts.act_fn(torch.nn.functional.linear(hidden, experts.up_proj[expert]))
    return activated


def _blocks(
    model: torch.nn.Module, structure: Structure, layer: int, shared: str | None, forward: Callable[[Any], Any],
    arrived: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], kept: Sequence[int],
) -> list[Block]:  # fmt: skip
    """All that adds to a masked layer's output, over the tokens of all batches that are no padding.

    Raises:
        InputError: the block's output is something else than their sum.
    """
    import torch

    experts: Any = model.get_submodule(structure.experts_modules[layer])
    seen: dict[str, Any] = {}

    def before_experts(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        seen["experts"] = args

    def after_experts(module: Any, args: Any, output: torch.Tensor) -> None:
        seen["routed"] = output

    def after_shared(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen["shared"] = args[0].flatten(0, -2), output.flatten(0, -2)

    handles = [experts.register_forward_pre_hook(before_experts), experts.register_forward_hook(after_experts)]
    if shared is not None:
        handles.append(model.get_submodule(shared).register_forward_hook(after_shared))
    called: tuple[list[torch.Tensor], ...] = [], [], []  # what the experts are called with
    beside = []
    missed, norm = 0.0, 0.0
    try:
        for batch, mask in zip(arrived, masks, strict=True):
            output = _output(structure, forward(batch))[mask].double()
            if len(seen["experts"]) != 3:
                raise _refused(structure, "its experts are not called with hidden states, experts and weights")
            for values, given in zip(called, seen["experts"], strict=True):
                values.append(given[mask])
            rest = output - seen["routed"].reshape(-1, output.shape[-1])[mask].double()
            if shared is not None:
                activated, added = (part[mask] for part in seen["shared"])
                added = added.double()
                factor = (rest * added).sum(-1) / added.square().sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
                beside.append(activated.float() * factor.float()[:, None])
                rest = rest - factor[:, None] * added
            missed, norm = missed + float(rest.square().sum()), norm + float(output.square().sum())
    finally:
        for handle in handles:
            handle.remove()
    if missed**0.5 > ROUNDING[str(experts.down_proj.dtype).removeprefix("torch.")] * norm**0.5:
        raise _refused(structure, "its block adds something else than its experts' outputs and one shared expert's")
    tokens, experts_of, weight_of = (torch.cat(part) for part in called)
    blocks = []
    for expert in kept:
        token, slot = (experts_of == expert).nonzero(as_tuple=True)
        features = _activations(experts, expert, tokens[token]).float() * weight_of[token, slot].float()[:, None]
        blocks.append(Block(str(expert), experts.down_proj.data[expert].clone(), token, features))
    if shared is not None:
        everyone = torch.arange(len(tokens), device=tokens.device)
        weight = model.get_submodule(shared).weight.data.clone()  # type: ignore[operator]
        blocks.append(Block(SHARED, weight, everyone, torch.cat(beside)))
    return blocks


def _output(structure: Structure, output: Any) -> torch.Tensor:
    """A block's output ``[token, hidden]``."""
    import torch

    if not torch.is_tensor(output):
        raise _refused(structure, "its block gives more than the hidden states")
    return output.reshape(-1, output.shape[-1])


def repair_layers(
    model: torch.nn.Module | Streamed,
    structure: Structure,
    plan: Plan,
    corpora: Sequence[Corpus],
    *,
    kind: str,
    batch_size: int = 4,
    advance: Callable[[int], None] = lambda layers: None,
    **options: Any,
) -> list[LayerRepair]:
    """Refitted down projections of a plan's kept experts and of the shared one, layer by layer.

    Args:
        model: from `load_model` or `streamed`; it is left as it was.
        structure: its checkpoint.
        plan: which experts stay.
        corpora: calibration text; every corpus counts the same.
        kind: ``scale`` or ``ridge``, see `repair.fit`.
        batch_size: sequences per forward pass.
        advance: called with 1 behind every layer.
        options: of `repair.fit`.

    Raises:
        InputError: the plan does not fit, or the family cannot be repaired; says why.
    """
    import torch

    check_plan(plan, structure, other_weights=True)
    live, device = (model.model, model.device) if isinstance(model, Streamed) else (model, next(model.parameters()).device)  # fmt: skip
    shared, modules = check_repairable(live, structure), routers(live, structure)
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

    def taken(hidden: torch.Tensor, *others: Any, **more: Any) -> Any:
        if others or more:
            raise _refused(structure, "its block is called with more than the hidden states")
        return given.pop(current_call())

    found: list[LayerRepair] = []
    try:
        for block in blocks:
            block.forward = taken
        steps = arrivals(model, calls, blocks) if isinstance(model, Streamed) else lockstep(calls, blocks)
        with torch.inference_mode(), contextlib.closing(steps):
            for layer, arrived in enumerate(steps):
                forward, kept = forwards[layer], plan.layers[layer].kept
                originals, pruned = arrived[: len(passes)], arrived[len(passes) :]
                given |= {i: forward(batch) for i, batch in enumerate(originals)}
                target = torch.cat([_output(structure, given[i])[mask] for i, mask in enumerate(masks)])
                with masked_layer(live, structure, modules[layer], layer, kept):
                    parts = _blocks(live, structure, layer, shared[layer], forward, pruned, masks, kept)
                    made = fit(parts, target, corpus_of, kind=kind, **options)
                    del parts, target
                    down = f"{shared[layer]}.weight"
                    repair = LayerRepair(
                        structure.topology.decoder_layers[layer],
                        {int(name): weight for name, weight in made.weights.items() if name != SHARED},
                        (down, made.weights[SHARED]) if SHARED in made.weights else None,
                        made,
                    )
                    with repaired_layer(live, structure, layer, repair):
                        given |= {len(passes) + i: forward(batch) for i, batch in enumerate(pruned)}
                found.append(repair)
                advance(1)
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
    return found
