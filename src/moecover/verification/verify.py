"""The proof of a pruned checkpoint: holds the written files against the masked original (`masking`).

Of a repaired checkpoint too: every tensor that its manifest does not name has the original's bytes, those that it names
have the hashes that it gives, and with these in place of its own the masked original gives the same.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.manifest import MANIFEST, changed_files, read_manifest
from moecover.checkpoints.source import Checkpoint, open_checkpoint
from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.batches import batches
from moecover.corpora.packing import Corpus, load_corpus, load_tokenizer, make_corpus
from moecover.errors import InputError
from moecover.files.copying import HASH
from moecover.planning.artifact import Plan, check_plan
from moecover.planning.masking import masked_layers
from moecover.repairing.layers import LayerRepair, with_repairs
from moecover.runtime.memory import opened
from moecover.runtime.running import Running, Within, unmasked

if TYPE_CHECKING:
    import torch

VERIFY_CORPORA = ("encyclopedia-heldout", "web-heldout")


def _forward_record(
    model: Running, structure: Structure, corpora: Sequence[Corpus], within: Within
) -> list[tuple[str, torch.Tensor]]:
    """Output of every decoder layer and the logits over corpora, by name, on the CPU; every layer runs in its context."""
    import torch

    outputs: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            outputs.setdefault(name, []).append((output[0] if isinstance(output, tuple) else output).cpu())

        return hook

    handles = []
    for number, name in enumerate(model.layers):
        layer = model.module.get_submodule(name)
        handles.append(layer.register_forward_hook(keep(f"decoder layer {number}")))

    def logits(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = model.module(**{k: v.to(model.device) for k, v in inputs.items()}, use_cache=False).logits
        return found.cpu()

    calls = [functools.partial(logits, inputs) for corpus in corpora for inputs in batches(corpus, 1)]
    try:
        outputs["logits"] = model.run(calls, within=[within] * len(calls))
    finally:
        for handle in handles:
            handle.remove()
    ordered = {name: values for name, values in outputs.items() if name != "logits"} | {"logits": outputs["logits"]}
    return [(name, torch.cat([v.flatten(0, 1) for v in values])) for name, values in ordered.items()]


def plan_of(checkpoint: Checkpoint) -> Plan | None:
    """The plan that a checkpoint was cut by, None where this program did not cut it."""
    if not (checkpoint.path / MANIFEST).is_file():
        return None
    return Plan.from_json(
        json.dumps(read_manifest(checkpoint)["plan"]), name=f"the plan in {checkpoint.path / MANIFEST}"
    )


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
    memory_limit: int | None = None,
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
        memory_limit: bytes of memory that may be used, see `fitting.opened`.
        advance: called with a line on what comes next.

    Returns:
        ``equal``; ``first_difference`` (a decoder layer or the logits, None when equal); ``max_abs_difference``;
        ``changed_files`` whose hash is not the manifest's; ``tokens``; ``corpora``; ``layers``: the difference of each;
        ``repaired``: how many tensors are not the original's by the manifest; ``changed_tensors`` that are not what they
        are to be, where some are repaired.

    Raises:
        InputError: either checkpoint cannot be read, or they do not belong together.
    """
    import torch

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
    cut, changed_tensors, hashes = read_structure(cut_checkpoint), list[str](), dict[str, str]()
    repair_of = None
    if "repair" in manifest:
        advance("comparing the tensors that were not repaired")
        repair_of, changed_tensors, hashes = _repairs(original, plan, cut_checkpoint, manifest)
    tokens = sum(corpus.num_tokens for corpus in texts)
    fitting = {
        "tokens": tokens,
        "batch_tokens": max(c.tokens.shape[1] for c in texts),
        "dtype": dtype,
        "device": device,
        "memory_limit": memory_limit,
        "head": True,
    }
    extra = 2 * sum(e.num_bytes for name, e in cut_checkpoint.tensors.items() if name in hashes) // len(plan.layers)
    with opened(original, **fitting, extra=extra, say=advance) as live:
        advance("running the original, masked")
        within = masked_layers(live.module, original, plan)
        if repair_of is not None:
            within = with_repairs(live.module, original, within, repair_of)
        expected = _forward_record(live, original, texts, within)
    del live, within
    with opened(cut, **fitting, say=advance) as live:
        advance("running the pruned checkpoint")
        found = _forward_record(live, cut, texts, unmasked)
    differences: dict[str, float] = {}
    largest: dict[str, float] = {}
    for (name, a), (_, b) in zip(expected, found, strict=True):
        parts = [
            (x.double() - y.double()).abs().max().item()
            for x, y in zip(torch.split(a, 64), torch.split(b, 64), strict=True)
        ]
        differences[name] = max(parts) if all(map(math.isfinite, parts)) else math.inf
        largest[name] = a.abs().max().item()
    first = next((name for name, d in differences.items() if not d <= tolerance * largest[name]), None)
    return {
        "equal": first is None and not changed and not changed_tensors,
        "first_difference": first,
        "max_abs_difference": max(differences.values()),
        "changed_files": changed,
        "tokens": tokens,
        "corpora": [corpus.name for corpus in texts],
        "layers": differences,
        "repaired": len(hashes),
        "changed_tensors": changed_tensors,
    }


def _repairs(
    original: Structure, plan: Plan, cut: Checkpoint, manifest: dict[str, Any]
) -> tuple[Callable[[int], LayerRepair], list[str], dict[str, str]]:
    """What gives the repair of a MoE layer, read from the checkpoint; the tensors that are not what they are to be; hashes of the repaired ones.

    Raises:
        InputError: the manifest names other tensors than a repair can change.
    """
    from moecover.repairing.store import changed_tensors, layer_repair, names_of, places_on_disk, stored_bytes

    where, kept = places_on_disk(original), [layer.kept for layer in plan.layers]
    try:
        repair = manifest["repair"]
        names = [names_of(original, *part) for part in zip(where, kept, repair["layers"], strict=True)]
        if {name for of_layer in names for name in of_layer} != repair["tensors"].keys() or repair["hash"] != HASH:
            raise ValueError("it names other tensors than its layers repair")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{cut.path / MANIFEST} is damaged: {error!r}. Prune again") from error

    def read(name: str) -> bytes:
        return stored_bytes(cut.path, cut.tensors[name])

    def repair_of(layer: int) -> LayerRepair:
        return layer_repair(original, where[layer], kept[layer], repair["layers"][layer], read)

    hashes: dict[str, str] = repair["tensors"]
    return repair_of, changed_tensors(original, plan, cut, hashes, mtp=manifest.get("mtp", "drop")), hashes
