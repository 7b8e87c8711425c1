"""Perplexity of GGUF models in llama.cpp: reads models, plans of the first and held-out text, gives rows as `run` does.

A plan is emulated on the model by masking it while it runs, see `llama.masking`; files are models of their own. All
variants take turns on every chunk of a window, so that the logits of one chunk of each are held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moecover.checkpoints.structure import Structure
from moecover.corpora.packing import Corpus
from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation, Row
from moecover.evaluation.perplexity import score, text_result
from moecover.evaluation.records import ModelRecord
from moecover.evaluation.run import plan_record, text_record
from moecover.llama.masking import mask_of, masked_session
from moecover.llama.model import Model, Session
from moecover.planning.artifact import Plan
from moecover.progress import Bar
from moecover.runtime.finite import OF_FILE, naming, not_finite
from moecover.version import library_versions

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        name: of the row.
        structure: the file that is run.
        model: it, opened; shared by the plans of a file.
        mask: the plan that is emulated; None for the file as it is.
        plan: by which the row was pruned, emulated or not; None where that is not known.
    """

    name: str
    structure: Structure
    model: Model
    mask: Plan | None = None
    plan: Plan | None = None

    @property
    def row(self) -> tuple[int, int]:
        """Experts that remain, and bytes of the tensors."""
        if self.mask is None:
            return self.structure.topology.num_experts, self.structure.checkpoint.num_bytes
        return self.mask.keep, self.structure.num_bytes(self.mask.kept, width=self.mask.width)


def evaluate_gguf(
    variants: Sequence[Variant], texts: Sequence[Corpus], *, plans: Mapping[str, Plan], threads: int, bar: Bar
) -> Evaluation:
    """Perplexity of every variant on every text, and closeness to the first.

    Args:
        variants: the model itself first.
        texts: held-out text in the model's tokens.
        plans: by row; those whose calibration text is looked for in the texts.
        threads: of the CPU.
        bar: makes a progress bar.

    Raises:
        InputError: files of other vocabularies, or numbers that are not finite.
        MoecoverError: llama.cpp gives up.
    """
    first, close = variants[0], len(variants) > 1
    for variant in variants:
        if variant.model.vocabulary_size != first.model.vocabulary_size:
            raise InputError(
                f"{variant.structure.checkpoint.name} has {variant.model.vocabulary_size} tokens, the model has "
                f"{first.model.vocabulary_size}: their perplexities do not compare"
            )
    longest = max(int(text.mask.sum(1).max()) for text in texts)
    total = sum(text.num_tokens for text in texts) * len(variants)
    sums = dict[str, list["NDArray[np.float64]"]]()
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(_session(variant, longest, threads)) for variant in variants]
        advance = stack.enter_context(bar("measuring perplexity", total))
        for text in texts:
            sums[text.name] = window_sums(sessions, text, close=close, advance=advance)
    experts = first.structure.topology.num_experts
    rows = [
        Row(
            variant.name,
            None if variant.plan is None else plan_record(variant.plan),
            variant.row[0],
            experts,
            variant.row[1],
            {name: text_result(name, found[n], close=close and n > 0) for name, found in sums.items()},
        )
        for n, variant in enumerate(variants)
    ]
    windows = {v.name: {name: found[n][:, :2] for name, found in sums.items()} for n, v in enumerate(variants)}
    records = {text.name: text_record(text, plans, first.structure) for text in texts}
    return Evaluation(_model_record(first, threads), records, {}, rows, {}, windows)


@contextlib.contextmanager
def _session(variant: Variant, longest: int, threads: int) -> Iterator[Session]:
    """A session in which the variant runs."""
    if variant.mask is None:
        with variant.model.session(longest, threads=threads) as session:
            yield session
        return
    mask = mask_of(variant.structure, variant.model.library, variant.mask.kept, variant.mask.channels)
    with masked_session(variant.model, mask, longest, threads=threads) as session:
        yield session


def window_sums(
    sessions: Sequence[Session], text: Corpus, *, close: bool, advance: Callable[[int], None]
) -> list[NDArray[np.float64]]:
    """The sums of `perplexity.score` for every window of a text, by session.

    Args:
        sessions: of the variants, the model itself first.
        text: held-out windows.
        close: compare the logits with those of the first session.
        advance: called with the number of tokens of every finished chunk of a variant.

    Returns:
        By session: float64 ``[window, 4]``.

    Raises:
        InputError: log-likelihoods that are not finite.
    """
    import torch

    sums = np.zeros((len(sessions), len(text.tokens), 4))
    for window, (row, keep) in enumerate(zip(text.tokens, text.mask, strict=True)):
        tokens = row[keep]
        with naming(f"corpus {text.name}, window {window}"):
            for parts in zip(*(session.run(tokens) for session in sessions), strict=True):
                chunks = [torch.from_numpy(logits)[None] for _, logits in parts]
                start, count = parts[0][0], len(parts[0][1])
                inputs = {"input_ids": torch.from_numpy(tokens[None, start : start + count + 1])}
                for number, logits in enumerate(chunks):
                    reference = chunks[0] if close and number else None
                    sums[number, window] += score(logits, inputs, reference)[0]
                    advance(count)
            if not np.isfinite(sums[:, window]).all():
                raise not_finite("", "the log-likelihoods are", OF_FILE)
    return list(sums)


def _model_record(variant: Variant, threads: int) -> ModelRecord:
    topology, checkpoint = variant.structure.topology, variant.structure.checkpoint
    return {
        "name": checkpoint.name,
        "revision": None,
        "fingerprint": variant.structure.model_fingerprint,
        "family": topology.family,
        "dtype": str(variant.structure.quantised),
        "device": "llama.cpp",
        "num_bytes": checkpoint.num_bytes,
        "experts": topology.num_experts,
        "top_k": topology.top_k,
        "layers": len(topology.decoder_layers),
        "threads": threads,
        "versions": {**library_versions(), "llama.cpp": variant.model.library.version},
    }
