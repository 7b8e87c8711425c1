"""Facts about a model's routed experts before any work: reads configuration and headers, gives an `Inspection`."""

from __future__ import annotations

import json
import math
from typing import Any

from moecover.checkpoints.config_edit import SHARED_KEYS, Config, first_number
from moecover.checkpoints.opening import Model
from moecover.checkpoints.server_needs import lacking
from moecover.checkpoints.servers import LLAMA_CPP, unmet, unmet_width
from moecover.checkpoints.source import open_checkpoint
from moecover.checkpoints.structure import Structure, read_structure
from moecover.checkpoints.topology import WIDTH_STEP
from moecover.errors import InputError
from moecover.text import Cell, Shown, size_text

SHARED_WIDTH_KEYS = ("shared_expert_intermediate_size", "shared_intermediate_size")
PERCENTAGES = (25, 50, 75)  # of the experts and of their channels, whose sizes are given


class Inspection(Shown, dict[str, Any]):
    """The facts as a JSON-ready dictionary: what `inspect` returns.

    Keys: ``model``, ``family``, ``total_bytes``, ``shards``, ``refused`` (one line per reason for which `prune` would
    refuse the model, empty if it would not) and ``warnings``; unless the model is refused also ``family_proven``,
    ``decoder_layers``, ``moe_layers``, ``experts``, ``top_k``, ``shared_experts``, ``hidden_size``, ``expert_bytes``,
    ``routed_bytes``, ``sizes``, ``quantised``, ``mtp_bytes`` and ``channels`` (of an expert; None where their number
    cannot be changed, for ``all_channels_because`` of a reason), with channels also ``widths``, ``thin_sizes``
    and ``channel_groups`` (neighbouring channels that stay or go together, as blocks of quantised weights).
    Sizes are in bytes: ``sizes`` of fewer whole experts, ``thin_sizes`` of experts of every width of ``widths``.
    """

    def summary(self) -> str:
        """Name, family, shape of the routed part and size, or why the model is refused."""
        name, family, size = self["model"], self["family"], size_text(self["total_bytes"])
        if self["refused"]:
            return f"{name}: {family}, {size}, refused: {self['refused'][0]}"
        layers = f"{len(self['moe_layers'])} MoE layer{'s' if len(self['moe_layers']) > 1 else ''}"
        return f"{name}: {family}, {layers} x {self['experts']} experts, top-{self['top_k']}, {size}"

    def rows_shown(self) -> list[dict[str, Cell]]:
        """One row per fact."""
        return [{"fact": key, "value": _as_cell(value)} for key, value in self.items()]


def _as_cell(value: object) -> Cell:
    return value if value is None or isinstance(value, (str, int, float)) else json.dumps(value)


def inspect(model: Model, *, revision: str | None = None, server: str | None = None) -> Inspection:
    """Read facts about a model's routed experts from its configuration and headers.

    Args:
        model: local folder, hub id or structure (of a hub model only config.json and the shards' headers are fetched).
        revision: branch, tag or commit of a hub model.
        server: also give the requirements of this server that are not met at each size, see `servers`; None gives those
            of llama.cpp for a GGUF file, and none for a checkpoint.

    Returns:
        Family, layers, experts, top-k, shared experts, sizes in bytes, and the reasons for which `prune` would refuse.

    Raises:
        InputError: the model is missing or malformed.
    """
    if isinstance(model, Structure):
        checkpoint = model.checkpoint
    else:
        checkpoint = open_checkpoint(model, revision=revision, headers_only=True)
    if server is None and checkpoint.gguf is not None:
        server = LLAMA_CPP
    facts: dict[str, Any] = {
        "model": checkpoint.name,
        "family": checkpoint.config.get("model_type"),
        "total_bytes": checkpoint.num_bytes,
        "shards": len(checkpoint.shard_metadata),
    }
    try:
        structure = read_structure(checkpoint)
    except InputError as error:
        return Inspection({**facts, "refused": [str(error)], "warnings": list(checkpoint.notes)})
    topology = structure.topology
    return Inspection(
        {
            **facts,
            "family_proven": structure.proven,
            "decoder_layers": topology.num_layers,
            "moe_layers": list(topology.decoder_layers),
            "experts": topology.num_experts,
            "top_k": topology.top_k,
            "shared_experts": _shared_experts(checkpoint.config),
            "hidden_size": topology.hidden_size,
            "expert_bytes": structure.expert_num_bytes,
            "routed_bytes": structure.expert_total_bytes,
            "sizes": _sizes(structure, server),
            **_widths(structure, server),
            "quantised": structure.quantised,
            "mtp_bytes": sum(checkpoint.tensors[name].num_bytes for name in structure.mtp),
            "refused": [],
            "warnings": [*structure.warnings, *(lacking(structure, server) if server else ())],
        }
    )


def _sizes(structure: Structure, server: str | None) -> list[dict[str, object]]:
    """Sizes of the pruned checkpoint for several percentages of its experts."""
    rows = []
    for percent, keep in _keeps(structure):
        row: dict[str, object] = {"percent": percent, "keep": keep, "bytes": structure.num_bytes(keep)}
        if server:
            row["unmet"] = unmet(structure.topology, keep, server)
        rows.append(row)
    return rows


def _keeps(structure: Structure) -> list[tuple[int, int]]:
    """Percentages of the experts, with their number, as far as the router allows it."""
    topology = structure.topology
    counts = [(percent, int(topology.num_experts * percent / 100 + 0.5)) for percent in PERCENTAGES]
    return [(percent, keep) for percent, keep in counts if keep >= topology.top_k]


def _widths(structure: Structure, server: str | None) -> dict[str, object]:
    """The channels of an expert, and sizes of the pruned checkpoint for several percentages of them."""
    if isinstance(structure.width, str):
        return {"channels": None, "all_channels_because": structure.width}
    channels, topology, widths = structure.width.channels, structure.topology, list[dict[str, object]]()
    step = math.lcm(WIDTH_STEP, structure.width.group)
    for percent in PERCENTAGES:
        width = max(step, int(channels * percent / 100 / step + 0.5) * step)
        if width < channels and width not in [row["width"] for row in widths]:
            unmet_by = {"unmet": unmet_width(width, server)} if server else {}
            widths.append({"percent": percent, "width": width, **unmet_by})
    keeps = [keep for _, keep in _keeps(structure)] + [topology.num_experts]
    sizes = [
        {"keep": keep, "width": row["width"], "bytes": structure.num_bytes(keep, width=int(str(row["width"])))}
        for keep in keeps
        for row in widths
    ]
    return {"channels": channels, "channel_groups": structure.width.group, "widths": widths, "thin_sizes": sizes}


def _shared_experts(config: Config) -> int:
    """Shared experts per layer: the config's count, else 1 if it gives them a width."""
    count = first_number(config, SHARED_KEYS)
    if count is not None:
        return count
    return 1 if (first_number(config, SHARED_WIDTH_KEYS) or 0) > 0 else 0
