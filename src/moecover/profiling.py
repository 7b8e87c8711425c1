"""Stage 2, profile: reads a model and corpora, gives additive statistics of every expert on every corpus.

One forward pass over each corpus, batch by batch; `recording` sees what the experts do, `profiles` holds the result.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.corpus import Corpus
from moecover.errors import InputError, MoecoverError
from moecover.inputs import FILE as INPUTS
from moecover.inputs import Writer, open_inputs, sample_of, writing
from moecover.model import batches, load_model
from moecover.profiles import Profile, Statistics
from moecover.recording import Sums, recording
from moecover.streaming import Streamed, run
from moecover.topology import Structure

if TYPE_CHECKING:
    import torch


@dataclass
class Batch:
    """One forward pass of a corpus: ``number`` counts within the corpus, ``row`` is the first sequence."""

    corpus: Corpus
    number: int
    row: int
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


def batches_of(corpora: Sequence[Corpus], batch_size: int, device: torch.device) -> Iterator[Batch]:
    """All batches of all corpora, in order, on a device."""
    for corpus in corpora:
        for number, inputs in enumerate(batches(corpus, batch_size)):
            moved = {key: value.to(device) for key, value in inputs.items()}
            yield Batch(corpus, number, number * batch_size, moved)


def dtype_of(model: torch.nn.Module | Streamed) -> torch.dtype:
    """The dtype of a model's parameters, of the first where they differ."""
    live = model.model if isinstance(model, Streamed) else model
    return next(live.parameters()).dtype


def backbone_of(model: torch.nn.Module) -> Any:
    """The model without its head, which no statistic needs."""
    names = (str(model.base_model_prefix), "model")
    return next(getattr(model, name) for name in names if hasattr(model, name))


def in_memory(
    model: torch.nn.Module, structure: Structure, corpora: Sequence[Corpus], sums: Mapping[str, Sums], *, batch_size: int,
    writer: Writer | None, advance: Callable[[int], None],
) -> None:  # fmt: skip
    """Batch after batch through a model that is in memory, statistics added to ``sums`` by corpus."""
    import torch

    backbone, device = backbone_of(model), next(model.parameters()).device
    with torch.inference_mode(), recording(model, structure) as taps:
        for batch in batches_of(corpora, batch_size, device):
            for layer, tap in enumerate(taps):
                tap.keep = _keeper(writer, batch, layer)
            backbone(**batch.inputs, use_cache=False)
            sums[batch.corpus.name].add(taps, 0, batch.number, batch.token_mask)
            advance(batch.num_tokens)


def layer_by_layer(
    stream: Streamed, structure: Structure, corpora: Sequence[Corpus], sums: Mapping[str, Sums], *, batch_size: int,
    writer: Writer | None, advance: Callable[[int], None],
) -> None:  # fmt: skip
    """All batches through one decoder layer after the other: the same statistics from one read of the weights."""
    import torch

    backbone = backbone_of(stream.model)
    passes = list(batches_of(corpora, batch_size, stream.device))
    numbers = {name: number for number, name in enumerate(stream.layers)}
    moe = {next(n for name, n in numbers.items() if experts.startswith(f"{name}.")): layer for layer, experts in enumerate(structure.experts_modules)}  # fmt: skip
    done = 0
    with torch.inference_mode(), recording(stream.model, structure) as taps:

        def before(number: int, call: int) -> None:
            if number in moe:
                taps[moe[number]].keep = _keeper(writer, passes[call], moe[number])

        def after(number: int, call: int) -> None:
            nonlocal done
            batch = passes[call]
            if number in moe:
                sums[batch.corpus.name].add([taps[moe[number]]], moe[number], batch.number, batch.token_mask)
            done += batch.num_tokens
            if whole := done // len(numbers):  # tokens through all layers, for the bar
                advance(whole)
                done -= whole * len(numbers)

        run(stream, [functools.partial(backbone, **batch.inputs, use_cache=False) for batch in passes], head=False, before=before, after=after)  # fmt: skip


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
    return lambda hidden: taken.add(batch.corpus.name, layer, hidden[: rows * length][kept])


def profile(
    structure: Structure,
    corpora: Sequence[Corpus],
    *,
    model: torch.nn.Module | Streamed | None = None,
    batch_size: int = 4,
    dtype: str = "auto",
    device: str = "auto",
    keep_inputs: tuple[int, Path] | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
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
        advance: called with the tokens of every finished batch.

    Raises:
        InputError: names that repeat, or what `load_model` and `checked` raise.
    """
    import torch
    import transformers

    from moecover import __version__

    names = [corpus.name for corpus in corpora]
    if len(set(names)) < len(names) or not names:
        raise InputError(f"corpora {', '.join(names) or '(none)'}: at least one is needed, and every name once")
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size} is out of range: 1 or more")
    if model is None:
        model = load_model(structure, dtype=dtype, device=device)
    live = model.model if isinstance(model, Streamed) else model
    where = model.device if isinstance(model, Streamed) else next(model.parameters()).device
    kind = str(dtype_of(model)).removeprefix("torch.")
    sums = {c.name: Sums(structure.topology, where, -(-len(c.tokens) // batch_size)) for c in corpora}
    with contextlib.ExitStack() as stack:
        writer = None
        if keep_inputs is not None:
            tokens, folder = keep_inputs
            writer = stack.enter_context(
                writing(
                    folder / INPUTS, sample_of(corpora, tokens), layers=len(structure.topology.decoder_layers),
                    hidden_size=structure.topology.hidden_size, dtype=kind,
                    batch_size=batch_size, model_fingerprint=structure.model_fingerprint,
                )
            )  # fmt: skip
        if isinstance(model, Streamed):
            layer_by_layer(model, structure, corpora, sums, batch_size=batch_size, writer=writer, advance=advance)
        else:
            in_memory(model, structure, corpora, sums, batch_size=batch_size, writer=writer, advance=advance)
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
            "moecover": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    about = {
        "name": structure.checkpoint.name,
        "revision": structure.checkpoint.revision,
        "fingerprint": structure.model_fingerprint,
    }
    records = {c.name: [c.record] for c in corpora}
    inputs = open_inputs(keep_inputs[1]) if keep_inputs is not None else None
    return Profile(structure.topology, statistics, records, about, settings, parts, inputs)
