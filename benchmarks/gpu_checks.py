"""What a device computes against the CPU, on the shipped models in float32; for `benchmarks.gpu`.

Every check gives figures by name. Two devices route a token differently where two experts' logits are equal up to
rounding, so that counts differ by single tokens; everything after the routing is compared by its largest relative
difference.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.loading import load_corpus
from moecover.corpora.packing import Corpus
from moecover.planning.artifact import Plan
from moecover.planning.run import plan_budgets
from moecover.profiling.artifact import Profile
from moecover.profiling.run import profile
from moecover.pruning.writer import prune
from moecover.repairing.layers import repair_layers
from moecover.runtime.loading import load_model
from moecover.runtime.masking import masked
from moecover.verification.job import verify

Figures = dict[str, Any]
BATCH = 8


def texts_of(structure: Structure, *, sequences: int, length: int) -> list[Corpus]:
    """The shipped calibration corpora in the model's tokens."""
    return [
        load_corpus(name, None, structure=structure, sequences=sequences, length=length)
        for name in ("encyclopedia", "web")
    ]


def relative(a: Any, b: Any) -> float:
    """Largest difference over the largest absolute value."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300))


def statistics_of(made: Profile, expected: Profile) -> Figures:
    """Two profiles of one model and text."""
    found: Figures = {}
    counts = [(made.statistics[name]["count"], one["count"]) for name, one in expected.statistics.items()]
    found["tokens routed to another expert, share"] = float(
        sum(np.abs(a - b).sum() for a, b in counts) / 2 / sum(b.sum() for _, b in counts)
    )
    found["largest difference of a sum"] = max(
        relative(made.statistics[name][key], values)
        for name, one in expected.statistics.items()
        for key, values in one.items()
    )
    found["largest difference of a channel's energy"] = max(
        (relative(made.channels[name], energy) for name, energy in expected.channels.items()), default=0.0
    )
    return found


def same_bits(a: Profile, b: Profile) -> bool:
    """Whether two profiles have the same numbers to the last bit."""
    return all(
        np.array_equal(values, b.statistics[name][key])
        for name, one in a.statistics.items()
        for key, values in one.items()
    ) and all(np.array_equal(energy, b.channels[name]) for name, energy in a.channels.items())


def plans_of(made: Profile, model: torch.nn.Module, structure: Structure, texts: Sequence[Corpus]) -> dict[str, Plan]:
    """A plan of every kind at about a half: from the profile alone, with channels, and by running the experts."""
    keep, width = structure.topology.num_experts // 2, made.width
    plans = {
        "TB-Coverage": plan_budgets(made, method="tb-coverage", keeps=[keep])[0],
        "ExpertSparsity": plan_budgets(
            made, method="expert-sparsity", keeps=[keep], model=model, structure=structure, sample=texts
        )[0],
    }
    if width:
        plans["thin"] = plan_budgets(made, method="tb-coverage", keeps=[keep], widths=[width // 16 * 8])[0]
    return plans


def weights_hash(folder: Path) -> str:
    """Hash of the weight files of a checkpoint."""
    hasher = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        hasher.update(file.read_bytes())
    return hasher.hexdigest()


def _kept(a: Plan, b: Plan) -> float:
    """Share of the kept experts that two plans have in common."""
    pairs = list(zip(a.layers, b.layers, strict=True))
    return sum(len(set(x.kept) & set(y.kept)) for x, y in pairs) / sum(len(x.kept) for x, _ in pairs)


def _logits(model: torch.nn.Module, structure: Structure, plan: Plan, text: Corpus) -> torch.Tensor:
    """Logits of the masked model on the first block."""
    device = next(model.parameters()).device
    with torch.inference_mode(), masked(model, structure, [layer.kept for layer in plan.layers]):
        found: torch.Tensor = model(torch.as_tensor(text.tokens[:1]).to(device), use_cache=False).logits
    return found.float().cpu()


def against_cpu(name: str, device: str, *, sequences: int, length: int) -> Figures:
    """Statistics, plans, pruned bytes, logits and repair of a shipped model on a device and on the CPU.

    Args:
        name: of the shipped model.
        device: torch device by name.
        sequences: blocks of every calibration corpus.
        length: tokens of a block.
    """
    structure = read_structure(shipped_model(name))
    texts = texts_of(structure, sequences=sequences, length=length)
    here, there = (load_model(structure, dtype="float32", device=one) for one in (device, "cpu"))
    made, again = (profile(structure, texts, model=here, batch_size=BATCH) for _ in range(2))
    expected = profile(structure, texts, model=there, batch_size=BATCH)
    found = {**statistics_of(made, expected), "profile twice: equal bits": same_bits(made, again)}
    of_device = plans_of(made, here, structure, texts)
    of_cpu = plans_of(expected, there, structure, texts)
    for kind, plan in of_device.items():
        found[f"{kind}: kept experts in common, share"] = _kept(plan, of_cpu[kind])
        found[f"{kind} twice: equal"] = plans_of(again, here, structure, texts)[kind].to_json() == plan.to_json()
    plan = of_cpu["TB-Coverage"]
    found["logits of the masked model, largest difference"] = relative(
        _logits(here, structure, plan, texts[0]), _logits(there, structure, plan, texts[0])
    )
    with tempfile.TemporaryDirectory() as folder:
        for where, kinds in (("device", of_device), ("cpu", of_cpu)):
            prune(structure, kinds["TB-Coverage"], Path(folder) / where)
        found["pruned weights by the plan of either: equal bytes"] = weights_hash(
            Path(folder) / "device"
        ) == weights_hash(Path(folder) / "cpu")
        proof = verify(structure, Path(folder) / "device", device=device, progress=False)
        found["written checkpoint against the masked original, on the device"] = proof.max_abs_difference
    repairs = [
        list(repair_layers(model, structure, plan, texts, kind="ridge", batch_size=BATCH))
        for model in (here, here, there)
    ]
    found["ridge: largest difference of a weight"] = max(
        relative(a.experts[expert].float().cpu(), b.experts[expert].float())
        for a, b in zip(repairs[0], repairs[2], strict=True)
        for expert in b.experts
    )
    found["ridge twice: equal bits"] = all(
        torch.equal(a.experts[expert], b.experts[expert])
        for a, b in zip(repairs[0], repairs[1], strict=True)
        for expert in b.experts
    )
    return found
