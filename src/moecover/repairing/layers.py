"""Merge and repair layer by layer: reads a model, a plan and calibration text, yields new weights for every MoE layer.

Two passes run side by side over the same text, the original's and the pruned model's, one decoder layer at a time. A
layer with experts runs twice: first up to its MoE block, whose output is then computed here for both passes: the
original's is the target, the pruned one's is merged and repaired (`one_layer`) before it is passed on; then with these
outputs in place of the block. So every layer is fitted on the output of the repaired layers before it, its weights are
read once for both passes, and everything else stays the model's own. The model is left unchanged.
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
from moecover.merging.method import NONE
from moecover.merging.methods import merge_of
from moecover.planning.artifact import Plan
from moecover.planning.fitting import NO_REPAIR, check_plan
from moecover.repairing.applied import LayerRepair, repaired_layer
from moecover.repairing.blocks import output_of
from moecover.repairing.merged import check_merged
from moecover.repairing.one_layer import Layer, made
from moecover.repairing.parts import Part
from moecover.repairing.solver import FitOptions
from moecover.repairing.targets import check_dtype, check_understood, places, refused, thinned
from moecover.runtime.devices import check_float64
from moecover.runtime.distributed import wait_for_all
from moecover.runtime.finite import is_finite, naming, not_finite, rows_text
from moecover.runtime.forwards import give_back
from moecover.runtime.loading import backbone_of, device_of, routers
from moecover.runtime.lockstep import Here, Passing
from moecover.runtime.masking import masked_layer
from moecover.runtime.running import Running, running

if TYPE_CHECKING:
    import torch


class _ArrivedError(Exception):
    """Ends a layer's run at its MoE block, which is called with ``hidden``."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


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
        merge: str,
        options: FitOptions,
    ) -> None:
        import torch

        self._runs, self._structure, self._plan = runs, structure, plan
        self._kind, self._merge, self._options = kind, merge_of(merge), options
        self._model = runs.module
        self._places = thinned(structure, places(structure, self._model), plan.width)
        self._routers = routers(self._model, structure)
        check_dtype(structure, self._places, str(runs.dtype).removeprefix("torch."))
        check_understood(structure, self._places, kind)
        check_merged(structure, self._places, self._merge)
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
        if self._merge is None or self._merge.sequential:
            originals.clear()  # nothing else looks at them
        self._blocks[layer].forward = self._taken
        repair = found
        if repair is None:
            at_hand = self._at_hand(layer, pruned)
            repair = made(at_hand, originals, merge=self._merge, kind=self._kind, options=self._options)
            del at_hand
        originals.clear()
        if layer < len(self._blocks) - 1:
            of_plan = self._plan.layers[layer]
            router, channels = self._routers[layer], of_plan.channels or None
            masked = masked_layer(self._model, self._structure, router, layer, of_plan.kept, channels)
            with masked, repaired_layer(self._model, self._structure, layer, repair):
                self._given.update((count + i, forward(batch)) for i, batch in enumerate(pruned))
        return repair

    def restore(self) -> None:
        """Give all blocks their own forward again."""
        for block, own in zip(self._blocks, self._own, strict=True):
            give_back(block, own)

    def _at_hand(self, layer: int, pruned: Sequence[torch.Tensor]) -> Layer:
        """A layer with the original's output, which was computed before."""
        import torch

        wait_for_all(self._runs.world)
        structure, device = self._structure, device_of(self._blocks[layer])
        masks = [mask.to(device) for mask in self._masks]
        outputs = [output_of(structure, self._given[i])[mask] for i, mask in enumerate(masks)]
        for name, output in zip(self._names, outputs, strict=True):
            if not is_finite(output):
                raise not_finite(name, "the output of the original's experts is")
        return Layer(
            model=self._model,
            structure=structure,
            number=layer,
            plan=self._plan.layers[layer],
            place=self._places[layer],
            router=self._routers[layer],
            block=self._blocks[layer],
            forward=self._forwards[layer],
            arrived=pruned,
            masks=masks,
            target=torch.cat(outputs),
            part=self._part.to(device),
            weights=self.weights,
        )

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
    merge: str = NONE,
    batch_size: int = 4,
    done: Callable[[int], LayerRepair | None] = lambda layer: None,
    **options: Unpack[FitOptions],
) -> Generator[LayerRepair]:
    """Merge experts into a plan's kept ones, and refit these and the shared one, layer after layer.

    Args:
        model: from `load_model` or `streamed`; it is left as it was.
        structure: its checkpoint.
        plan: which experts stay; corpora count by its weights, equally where it has none.
        corpora: calibration text.
        kind: see `solver.KINDS`; ``none`` for a merge alone.
        merge: name in `MERGES`, or ``none``.
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
    if plan.top_k is not None:
        raise InputError(f"{arg('top_k', plan.top_k)}: {NO_REPAIR}")
    runs = running(model, structure)
    check_float64(runs.device, "a repair")
    passes = _Passes(runs, structure, plan, corpora, batch_size, kind, merge, options)
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
