"""Stage 2, profile: reads a model and corpora, gives additive statistics of every expert on every corpus.

One forward pass over each corpus, batch by batch; `recording` sees what the experts do, `profiles` holds the result.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.checkpoints.structure import Structure
from moecover.corpora.batches import batches
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, MoecoverError
from moecover.files.atomic import canonical_json
from moecover.profiling.artifact import MAXIMA, Profile, Statistics
from moecover.profiling.hooks import Sums, recording
from moecover.profiling.layer_inputs import FILE as INPUTS
from moecover.profiling.layer_inputs import Writer, open_inputs, sample_of, writing
from moecover.runtime.distributed import ALONE, World, add_up, check_same, heeding
from moecover.runtime.loading import backbone_of, load_model
from moecover.runtime.lockstep import Passing, current_call
from moecover.runtime.pass_state import State, footprint
from moecover.runtime.running import Running, running
from moecover.runtime.streaming import Streamed, run

if TYPE_CHECKING:
    import torch


@dataclass
class Batch:
    """One forward pass of a corpus: ``number`` counts within it, ``row`` is the first sequence, ``first`` its first token."""

    corpus: Corpus
    number: int
    row: int
    first: int
    inputs: dict[str, torch.Tensor]

    @property
    def token_mask(self) -> torch.Tensor | None:
        """Bool ``[token]``, None where every token counts."""
        mask = self.inputs.get("attention_mask")
        return None if mask is None else mask.bool().flatten()

    @property
    def num_tokens(self) -> int:
        """Tokens, padding not counted."""
        mask = self.token_mask
        return int(self.inputs["input_ids"].numel() if mask is None else mask.sum())


def batches_of(corpora: Sequence[Corpus], batch_size: int, device: torch.device, here: World) -> Iterator[Batch]:
    """The batches of all corpora that are this process's, in order, on a device."""
    counted = itertools.count()
    for corpus in corpora:
        for number, inputs in enumerate(batches(corpus, batch_size)):
            if not here.mine(next(counted)):
                continue
            moved = {key: value.to(device) for key, value in inputs.items()}
            row = number * batch_size
            yield Batch(corpus, number, row, int(corpus.mask[:row].sum()), moved)


def in_memory(
    model: Running, structure: Structure, corpora: Sequence[Corpus], sums: Mapping[str, Sums], *, batch_size: int,
    writer: Writer | None, state: State | None, here: World, advance: Callable[[int], None],
) -> None:  # fmt: skip
    """Batch after batch through a model that is in memory, statistics added to ``sums`` by corpus."""
    import torch

    backbone, device = backbone_of(model.module), model.device
    total = sum(1 for _ in batches_of(corpora, batch_size, torch.device("cpu"), here))
    with torch.inference_mode(), recording(model.module, structure) as taps:
        for done, batch in enumerate(batches_of(corpora, batch_size, device, here)):
            if state is None or done >= state.done:
                for layer, tap in enumerate(taps):
                    tap.keep = _keeper(writer, batch, layer)
                backbone(**batch.inputs, use_cache=False)
                sums[batch.corpus.name].add(taps, 0, batch.number, batch.token_mask)
                if state is not None:
                    state.save(done + 1, total, "batches", sums)
            advance(batch.num_tokens)


def layer_by_layer(
    stream: Streamed, structure: Structure, corpora: Sequence[Corpus], sums: Mapping[str, Sums], *, batch_size: int,
    writer: Writer | None, state: State | None, here: World, advance: Callable[[int], None],
) -> None:  # fmt: skip
    """All batches through one decoder layer after the other: the same statistics from one read of the weights.

    Where the state holds what the last finished layer gave, the layers before it are not run again; where a family hands
    on more than hidden states, they are, without a second look at their experts.
    """
    backbone, layers = backbone_of(stream.model), len(stream.layers)
    passes = list(batches_of(corpora, batch_size, stream.device, here))
    moe = {number: layer for layer, number in enumerate(structure.topology.decoder_layers)}
    finished = state.done if state is not None else 0
    start = finished if state is not None and state.outputs is not None else 0
    rows: list[Any] = [None] * len(passes)
    handed: list[Any] = [None] * len(passes)
    alone, walked = True, 0

    def walk(tokens: int) -> None:  # tokens through one layer; the bar counts those through all of them
        nonlocal walked
        walked += tokens
        advance(walked // layers)
        walked %= layers

    def before(at: Passing) -> None:
        handed[at.call] = footprint((at.args[1:], at.kwargs))
        if (number := start + at.stop) in moe:
            new = number >= finished
            taps[moe[number]].keep = _keeper(writer, passes[at.call], moe[number]) if new else None

    def after(at: Passing) -> Any:
        nonlocal alone
        number, batch, kept = start + at.stop, passes[at.call], None
        if number in moe and number >= finished:
            sums[batch.corpus.name].add([taps[moe[number]]], moe[number], batch.number, batch.token_mask)
        elif number in moe:
            taps[moe[number]].clear()
        if state is not None and alone:
            kept = None if handed[at.call] != footprint((at.args[1:], at.kwargs)) else state.put(number, at.call, at.output)  # fmt: skip
            alone = kept is not None
            rows[at.call] = kept[0] if kept else None
        if state is not None and at.call == len(passes) - 1 and number >= finished:
            state.save(number + 1, layers, "layers", sums, outputs=rows if alone else None)
        walk(batch.num_tokens)
        return kept[1] if kept and stream.spill else None

    def skipped(number: int, hidden: torch.Tensor) -> Any:
        assert state is not None
        call = current_call()
        return state.get(call, stream.device) if number == start - 1 else state.as_output(call, hidden)

    def embedded(call: int, output: Any) -> Any:
        assert state is not None
        kept = state.put(-1, call, output)
        return kept[1] if kept else None

    with recording(stream.model, structure) as taps:
        for batch in passes:
            walk(start * batch.num_tokens)
        if start < layers and passes:
            calls = [functools.partial(backbone, **batch.inputs, use_cache=False) for batch in passes]
            spilled = embedded if state is not None and stream.spill else None
            run(stream, calls, head=False, start=start, skipped=skipped, embedded=spilled, before=before, after=after)


def checked(sums: Sums, corpus: Corpus, structure: Structure) -> Statistics:
    """The statistics of a corpus.

    Raises:
        InputError: they are not finite.
        MoecoverError: they are not of as many tokens as the corpus has.
    """
    statistics = sums.statistics()
    if (statistics["num_tokens"] != corpus.num_tokens).any():
        raise MoecoverError(f"corpus {corpus.name} has {corpus.num_tokens} tokens, but the layers recorded {statistics['num_tokens'][:, 0].tolist()}: please report this")  # fmt: skip
    if name := next((name for name, values in statistics.items() if not np.isfinite(values).all()), None):
        layer = int(np.argwhere(~np.isfinite(statistics[name]))[0][0])
        raise InputError(f"decoder layer {structure.topology.decoder_layers[layer]}: {name} is not finite on corpus {corpus.name}. The weights hold NaN or infinity, or the dtype overflows (try --dtype float32)")  # fmt: skip
    return statistics


def together(here: World, sums: Mapping[str, Sums], device: torch.device) -> None:
    """Have every process hold the sums of all of them.

    Raises:
        MoecoverError: a process is gone.
    """
    if here.size == 1:
        return
    for one in sums.values():
        state = one.state()
        summed = {name: values for name, values in state.items() if name not in ("scoring", "noted")}
        maxima = [name for name in summed if name.removeprefix("parts.") in MAXIMA]
        one.restore(state | add_up(here, summed, device, maxima=maxima))


def check_alone(here: World) -> None:
    """Refuse to keep a sample of the layers' inputs where several processes share the batches.

    Raises:
        InputError: there are several.
    """
    if here.size > 1:
        raise InputError("--keep-inputs does not go together with several processes: profile the sample in one")


def stamps(structure: Structure) -> list[list[Any]]:
    """Size and time of change of every shard: whether the weights are still the same."""
    checkpoint = structure.checkpoint
    found = [(shard, (checkpoint.path / shard).stat()) for shard in sorted(checkpoint.shard_metadata)]
    return [[shard, stat.st_size, stat.st_mtime_ns] for shard, stat in found]


def _keeper(writer: Writer | None, batch: Batch, layer: int) -> Callable[[torch.Tensor], None] | None:
    """What passes on the hidden states of a layer that belong to the sample: the first sequences, without padding."""
    if writer is None:
        return None
    taken, (rows, length) = writer, batch.inputs["input_ids"].shape
    rows = min(writer.rows(batch.corpus.name) - batch.row, rows)
    if rows <= 0:
        return None
    mask = batch.token_mask
    kept = slice(None) if mask is None else mask[: rows * length]
    return lambda hidden: taken.add(batch.corpus.name, layer, batch.first, hidden[: rows * length][kept])


def profile(
    structure: Structure,
    corpora: Sequence[Corpus],
    *,
    model: torch.nn.Module | Running | None = None,
    batch_size: int = 4,
    dtype: str = "auto",
    device: str = "auto",
    keep_inputs: tuple[int, Path] | None = None,
    state: Path | None = None,
    here: World = ALONE,
    advance: Callable[[int], None] = lambda tokens: None,
    say: Callable[[str], None] = lambda line: None,
) -> Profile:
    """Profile of a model on corpora that are kept apart, from one forward pass over each.

    Args:
        structure: the checkpoint, from `read_structure`.
        corpora: from `load_corpus`; names must differ.
        model: the live model from `load_model`, or from `streamed` to run layer by layer; else it is loaded.
        batch_size: sequences per forward pass.
        dtype: of the model to be loaded, see `load_model`.
        device: of the model to be loaded, see `load_model`.
        keep_inputs: how many tokens of every layer's inputs to keep, and the folder for `inputs`.
        state: folder where an interrupted pass goes on; the caller removes it when the profile is safe.
        here: this process among others that profile the same together, see `distributed`; each gets the whole profile.
        advance: called with tokens that are done.
        say: takes a line on what is found there.

    Raises:
        MoecoverError: the disk is full, or another process is gone.
        InputError: names that repeat, or what `load_model` and `checked` raise.
    """
    import torch
    import transformers

    from moecover.version import VERSION

    names = [corpus.name for corpus in corpora]
    if len(set(names)) < len(names) or not names:
        raise InputError(f"corpora {', '.join(names) or '(none)'}: at least one is needed, and every name once")
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size} is out of range: 1 or more")
    if model is None:
        model = load_model(structure, dtype=dtype, device=device)
    runs = running(model, structure)
    live, where = runs.module, runs.device
    kind = str(runs.dtype).removeprefix("torch.")
    sums = {c.name: Sums(structure.topology, where, -(-len(c.tokens) // batch_size)) for c in corpora}
    about = {
        "name": structure.checkpoint.name,
        "revision": structure.checkpoint.revision,
        "fingerprint": structure.model_fingerprint,
    }
    records = {c.name: [c.record] for c in corpora}
    if keep_inputs is not None:
        check_alone(here)
    going_on = None
    if state is not None or here.size > 1:
        how = "layers" if runs.by_layer else "batches"
        sizes = {e.name: [e.shard, e.start, e.dtype] for e in structure.checkpoint.tensors.values()}
        inputs_of = {"model": about["fingerprint"], "weights": hashlib.sha256(canonical_json([sizes, stamps(structure)]).encode()).hexdigest(), "corpora": [*records.items()], "batch size": batch_size, "dtype": kind, "device": where.type, "way": how, "inputs kept": keep_inputs[0] if keep_inputs else None, "version": VERSION}  # fmt: skip
        check_same(here, {k: v for k, v in inputs_of.items() if k not in ("way", "weights")})
        if state is not None:
            going_on = State(state, inputs_of | {"process": [here.rank, here.size]}, say=say)
            going_on.restore(sums)
    with contextlib.ExitStack() as stack:
        writer = None
        if keep_inputs is not None:
            tokens, folder = keep_inputs
            writer = stack.enter_context(
                writing(
                    folder / INPUTS, sample_of(corpora, tokens), layers=len(structure.topology.decoder_layers),
                    hidden_size=structure.topology.hidden_size, dtype=kind,
                    batch_size=batch_size, model_fingerprint=structure.model_fingerprint,
                    draft=state / INPUTS if state is not None else None,
                )
            )  # fmt: skip
        how_to: dict[str, Any] = {
            "batch_size": batch_size,
            "writer": writer,
            "state": going_on,
            "here": here,
            "advance": heeding(here, advance),
        }
        if isinstance(runs, Streamed):
            layer_by_layer(runs, structure, corpora, sums, **how_to)
        else:
            in_memory(runs, structure, corpora, sums, **how_to)
        for one in sums.values():
            one.finish()
        together(here, sums, where)
        statistics = {c.name: checked(sums[c.name], c, structure) for c in corpora}
    parts = {name: one.parts for name, one in sums.items()}
    settings = {
        "batch_size": batch_size,
        "dtype": kind,
        "device": where.type,
        "experts": "grouped_mm"
        if hasattr(live.get_submodule(structure.experts_modules[0]), "has_post_expert_norm")
        else "their own",
        "versions": {
            "moecover": VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    inputs = open_inputs(keep_inputs[1]) if keep_inputs is not None else None
    return Profile(structure.topology, statistics, records, about, settings, parts, inputs)
