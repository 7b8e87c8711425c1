"""The proof of a pruned checkpoint: compares the written files with the masked original (`planning.masking`).

For a repaired checkpoint too: every tensor that its manifest does not name has the original's bytes, those that it
names have the hashes that it records, and with these in place the masked original gives the same outputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover import rehearsal
from moecover.checkpoints.manifest import MANIFEST, changed_files, check_complete, read_manifest
from moecover.checkpoints.source import Checkpoint, open_checkpoint
from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.packing import Corpus, holds_rows, load_corpus, make_corpus
from moecover.corpora.tokenizer import load_tokenizer
from moecover.errors import InputError
from moecover.planning.artifact import Plan
from moecover.planning.fitting import check_plan
from moecover.planning.masking import masked_layers
from moecover.repairing.applied import with_repairs
from moecover.runtime.memory import opened
from moecover.runtime.running import Running, unmasked
from moecover.text import Cell, Shown
from moecover.verification.outputs import Outputs, differences, outputs_of
from moecover.verification.repaired import Repairs, read_repairs

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

VERIFY_CORPORA = ("encyclopedia-heldout", "web-heldout")


@dataclass(frozen=True, repr=False)
class Verification(Shown):
    """The outcome of `verify`; ``result["equal"]`` reads an attribute as well.

    Attributes:
        equal: whether the checkpoint gives what the masked original gives, from files that have not changed.
        first_difference: a decoder layer or the logits, None where no output differs by more than the tolerance.
        max_abs_difference: the largest of ``layers``.
        changed_files: files whose hash is not the manifest's.
        tokens: number of tokens of the text.
        corpora: names of the text.
        layers: largest absolute difference of the output of every decoder layer and of the logits.
        repaired: number of tensors that the manifest names as repaired.
        changed_tensors: tensors that are neither the original's nor the repaired ones, where some are repaired.
    """

    equal: bool
    first_difference: str | None
    max_abs_difference: float
    changed_files: list[str]
    tokens: int
    corpora: list[str]
    layers: dict[str, float]
    repaired: int
    changed_tensors: list[str]

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)

    def keys(self) -> list[str]:
        """Names of the attributes."""
        return [field.name for field in fields(self)]

    def to_dict(self) -> dict[str, Any]:
        """The attributes as JSON-ready values."""
        return asdict(self)

    def summary(self) -> str:
        on = f"{self.tokens:,} tokens of {', '.join(self.corpora)}"
        if self.equal:
            return f"equal on {on}, largest difference {self.max_abs_difference:g}"
        changed = [*self.changed_files, *self.changed_tensors]
        reasons = [f"changed: {', '.join(changed)}"] if changed else []
        reasons += [f"first difference at {self.first_difference}"] if self.first_difference else []
        return f"NOT equal on {on}; {'; '.join(reasons)}"

    def rows_shown(self) -> list[dict[str, Cell]]:
        return [{"output": name, "largest difference": value} for name, value in self.layers.items()]


def plan_of(checkpoint: Checkpoint) -> Plan | None:
    """The plan that a checkpoint was pruned by, None where `prune` did not write it."""
    if checkpoint.gguf is not None or not (checkpoint.path / MANIFEST).is_file():
        return None
    return _plan_in(checkpoint, read_manifest(checkpoint))


def _plan_in(checkpoint: Checkpoint, manifest: dict[str, Any]) -> Plan:
    return Plan.from_json(json.dumps(manifest["plan"]), name=f"the plan in {checkpoint.path / MANIFEST}")


def verification_text(
    structure: Structure,
    *,
    corpora: Sequence[Corpus | tuple[str, str]] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    sequences: int = 2,
    length: int = 256,
) -> list[Corpus]:
    """Load the text of a proof: the given corpora, else the shipped held-out ones, in the model's own tokens.

    A model without a tokenizer gets seeded random ids; the record of the corpus says so.

    Args:
        structure: the original.
        corpora: names and paths, the path empty for a named corpus; or loaded ones.
        tokenizer: instead of the one in the original's folder; a GGUF model has none there.
        sequences: of each corpus.
        length: tokens per sequence, or the model's positions if fewer.
    """
    text = structure.checkpoint.text_config
    length = min(length, text.get("max_position_embeddings") or length)
    if tokenizer is None and structure.checkpoint.gguf is None:
        tokenizer = load_tokenizer(structure.checkpoint.path)
    if not corpora and tokenizer is None:
        tokens: NDArray[np.int64] = np.random.default_rng(0).integers(
            0, text["vocab_size"], size=(2 * sequences, length)
        )
        mask = np.ones_like(tokens, dtype=bool)
        return [make_corpus("random ids (no tokenizer)", tokens, mask, {"source": "random ids"})]
    loaded = []
    for given in corpora or [(name, "") for name in VERIFY_CORPORA]:
        if isinstance(given, Corpus):
            loaded.append(given)
            continue
        name, path = given[0], given[1] or None
        of_block = None if holds_rows(name, path) else length
        loaded.append(load_corpus(name, path, structure=structure, tokenizer=tokenizer, length=of_block))
    return [corpus[:sequences] for corpus in loaded]


def _repairs(
    original: Structure, plan: Plan, cut: Checkpoint, manifest: dict[str, Any], advance: Callable[[str], None]
) -> Repairs:
    """The repaired tensors of a pruned checkpoint, after comparing all others with the original's."""
    advance("comparing the tensors that were not repaired")
    return read_repairs(original, plan, cut, manifest)


def verify(
    model: str | Path | Checkpoint,
    pruned: str | Path,
    *,
    revision: str | None = None,
    corpora: Sequence[Corpus | tuple[str, str]] = (),
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | dict[str, str] | None = None,
    tolerance: float = 0.0,
    memory_limit: int | None = None,
    advance: Callable[[str], None] = lambda step: None,
) -> Verification:
    """Prove a pruned checkpoint: same outputs as the original masked by the plan, layer by layer, on real text.

    Args:
        model: the original, folder or hub id.
        pruned: the checkpoint that `prune` wrote.
        revision: of the original.
        corpora: names and paths of the text (path empty for a named corpus), or loaded ones; default: the shipped
            held-out text.
        dtype: torch dtype by name for both, ``auto`` for the checkpoint's.
        device: torch device by name.
        device_map: see `runtime.placement.parsed_map`.
        tolerance: largest difference allowed, as a share of the largest value of the layer; 0: every bit equal.
        memory_limit: bytes of memory that may be used, see `runtime.memory.opened`.
        advance: called with a line on the next step.

    Raises:
        InputError: either checkpoint cannot be read, they do not belong together, or the masked original gives numbers
            that are not finite.
    """
    original = read_structure(model, revision=revision)
    cut_checkpoint = open_checkpoint(pruned)
    manifest = read_manifest(cut_checkpoint)
    check_complete(cut_checkpoint, manifest)
    check_plan(plan := _plan_in(cut_checkpoint, manifest), original, other_weights=True)
    if manifest["source"]["fingerprint"] != original.model_fingerprint:
        raise InputError(
            f"{pruned} was cut from {manifest['source']['name']}, which is not {model}: the routers differ"
        )
    texts = verification_text(original, corpora=corpora)
    cut = read_structure(cut_checkpoint)
    opening = _Opening(texts, dtype, device, device_map, memory_limit, advance)
    if rehearsal.on():
        opening.rehearse(original, cut)
    advance("checking the hashes of the written files")
    changed = changed_files(cut_checkpoint, manifest)
    repairs = _repairs(original, plan, cut_checkpoint, manifest, advance) if "repair" in manifest else None
    wrong = repairs.changed if repairs is not None else []
    expected = opening.masked(original, plan, cut_checkpoint, repairs)
    compared = differences(expected, opening.pruned(cut), tolerance=tolerance)
    return Verification(
        equal=compared.first is None and not changed and not wrong,
        first_difference=compared.first,
        max_abs_difference=max(compared.largest.values()),
        changed_files=changed,
        tokens=opening.tokens,
        corpora=[corpus.name for corpus in texts],
        layers=compared.largest,
        repaired=len(repairs.hashes) if repairs is not None else 0,
        changed_tensors=wrong,
    )


@dataclass(frozen=True)
class _Opening:
    """How both checkpoints are run."""

    texts: Sequence[Corpus]
    dtype: str
    device: str
    device_map: str | dict[str, str] | None
    memory_limit: int | None
    advance: Callable[[str], None]

    @property
    def tokens(self) -> int:
        return sum(corpus.num_tokens for corpus in self.texts)

    def _opened(self, structure: Structure, *, extra: int = 0, pace: float = 1.0) -> AbstractContextManager[Running]:
        return opened(
            structure,
            tokens=self.tokens,
            batch_tokens=max(corpus.tokens.shape[1] for corpus in self.texts),
            dtype=self.dtype,
            device=self.device,
            device_map=self.device_map,
            memory_limit=self.memory_limit,
            head=True,
            extra=extra,
            pace=pace,
            say=self.advance,
        )

    def rehearse(self, original: Structure, cut: Structure) -> None:
        """End a dry run; both passes take about as long."""
        for corpus in self.texts:
            rehearsal.ahead("read", f"text {corpus.name}", tokens=corpus.num_tokens)
        rehearsal.ahead("read", f"{cut.checkpoint.name}, twice", num_bytes=2 * cut.checkpoint.num_bytes)
        with self._opened(original, pace=2.0):
            pass

    def masked(self, original: Structure, plan: Plan, cut: Checkpoint, repairs: Repairs | None) -> Outputs:
        """Outputs of the original with the plan's mask and the repaired tensors."""
        hashes = repairs.hashes if repairs is not None else {}
        extra = 2 * sum(e.num_bytes for name, e in cut.tensors.items() if name in hashes) // len(plan.layers)
        with self._opened(original, extra=extra) as live:
            self.advance("running the original, masked")
            within = masked_layers(live.module, original, plan)
            if repairs is not None:
                within = with_repairs(live.module, original, within, repairs.of_layer)
            return outputs_of(live, self.texts, within, guarded=True)

    def pruned(self, cut: Structure) -> Outputs:
        """Outputs of the pruned checkpoint."""
        with self._opened(cut) as live:
            self.advance("running the pruned checkpoint")
            return outputs_of(live, self.texts, unmasked)
