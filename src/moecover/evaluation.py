"""Stage 5, evaluation: reads a live model (whole, masked by a plan, or pruned), gives perplexity and the proof.

`verify` holds the written files against the masked original (`masking`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.corpus import Corpus, load_corpus, load_tokenizer, make_corpus
from moecover.errors import InputError
from moecover.masking import masked
from moecover.model import batches, load_model
from moecover.plans import Plan, check_plan
from moecover.source import Checkpoint, open_checkpoint
from moecover.topology import Structure, read_structure

if TYPE_CHECKING:
    import torch

MANIFEST = "moecover.json"
VERIFY_CORPORA = ("encyclopedia-heldout", "web-heldout")


def perplexity(
    model: torch.nn.Module,
    corpus: Corpus,
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda tokens: None,
) -> float:
    """Perplexity of a causal language model: exp of the mean negative log-likelihood per predicted token.

    Every token but the first of its sequence is predicted from those before it; padding is not scored. Log-likelihoods
    are computed in float32 and summed in float64.

    Args:
        model: from `load_model`, possibly within `masked`.
        corpus: held-out sequences.
        batch_size: sequences per forward pass.
        advance: called with the tokens of every finished batch.
    """
    import torch

    device = next(model.parameters()).device
    total, predicted = 0.0, 0
    with torch.inference_mode():
        for inputs in batches(corpus, batch_size):
            inputs = {key: value.to(device) for key, value in inputs.items()}
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            targets = inputs["input_ids"][:, 1:]
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            scored = mask[:, 1:] & mask[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
            )
            total += losses[scored.flatten()].double().sum().item()
            predicted += int(scored.sum())
            advance(int(mask.sum()))
    if predicted == 0:
        raise InputError(f"corpus {corpus.name}: no token to predict, sequences of at least two tokens are needed")
    return math.exp(total / predicted)


def _decoder_layers(model: torch.nn.Module, structure: Structure) -> list[torch.nn.Module]:
    """All decoder layers, dense ones included: the list that holds the layers with experts."""
    parts = structure.experts_modules[0].split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    return list(model.get_submodule(".".join(parts[:number])).children())


def _forward_record(model: torch.nn.Module, structure: Structure, corpus: Corpus) -> list[tuple[str, torch.Tensor]]:
    """Output of every decoder layer and the logits over a corpus, by name, on the CPU."""
    import torch

    outputs: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            outputs.setdefault(name, []).append((output[0] if isinstance(output, tuple) else output).cpu())

        return hook

    handles = [
        layer.register_forward_hook(keep(f"decoder layer {i}"))
        for i, layer in enumerate(_decoder_layers(model, structure))
    ]
    try:
        device = next(model.parameters()).device
        with torch.inference_mode():
            for inputs in batches(corpus, 1):
                result = model(**{key: value.to(device) for key, value in inputs.items()}, use_cache=False)
                outputs.setdefault("logits", []).append(result.logits.cpu())
    finally:
        for handle in handles:
            handle.remove()
    return [(name, torch.cat([v.flatten(0, 1) for v in values])) for name, values in outputs.items()]


def read_manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    """The moecover.json of a checkpoint that this program wrote.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = checkpoint.path / MANIFEST
    if not path.is_file():
        raise InputError(f"{checkpoint.name} holds no {MANIFEST}: it was not written by `moecover prune`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["plan"], manifest["files"], manifest["source"]["name"], manifest["source"]["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error!r}. Prune again") from error
    return manifest  # type: ignore[no-any-return]


def changed_files(checkpoint: Checkpoint, manifest: dict[str, Any]) -> list[str]:
    """Names of the files whose sha256 is not the manifest's, or that are missing."""
    changed = []
    for name, expected in manifest["files"].items():
        path = checkpoint.path / name
        if not path.is_file():
            changed.append(name)
            continue
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                changed.append(name)
    return changed


def verification_text(
    structure: Structure, *, corpora: Sequence[tuple[str, str]] = (), sequences: int = 2, length: int = 256
) -> list[Corpus]:
    """Real text for a proof: the given corpora, else the shipped held-out ones in the model's own tokens.

    A model without a tokenizer gets seeded random ids; the record of the corpus says so.
    """
    import numpy as np

    text = structure.checkpoint.text_config
    length = min(length, text.get("max_position_embeddings") or length)
    if not corpora and load_tokenizer(structure.checkpoint.path) is None:
        tokens = np.random.default_rng(0).integers(0, text["vocab_size"], size=(2 * sequences, length))
        return [
            make_corpus("random ids (no tokenizer)", tokens, np.ones_like(tokens, dtype=bool), {"source": "random ids"})
        ]
    sources: Sequence[tuple[str, str | None]] = corpora or [(name, None) for name in VERIFY_CORPORA]
    loaded = [load_corpus(name, path or None, structure=structure, length=length) for name, path in sources]
    return [corpus[:sequences] for corpus in loaded]


def verify(
    model: str | Path,
    pruned: str | Path,
    *,
    revision: str | None = None,
    corpora: Sequence[tuple[str, str]] = (),
    dtype: str = "auto",
    device: str = "auto",
    tolerance: float = 0.0,
    advance: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Prove a pruned checkpoint: same outputs as the original masked by the plan, layer by layer, on real text.

    Args:
        model: the original, folder or hub id.
        pruned: the checkpoint that `prune` wrote.
        revision: of the original.
        corpora: names and paths of the text (path empty for a named corpus); default: the shipped held-out text.
        dtype: torch dtype by name for both, ``auto`` for the checkpoint's.
        device: torch device by name.
        tolerance: largest difference allowed, as a share of the largest value of the layer; 0: every bit equal.
        advance: called with a line on what comes next.

    Returns:
        ``equal``; ``first_difference`` (a decoder layer or the logits, None when equal); ``max_abs_difference``;
        ``changed_files`` whose sha256 is not the manifest's; ``tokens``; ``corpora``; ``layers``: the difference of each.

    Raises:
        InputError: either checkpoint cannot be read, or they do not belong together.
    """
    original = read_structure(model, revision=revision)
    cut_checkpoint = open_checkpoint(pruned)
    manifest = read_manifest(cut_checkpoint)
    plan = Plan.from_json(json.dumps(manifest["plan"]), name=f"the plan in {cut_checkpoint.path / MANIFEST}")
    check_plan(plan, original, other_weights=True)
    if manifest["source"]["fingerprint"] != original.model_fingerprint:
        raise InputError(
            f"{pruned} was cut from {manifest['source']['name']}, which is not {model}: the routers differ"
        )
    advance("checking the hashes of the written files")
    changed = changed_files(cut_checkpoint, manifest)
    texts = verification_text(original, corpora=corpora)
    advance("running the original, masked")
    live = load_model(original, dtype=dtype, device=device)
    with masked(live, original, plan):
        expected = [_forward_record(live, original, corpus) for corpus in texts]
    del live
    advance("running the pruned checkpoint")
    cut = read_structure(cut_checkpoint)
    live = load_model(cut, dtype=dtype, device=device)
    found = [_forward_record(live, cut, corpus) for corpus in texts]
    differences: dict[str, float] = {}
    largest: dict[str, float] = {}
    for one, two in zip(expected, found, strict=True):
        for (name, a), (_, b) in zip(one, two, strict=True):
            difference = (a.double() - b.double()).abs().max().item()
            differences[name] = max(differences.get(name, 0.0), difference if math.isfinite(difference) else math.inf)
            largest[name] = max(largest.get(name, 0.0), a.double().abs().max().item())
    first = next((name for name, d in differences.items() if not d <= tolerance * largest[name]), None)
    return {
        "equal": first is None and not changed,
        "first_difference": first,
        "max_abs_difference": max(differences.values()),
        "changed_files": changed,
        "tokens": sum(corpus.num_tokens for corpus in texts),
        "corpora": [corpus.name for corpus in texts],
        "layers": differences,
    }
