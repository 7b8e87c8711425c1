"""Stage 2, profile: reads a model and corpora, gives additive statistics of every expert on every corpus.

One forward pass over each corpus, batch by batch; `recording` sees what the experts do, `profiles` holds the result.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moecover.corpus import Corpus
from moecover.errors import InputError, MoecoverError
from moecover.inputs import FILE as INPUTS
from moecover.inputs import Writer, open_inputs, sample_of, writing
from moecover.model import batches, load_model
from moecover.profiles import PARTS, STATISTICS, Profile, Statistics
from moecover.recording import Recorder, recording
from moecover.topology import Structure

if TYPE_CHECKING:
    import torch


def profile_corpus(
    model: torch.nn.Module,
    structure: Structure,
    corpus: Corpus,
    *,
    batch_size: int = 4,
    writer: Writer | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> tuple[Statistics, Statistics]:
    """Statistics of one corpus, each ``[layer, expert]``, from one forward pass over it, and the parts of a profile.

    Args:
        model: from `load_model`.
        structure: the checkpoint of the model.
        corpus: token ids.
        batch_size: sequences per forward pass.
        writer: takes the sample of the layers' inputs, where one is kept.
        advance: called with the tokens of every finished batch.

    Raises:
        InputError: an expert's output is not finite (names layer and expert), or the family cannot be observed.
    """
    import torch

    device = next(model.parameters()).device
    names = (str(model.base_model_prefix), "model")
    backbone = next(getattr(model, name) for name in names if hasattr(model, name))  # statistics need no head
    total = -(-len(corpus.tokens) // batch_size)
    ends = {round(total * part / PARTS) for part in range(1, PARTS)} - {0, total}  # a part is a whole number of batches
    parts: list[Statistics] = []
    with torch.inference_mode(), recording(model, structure) as recorder:
        for number, inputs in enumerate(batches(corpus, batch_size)):
            mask = inputs.get("attention_mask")
            if number in ends:
                parts.append(recorder.statistics())
            _keep(recorder, writer, corpus, number * batch_size, inputs)
            backbone(**{key: value.to(device) for key, value in inputs.items()}, use_cache=False)
            recorder.end_batch(None if mask is None else mask.bool().flatten().to(device))
            advance(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
    statistics = {name: recorder.statistics()[name] for name in STATISTICS}
    if (statistics["num_tokens"] != corpus.num_tokens).any():
        raise MoecoverError(f"corpus {corpus.name} has {corpus.num_tokens} tokens, but the layers recorded {statistics['num_tokens'][:, 0].tolist()}: please report this")  # fmt: skip
    if name := next((name for name, values in statistics.items() if not np.isfinite(values).all()), None):
        layer = int(np.argwhere(~np.isfinite(statistics[name]))[0][0])
        raise InputError(f"decoder layer {structure.topology.decoder_layers[layer]}: {name} is not finite on corpus {corpus.name}. The weights hold NaN or infinity, or the dtype overflows (try --dtype float32)")  # fmt: skip
    running = {n: np.stack([p[n] for p in parts]) if parts else v[None][:0] for n, v in statistics.items()}
    return statistics, running


def _keep(recorder: Recorder, writer: Writer | None, corpus: Corpus, row: int, inputs: dict[str, torch.Tensor]) -> None:
    """Have the taps pass on what belongs to the sample: the first sequences, without padding."""
    rows = 0 if writer is None else min(writer.rows(corpus.name) - row, len(inputs["input_ids"]))
    tokens = rows * inputs["input_ids"].shape[1]
    mask = inputs["attention_mask"][:rows].flatten().bool() if "attention_mask" in inputs else slice(None)

    def to_writer(hidden: torch.Tensor, layer: int) -> None:
        assert writer is not None
        writer.add(corpus.name, layer, hidden[:tokens][mask])

    for layer, tap in enumerate(recorder.taps):
        tap.keep = functools.partial(to_writer, layer=layer) if rows > 0 else None


def profile(
    structure: Structure,
    corpora: Sequence[Corpus],
    *,
    model: torch.nn.Module | None = None,
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
        model: the live model from `load_model` if there is one already; else it is loaded.
        batch_size: sequences per forward pass.
        dtype: of the model to be loaded, see `load_model`.
        device: of the model to be loaded, see `load_model`.
        keep_inputs: how many tokens of every layer's inputs to keep, and the folder for `inputs`.
        advance: called with the tokens of every finished batch.

    Raises:
        InputError: names that repeat, or what `load_model` and `profile_corpus` raise.
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
    parameter = next(model.parameters())
    statistics, parts = {}, {}
    with contextlib.ExitStack() as stack:
        writer = None
        if keep_inputs is not None:
            tokens, folder = keep_inputs
            writer = stack.enter_context(
                writing(
                    folder / INPUTS, sample_of(corpora, tokens), layers=len(structure.topology.decoder_layers),
                    hidden_size=structure.topology.hidden_size, dtype=str(parameter.dtype).removeprefix("torch."),
                    batch_size=batch_size, model_fingerprint=structure.model_fingerprint,
                )
            )  # fmt: skip
        for corpus in corpora:
            statistics[corpus.name], parts[corpus.name] = profile_corpus(
                model, structure, corpus, batch_size=batch_size, writer=writer, advance=advance
            )
    settings = {
        "batch_size": batch_size,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "experts": "grouped_mm",
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
