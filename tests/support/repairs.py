"""Repaired models and checkpoints of small models, and the outputs of MoE blocks in plain passes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from moecover.checkpoints.structure import Structure
from moecover.corpora.packing import Corpus
from moecover.planning.artifact import Plan
from moecover.pruning.writer import prune
from moecover.repairing.artifact import Repaired
from moecover.repairing.store import repair
from moecover.runtime.loading import load_model
from tests.conftest import hand_plan, random_corpus

# sequences enough that most experts see more tokens than their width of 16 to 24
CORPORA = [random_corpus("a", seed=1, sequences=12), random_corpus("b", seed=2, sequences=8)]


def half(structure: Structure) -> Plan:
    """Every second expert, the others where there are not enough of these."""
    keep = max(structure.topology.top_k, structure.topology.num_experts // 2)
    chosen = [*range(0, structure.topology.num_experts, 2), *range(1, structure.topology.num_experts, 2)][:keep]
    return hand_plan(structure, [sorted(chosen)] * len(structure.topology.decoder_layers))


def outputs(model: torch.nn.Module, structure: Structure, corpus: Corpus) -> list[torch.Tensor]:
    """The output of every MoE block in a plain pass, float64 ``[token, hidden]``."""
    found: list[torch.Tensor] = []
    blocks = [model.get_submodule(name.rpartition(".")[0]) for name in structure.experts_modules]
    hooks = [b.register_forward_hook(lambda m, a, o: found.append(o.double().flatten(0, -2))) for b in blocks]
    with torch.inference_mode():
        model(torch.from_numpy(corpus.tokens))
    for hook in hooks:
        hook.remove()
    return found


def mended(structure: Structure, plan: Plan, folder: Path, **options: Any) -> Repaired:
    """A repair by ridge on `CORPORA`, unless options say otherwise."""
    given: dict[str, Any] = {"corpora": CORPORA, "kind": "ridge", **options}
    model = given.pop("model", None) or contextlib.nullcontext(load_model(structure))
    return repair(structure, plan, given.pop("corpora"), model=model, folder=folder, **given)


def written(structure: Structure, plan: Plan, tmp_path: Path, **options: Any) -> Path:
    """A repaired checkpoint, see `mended`."""
    made = mended(structure, plan, tmp_path / "state", **options)
    return prune(structure, plan, tmp_path / "out", repaired=made)


def manifest_of(cut: Path) -> dict[str, Any]:
    """What the manifest says of the repair."""
    return json.loads((cut / "moecover.json").read_text())["repair"]
