"""Subset searches by naive computation: routing, expert outputs and layer inputs, written from the papers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch.nn.functional import silu

from moecover.checkpoints.structure import Structure
from moecover.profiling.artifact import Profile
from moecover.runtime.loading import routers

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "deepseek_v2")
SMALL = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {"num_experts": 9},
    "deepseek_v3": {"n_routed_experts": 9},
    "deepseek_v2": {"n_routed_experts": 9},
}


@dataclasses.dataclass
class Case:
    """A tiny model and its profile with stored inputs."""

    family: str
    structure: Structure
    model: torch.nn.Module
    profile: Profile


def naive_route(family: str, logits: np.ndarray, alive: list[int], bias: np.ndarray | None, k: int) -> dict[int, float]:
    """Experts and weights of one token with the others' logits at minus infinity, written from the papers."""
    logits = logits.astype(np.float64).copy()
    logits[[e for e in range(len(logits)) if e not in alive]] = -np.inf
    if family == "deepseek_v3":
        score = 1 / (1 + np.exp(-logits))
        choice = score + bias
        choice[~np.isfinite(logits)] = -np.inf
        best = lambda group: sum(sorted(group)[-2:])  # noqa: E731
    else:
        score = np.exp(logits - logits.max())
        choice = score = score / score.sum()
        best = max
    if family.startswith("deepseek"):
        groups = choice.reshape(3, -1)
        order = sorted(range(3), key=lambda g: -best(groups[g].tolist()))
        allowed = [e for e in alive if e // groups.shape[1] in order[:2]]
    else:
        allowed = alive
    chosen = sorted(allowed, key=lambda e: (-choice[e], e))[:k]
    scale = 2.5 if family.startswith("deepseek") else 1.0
    total = sum(score[e] for e in chosen) if family in ("mixtral", "qwen3_moe", "deepseek_v3") else 1.0
    return {e: scale * score[e] / total for e in chosen}


def naive_layer(case: Case, layer: int, hidden: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Router logits ``[token, expert]``, outputs of all experts ``[token, expert, hidden]``, correction bias."""
    router = routers(case.model, case.structure)[layer]
    experts: Any = case.model.get_submodule(case.structure.experts_modules[layer])
    x = hidden.double()
    outputs = []
    for e in range(case.structure.topology.num_experts):
        gate, up = (x @ experts.gate_up_proj[e].double().T).chunk(2, -1)
        outputs.append((silu(gate) * up) @ experts.down_proj[e].double().T)
    bias = getattr(router, "e_score_correction_bias", None)
    logits = x @ router.weight.double().T
    return logits.detach().numpy(), torch.stack(outputs, 1).detach().numpy(), None if bias is None else bias.numpy()


def hidden_of(case: Case, layer: int, kept_before: dict[int, list[int]] | None = None) -> list[torch.Tensor]:
    """Inputs of a layer's experts from a plain forward, earlier layers' dropped logits at minus infinity by hand."""
    model, found, handles = case.model, [], []
    experts = model.get_submodule(case.structure.experts_modules[layer])
    handles.append(experts.register_forward_pre_hook(lambda module, args: found.append(args[0].clone())))
    for earlier, kept in (kept_before or {}).items():
        router = routers(model, case.structure)[earlier]

        def reroute(module, args, output, router=router, kept=kept):
            logits = (args[0].reshape(-1, args[0].shape[-1]).double() @ router.weight.double().T).numpy()
            bias = getattr(router, "e_score_correction_bias", None)
            k = case.structure.topology.top_k
            rows = [naive_route(case.family, row, kept, None if bias is None else bias.numpy(), k) for row in logits]
            index = torch.tensor([list(row) for row in rows])
            return output[0], torch.tensor([list(row.values()) for row in rows]).to(output[1].dtype), index

        handles.append(router.register_forward_hook(reroute))
    with torch.inference_mode():
        for corpus in case.profile.inputs.sequences():
            for rows in torch.from_numpy(corpus.tokens).split(2):
                model(rows, use_cache=False)
    for handle in handles:
        handle.remove()
    return found
