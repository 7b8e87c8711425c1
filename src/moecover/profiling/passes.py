"""The forward passes of a profile: all batches through a model in memory, or through one decoder layer after the other.

Both add the same statistics to the sums of every corpus, and save their progress where a state is kept.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.checkpoints.structure import Structure
from moecover.corpora.batches import batches
from moecover.corpora.packing import Corpus
from moecover.profiling.hooks import Tap, recording
from moecover.profiling.inputs_writer import Writer
from moecover.profiling.mtp import recording_drafts
from moecover.profiling.sums import Sums
from moecover.runtime.drafting import Drafts
from moecover.runtime.finite import name_pass, naming, rows_text
from moecover.runtime.layerwise import run
from moecover.runtime.loading import backbone_of
from moecover.runtime.lockstep import Passing, current_call
from moecover.runtime.pass_state import Output, State, footprint
from moecover.runtime.running import Running
from moecover.runtime.streaming import Streamed
from moecover.runtime.world import World

if TYPE_CHECKING:
    import torch

    from moecover.runtime.pass_state import LayerOutput


@dataclass(frozen=True)
class Batch:
    """One forward pass of a corpus.

    Attributes:
        corpus: the corpus.
        number: index of the batch within the corpus.
        row: index of its first sequence.
        first: index of its first token within the corpus, padding not counted.
        inputs: arguments of the model.
    """

    corpus: Corpus
    number: int
    row: int
    first: int
    inputs: dict[str, torch.Tensor]

    @property
    def name(self) -> str:
        """The pass in words, for messages."""
        return f"corpus {self.corpus.name}, {rows_text('block', self.row, len(self.inputs['input_ids']))}"

    @property
    def token_mask(self) -> torch.Tensor | None:
        """Bool ``[token]``, None where every token counts."""
        mask = self.inputs.get("attention_mask")
        return None if mask is None else mask.bool().flatten()

    @property
    def num_tokens(self) -> int:
        """Number of tokens, padding not counted."""
        mask = self.token_mask
        return int(self.inputs["input_ids"].numel() if mask is None else mask.sum())


@dataclass(frozen=True)
class Job:
    """What both kinds of passes need.

    Attributes:
        structure: the checkpoint.
        corpora: in their order.
        sums: by corpus, for multi-token-prediction layers by `mtp.key`; the statistics are added to them.
        batch_size: sequences per forward pass.
        writer: writes a sample of the layers' inputs, if one is kept.
        state: saves the progress, if it is kept.
        here: this process among those that share the batches.
        advance: called with the number of tokens that have been processed.
        drafts: multi-token-prediction layers to record too, beside a model in memory.
    """

    structure: Structure
    corpora: Sequence[Corpus]
    sums: Mapping[str, Sums]
    batch_size: int
    writer: Writer | None
    state: State | None
    here: World
    advance: Callable[[int], None]
    drafts: Drafts | None = None

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """The batches of all corpora that belong to this process, in order, on a device."""
        counted = itertools.count()
        for corpus in self.corpora:
            for number, inputs in enumerate(batches(corpus, self.batch_size)):
                if not self.here.mine(next(counted)):
                    continue
                moved = {key: value.to(device) for key, value in inputs.items()}
                row = number * self.batch_size
                yield Batch(corpus, number, row, int(corpus.mask[:row].sum()), moved)

    def keeper(self, batch: Batch, layer: int) -> Callable[[torch.Tensor], None] | None:
        """A function that writes the hidden states of a MoE layer that belong to the sample; None where none do."""
        if self.writer is None:
            return None
        writer, (rows, length) = self.writer, batch.inputs["input_ids"].shape
        rows = min(writer.rows(batch.corpus.name) - batch.row, rows)
        if rows <= 0:
            return None
        mask = batch.token_mask

        def keep(hidden: torch.Tensor) -> None:
            kept = slice(None) if mask is None else mask[: rows * length].to(hidden.device)
            writer.add(batch.corpus.name, layer, batch.first, hidden[: rows * length][kept])

        return keep


def in_memory(model: Running, job: Job) -> None:
    """Run batch after batch through a model that is in memory."""
    import torch

    backbone, device, state = backbone_of(model.module), model.device, job.state
    total = sum(1 for _ in job.batches(torch.device("cpu")))
    with (
        torch.inference_mode(),
        recording(model.module, job.structure) as taps,
        recording_drafts(job.drafts, job.sums) as add_drafts,
    ):
        for done, batch in enumerate(job.batches(device)):
            if state is None or done >= state.done:
                for layer, tap in enumerate(taps):
                    tap.keep, tap.mask = job.keeper(batch, layer), batch.token_mask
                with naming(batch.name):
                    hidden = backbone(**batch.inputs, use_cache=False).last_hidden_state
                    job.sums[batch.corpus.name].add(taps, 0, batch.number)
                    add_drafts(batch.corpus.name, batch.number, batch.inputs, hidden)
                if state is not None and (state.due() or done + 1 == total):
                    state.save(done + 1, total, "batches", job.sums)
            job.advance(batch.num_tokens)


def layer_by_layer(stream: Streamed, job: Job) -> None:
    """Run all batches through one decoder layer after the other, with one read of the weights.

    Where the state holds the output of the last finished layer, the layers before it do not run again; where a family
    passes more than hidden states from layer to layer, they do, but their experts are not recorded again.
    """
    backbone = backbone_of(stream.module)
    with recording(stream.module, job.structure) as taps, naming(""):
        by_layer = _ByLayer(stream, job, taps)
        by_layer.skip()
        if by_layer.start < len(stream.layers) and by_layer.batches:
            run(
                stream,
                [functools.partial(_passed, backbone, batch) for batch in by_layer.batches],
                head=False,
                start=by_layer.start,
                skipped=by_layer.skipped,
                embedded=by_layer.embedded if job.state is not None and stream.spill else None,
                before=by_layer.before,
                after=by_layer.after,
            )


def _passed(backbone: torch.nn.Module, batch: Batch) -> None:
    """A forward pass, under its name."""
    with naming(batch.name):
        backbone(**batch.inputs, use_cache=False)


class _ByLayer:
    """What happens before and after every decoder layer, for every batch."""

    def __init__(self, stream: Streamed, job: Job, taps: Sequence[Tap]) -> None:
        self.stream, self.job, self.taps, self.state = stream, job, taps, job.state
        self.batches = list(job.batches(stream.device))
        self.moe = {number: layer for layer, number in enumerate(job.structure.topology.decoder_layers)}
        self.finished = self.state.done if self.state is not None else 0
        self.start = self.finished if self.state is not None and self.state.outputs is not None else 0
        self._outputs: list[Output] = []  # of the layer that runs, for the batches so far
        self._handed: list[object] = [None] * len(self.batches)  # footprints of the layer's arguments
        self._alone = True  # hidden states are all that is passed from layer to layer
        self._walked = 0

    def skip(self) -> None:
        """Advance the progress by the layers that do not run."""
        for batch in self.batches:
            self._walk(self.start * batch.num_tokens)

    def _walk(self, tokens: int) -> None:
        """Count tokens through one layer; the progress counts those through all of them."""
        self._walked += tokens
        self.job.advance(self._walked // len(self.stream.layers))
        self._walked %= len(self.stream.layers)

    def before(self, at: Passing) -> None:
        """Prepare the tap of a layer that is about to run."""
        name_pass(self.batches[at.call].name)
        self._handed[at.call] = footprint((at.args[1:], at.kwargs))
        if (number := self.start + at.stop) in self.moe:
            layer = self.moe[number]
            new = number >= self.finished
            self.taps[layer].keep = self.job.keeper(self.batches[at.call], layer) if new else None
            self.taps[layer].mask = self.batches[at.call].token_mask

    def after(self, at: Passing) -> LayerOutput | None:
        """Add the statistics of a layer that has run and keep its output; where memory is short, in a file."""
        number, batch = self.start + at.stop, self.batches[at.call]
        if number in self.moe:
            tap = self.taps[self.moe[number]]
            if number >= self.finished:
                self.job.sums[batch.corpus.name].add([tap], self.moe[number], batch.number)
            else:
                tap.clear()
        kept = self._keep(number, at) if self.state is not None else None
        self._walk(batch.num_tokens)
        return kept[1] if kept and self.stream.spill else None

    def _keep(self, number: int, at: Passing) -> tuple[Output, LayerOutput] | None:
        """Write a layer's output to the state, and save the progress after the last batch."""
        assert self.state is not None
        kept = None
        if at.call == 0:
            self._outputs = []
        if self._alone:
            if self._handed[at.call] == footprint((at.args[1:], at.kwargs)):
                kept = self.state.put(number, at.call, at.output)
            self._alone = kept is not None
        if kept is not None:
            self._outputs.append(kept[0])
        if at.call == len(self.batches) - 1 and number >= self.finished:
            outputs = self._outputs if self._alone else None
            self.state.save(number + 1, len(self.stream.layers), "layers", self.job.sums, outputs=outputs)
        return kept

    def skipped(self, number: int, hidden: torch.Tensor) -> LayerOutput:
        """The output of a layer that does not run: from its file for the last one, anything for those before."""
        assert self.state is not None
        call = current_call()
        if number == self.start - 1:
            return self.state.get(call, self.stream.device)
        return self.state.as_output(call, hidden)

    def embedded(self, call: int, output: torch.Tensor) -> LayerOutput | None:
        """Move the output of the token embedding to a file."""
        assert self.state is not None
        kept = self.state.put(-1, call, output)
        return kept[1] if kept else None
