"""Repair layer by layer: reads a model, a plan and calibration text, yields new down projections for every MoE layer.

Two passes run side by side over the same text, the original's and the pruned model's, one decoder layer at a time. A
layer with experts runs twice: first up to its MoE block, whose output is then computed here for both passes: the
original's is the target, the pruned one's is repaired (`solver.fit`) before it is passed on; then with these outputs in
place of the block. So every layer is fitted on the output of the repaired layers before it, its weights are read once
for both passes, and everything else stays the model's own. The model is left unchanged.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Unpack

from moecover.checkpoints.structure import Structure
from moecover.corpora.batches import batches
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.planning.artifact import Plan
from moecover.planning.fitting import check_plan
from moecover.repairing.applied import LayerRepair, repaired_layer
from moecover.repairing.blocks import SHARED, blocks_of, output_of
from moecover.repairing.calibration import Calibration
from moecover.repairing.moving import moved_block
from moecover.repairing.parts import Part
from moecover.repairing.refit import needed_bytes as refit_bytes
from moecover.repairing.solver import HELD_SHARE, REFIT, FitOptions, fit, peak_bytes
from moecover.repairing.sums import Block
from moecover.repairing.targets import Place, check_dtype, check_understood, places, refused, thinned
from moecover.runtime.devices import check_float64
from moecover.runtime.distributed import wait_for_all
from moecover.runtime.finite import is_finite, naming, not_finite, rows_text
from moecover.runtime.forwards import give_back, with_forward
from moecover.runtime.loading import backbone_of, device_of, routers
from moecover.runtime.lockstep import Here, Passing
from moecover.runtime.masking import masked_layer
from moecover.runtime.running import Running, running

if TYPE_CHECKING:
    import torch

TOKENS = 65_536  # of calibration text that a repair runs on by default


class _ArrivedError(Exception):
    """Ends a layer's run at its MoE block, which is called with ``hidden``."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


def needed_bytes(structure: Structure, where: Sequence[Place], *, kind: str, keep: int, tokens: int, dtype: str) -> int:
    """Bytes of memory that the repair of the largest layer takes beside the model, with hidden states of both passes.

    Args:
        structure: the checkpoint.
        where: from `places`.
        kind: of the repair.
        keep: experts kept per layer.
        tokens: of all corpora.
        dtype: of the model, by torch's name, ``auto`` for the stored one.
    """
    import torch

    topology, refits = structure.topology, kind == REFIT
    hidden, slots, experts = topology.hidden_size, topology.top_k, topology.num_experts

    def of_layer(place: Place) -> int:
        width, shared = place.widths
        features = 4 * tokens * (slots * width + shared)
        # Target, inputs of the experts, outputs of both blocks; hidden states of both passes, twice as in `memory`.
        held = 8 * tokens * hidden * int(getattr(torch, place.dtype if dtype == "auto" else dtype).itemsize)
        widths = [width] * keep + [shared] * (shared > 0)
        solving = features + peak_bytes(tokens=tokens, hidden_size=hidden, widths=widths)
        of_width = 3 * hidden * width  # parameters of an expert
        moved = keep * of_width + 3 * hidden * shared + experts * hidden
        # The experts' parameters are spread over all experts' places at every step, with gradients.
        moving = refit_bytes(moved, tokens=tokens, hidden_size=hidden) + 8 * experts * of_width if refits else 0
        return held + max(solving, moving)

    return max(map(of_layer, where))


class _Passes:
    """The forward passes of a repair over the calibration text: all of the original, then all of the pruned model.

    Attributes:
        calls: each runs one batch.
        weights: of the corpora.
    """

    def __init__(
        self,
        runs: Running,
        structure: Structure,
        plan: Plan,
        corpora: Sequence[Corpus],
        batch_size: int,
        kind: str,
        options: FitOptions,
    ) -> None:
        import torch

        self._runs, self._structure, self._plan = runs, structure, plan
        self._kind, self._options = kind, options
        self._model = runs.module
        self._places = thinned(structure, places(structure, self._model), plan.width)
        self._routers = routers(self._model, structure)
        check_dtype(structure, self._places, str(runs.dtype).removeprefix("torch."))
        check_understood(structure, self._places, kind)
        said = plan.options.get("weights") or {}
        self.weights = [float(said.get(corpus.name, 1.0)) for corpus in corpora]
        if not sum(self.weights) > 0:
            raise InputError("every corpus has weight 0 in the plan: there is nothing to repair on")
        inputs, corpus_of, mine = list[dict[str, torch.Tensor]](), list[torch.Tensor](), list[torch.Tensor]()
        self._masks: list[torch.Tensor] = []
        self._names: list[str] = []  # of the batches, for messages
        for number, corpus in enumerate(corpora):
            for place, one in enumerate(batches(corpus, batch_size)):
                mask = one.get("attention_mask", torch.ones_like(one["input_ids"])).flatten().bool()
                corpus_of.append(torch.full((int(mask.sum()),), number))
                mine.append(torch.full_like(corpus_of[-1], runs.world.mine(len(mine)), dtype=torch.bool))
                if not runs.world.mine(len(mine) - 1):
                    continue
                rows = rows_text("block", place * batch_size, len(one["input_ids"]))
                self._names.append(f"corpus {corpus.name}, {rows}")
                inputs.append({key: value.to(runs.device) for key, value in one.items()})
                self._masks.append(mask)
        if len(mine) < runs.world.size:
            raise InputError(
                f"{runs.world.size} processes share {len(mine)} batches of the repair: start fewer, or give a smaller"
                f" {arg('batch_size')} or more text"
            )
        self._part = Part(torch.cat(corpus_of), torch.cat(mine).nonzero()[:, 0], runs.world)
        backbone = backbone_of(self._model)
        self.calls = [functools.partial(backbone, **one, use_cache=False) for one in inputs] * 2
        self._stops = [self._model.get_submodule(runs.layers[n]) for n in structure.topology.decoder_layers]
        self._blocks = [self._model.get_submodule(name.rpartition(".")[0]) for name in structure.experts_modules]
        self._forwards = [block.forward for block in self._blocks]
        self._own = [vars(block).get("forward") for block in self._blocks]
        self._given: dict[int, torch.Tensor] = {}  # what the block of the current layer gives to a pass
        self._running = 0  # the pass whose layer runs

    def run(self, passing: Passing) -> None:
        """Note whose layer runs next."""
        self._running = passing.call

    def repair(self, layer: int, waiting: Sequence[Passing], found: LayerRepair | None) -> LayerRepair:
        """Repair the layer at which all passes wait, and set what its block gives to each of them.

        Args:
            layer: index of the MoE layer.
            waiting: the passes.
            found: the layer's repair from an earlier run.
        """
        forward, count = self._forwards[layer], len(self._masks)
        pruned = [self._arrived_at(layer, passing) for passing in waiting[count:]]
        originals = [self._arrived_at(layer, passing) for passing in waiting[:count]]
        self._given.update((i, forward(batch)) for i, batch in enumerate(originals))
        del originals
        self._blocks[layer].forward = self._taken
        kept, channels = self._plan.layers[layer].kept, self._plan.layers[layer].channels or None
        with masked_layer(self._model, self._structure, self._routers[layer], layer, kept, channels):
            repair = found if found is not None else self._made(layer, pruned)
            if layer < len(self._blocks) - 1:
                with repaired_layer(self._model, self._structure, layer, repair):
                    self._given.update((count + i, forward(batch)) for i, batch in enumerate(pruned))
        return repair

    def restore(self) -> None:
        """Give all blocks their own forward again."""
        for block, own in zip(self._blocks, self._own, strict=True):
            give_back(block, own)

    def _made(self, layer: int, pruned: Sequence[torch.Tensor]) -> LayerRepair:
        """The repair of a masked layer."""
        import torch

        wait_for_all(self._runs.world)
        structure, device = self._structure, device_of(self._blocks[layer])
        masks = [mask.to(device) for mask in self._masks]
        part = self._part.to(device)
        outputs = [output_of(structure, self._given[i])[mask] for i, mask in enumerate(masks)]
        for name, output in zip(self._names, outputs, strict=True):
            if not is_finite(output):
                raise not_finite(name, "the output of the original's experts is")
        target = torch.cat(outputs)
        del outputs
        place, kept = self._places[layer], self._plan.layers[layer].kept
        parts = blocks_of(self._model, structure, layer, place, self._forwards[layer], pruned, masks, kept)
        solved = self._solved(layer, parts, target, part)
        if self._kind != REFIT:
            return solved
        trial = self._solved(layer, parts, target, part, everything=False)
        del parts
        arrived = torch.cat([b.reshape(-1, b.shape[-1])[m] for b, m in zip(pruned, masks, strict=True)])
        calibration = Calibration(target, part, self.weights, HELD_SHARE)
        with with_forward(self._blocks[layer], self._forwards[layer]):
            return moved_block(
                self._model, structure, layer, place, kept, (trial, solved), arrived, target, calibration
            )

    def _solved(
        self,
        layer: int,
        parts: Sequence[Block],
        target: torch.Tensor,
        part: Part,
        *,
        everything: bool = True,
    ) -> LayerRepair:
        """The repair in closed form; ``everything``: also on the tokens that are held out."""
        structure, place = self._structure, self._places[layer]
        made = fit(
            parts,
            target,
            part,
            kind=self._kind,
            weights=self.weights,
            everything=everything,
            **self._options,
        )
        experts = {int(name): weight for name, weight in made.weights.items() if name != SHARED}
        shared = (place.shared[0], made.weights[SHARED]) if place.shared and SHARED in made.weights else None
        return LayerRepair(structure.topology.decoder_layers[layer], experts, shared, made)

    def _arrived_at(self, layer: int, passing: Passing) -> torch.Tensor:
        """What a MoE block is called with in a pass."""
        self._blocks[layer].forward = self._arriving
        try:
            self._stops[layer](*passing.args, **passing.kwargs)
        except _ArrivedError as arrived:
            return arrived.hidden
        raise refused(self._structure, "a layer does not run its block")

    def _arriving(self, hidden: torch.Tensor, *others: object, **more: object) -> None:
        if others or more:
            raise refused(self._structure, "its block is called with more than the hidden states")
        raise _ArrivedError(hidden)

    def _taken(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._given.pop(self._running)


def repair_layers(
    model: torch.nn.Module | Running,
    structure: Structure,
    plan: Plan,
    corpora: Sequence[Corpus],
    *,
    kind: str,
    batch_size: int = 4,
    done: Callable[[int], LayerRepair | None] = lambda layer: None,
    **options: Unpack[FitOptions],
) -> Generator[LayerRepair]:
    """Refit the down projections of a plan's kept experts and of the shared one, layer after layer.

    Args:
        model: from `load_model` or `streamed`; it is left as it was.
        structure: its checkpoint.
        plan: which experts stay; corpora count by its weights, equally where it has none.
        corpora: calibration text.
        kind: see `solver.KINDS`.
        batch_size: sequences per forward pass.
        done: returns the repair of a MoE layer that an earlier run has made, which is not made again, or None.
        options: of `solver.fit`.

    Yields:
        The repair of every MoE layer, in order.

    Raises:
        InputError: the plan does not fit, every corpus has weight 0, the model runs in a dtype narrower than the stored
            one, a number is not finite, or the family cannot be repaired; says why.
    """
    import torch

    check_plan(plan, structure, other_weights=True)
    runs = running(model, structure)
    check_float64(runs.device, "a repair")
    passes = _Passes(runs, structure, plan, corpora, batch_size, kind, options)
    layer_of = {number: layer for layer, number in enumerate(structure.topology.decoder_layers)}
    try:
        with contextlib.closing(runs.at_layers(passes.calls, Here(before=passes.run))) as steps:
            for number, waiting in enumerate(steps):
                if (layer := layer_of.get(number)) is None:
                    continue
                with torch.inference_mode(), naming(f"decoder layer {number}"):
                    repair = passes.repair(layer, waiting, done(layer))
                yield repair
                if layer == len(layer_of) - 1:
                    break
    finally:
        passes.restore()
