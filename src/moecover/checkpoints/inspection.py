"""Facts about a model's routed experts, before any work: reads configuration and headers, gives a dictionary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moecover.checkpoints.config_edit import first_number
from moecover.checkpoints.families import PROVEN_FAMILIES
from moecover.checkpoints.servers import unmet
from moecover.checkpoints.source import open_checkpoint
from moecover.checkpoints.structure import read_structure
from moecover.errors import InputError

SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


def inspect(model: str | Path, *, revision: str | None = None, server: str | None = None) -> dict[str, Any]:
    """Facts about a model's routed experts, from its configuration and headers only.

    Args:
        model: local folder or hub id (only config.json and the headers of the shards are fetched).
        revision: branch, tag or commit of a hub model.
        server: also say what this server would lack at every size, see `servers`.

    Returns:
        A JSON-ready dictionary: family, layers, experts, top-k, shared experts, sizes in bytes, and ``refused``: one
        line a reason for which `prune` would refuse, empty when it would not.
    """
    checkpoint = open_checkpoint(model, revision=revision, headers_only=True)
    facts: dict[str, Any] = {
        "model": checkpoint.name,
        "family": checkpoint.config.get("model_type"),
        "total_bytes": checkpoint.num_bytes,
        "shards": len(checkpoint.shard_metadata),
    }
    try:
        structure = read_structure(checkpoint)
    except InputError as error:
        return {**facts, "refused": [str(error)], "warnings": []}
    topology, experts = structure.topology, structure.topology.num_experts
    keeps = {percent: int(experts * percent / 100 + 0.5) for percent in (25, 50, 75)}
    return {
        **facts,
        "family_proven": topology.family in PROVEN_FAMILIES,
        "decoder_layers": topology.num_layers,
        "moe_layers": list(topology.decoder_layers),
        "experts": experts,
        "top_k": topology.top_k,
        "shared_experts": _shared_experts(checkpoint.config),
        "hidden_size": topology.hidden_size,
        "expert_bytes": structure.expert_num_bytes,
        "routed_bytes": structure.expert_total_bytes,
        "sizes": [
            {
                "percent": percent,
                "keep": keep,
                "bytes": structure.num_bytes(keep),
                **({"unmet": unmet(topology, keep, server)} if server else {}),
            }
            for percent, keep in keeps.items()
            if keep >= topology.top_k
        ],
        "quantised": structure.quantised,
        "mtp_bytes": sum(checkpoint.tensors[name].num_bytes for name in structure.mtp),
        "refused": [],
        "warnings": list(structure.warnings),
    }


def _shared_experts(config: dict[str, Any]) -> int:
    """Shared experts per layer: a count where the config has one, else 1 where it gives them a width."""
    count = first_number(config, SHARED_KEYS)
    if count is not None:
        return count
    return 1 if (first_number(config, ("shared_expert_intermediate_size", "shared_intermediate_size")) or 0) > 0 else 0
