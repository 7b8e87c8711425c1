"""The first original behind a checkpoint that moecover has pruned before: reads the manifest in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moecover.checkpoints.manifest import MANIFEST, read_manifest
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError
from moecover.planning.channel_sets import as_ids


@dataclass(frozen=True)
class Origin:
    """The model that nothing was removed from.

    Attributes:
        name: as the user gave it when it was pruned.
        revision: commit of a hub model, None for a folder.
        fingerprint: of the model.
        num_experts: experts per layer.
        num_bytes: bytes of its tensors; None where the manifest does not say.
        top_k: experts per token there; None where the manifest does not say.
        ids: by MoE layer, the ids there of the source's experts, in their order.
        num_channels: of an expert; None where the manifest does not say.
        channels: by MoE layer and expert of the source, the ids there of its channels; empty where all stayed.
    """

    name: str
    revision: str | None
    fingerprint: str
    num_experts: int
    num_bytes: int | None
    ids: tuple[tuple[int, ...], ...]
    num_channels: int | None = None
    channels: tuple[tuple[tuple[int, ...], ...], ...] = ()
    top_k: int | None = None

    def to_json(self) -> dict[str, object]:
        """What the manifest of the next checkpoint says of it."""
        return {
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "num_experts": self.num_experts,
            "num_bytes": self.num_bytes,
            **({} if self.num_channels is None else {"channels": self.num_channels}),
            **({} if self.top_k is None else {"top_k": self.top_k}),
        }


def _channels(structure: Structure, rows: Sequence[dict[str, Any]]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The ids in the first original of the channels of every expert; empty where it has the same channels.

    Raises:
        ValueError: they are not as many as the experts have.
    """
    if not any("channels" in row for row in rows):
        return ()
    found = tuple(tuple(tuple(as_ids(ids)) for ids in row["channels"]) for row in rows)
    experts, width = structure.topology.num_experts, structure.width
    if isinstance(width, str) or {(len(row), len(ids)) for row in found for ids in row} != {(experts, width.channels)}:
        raise ValueError("its channels are not those of the folder")
    return found


def origin_of(structure: Structure) -> Origin | None:
    """The first original of a checkpoint; None if it is one itself.

    Raises:
        InputError: the manifest in its folder is damaged, or is another model's.
    """
    checkpoint, topology = structure.checkpoint, structure.topology
    if not (checkpoint.path / MANIFEST).is_file():
        return None
    manifest = read_manifest(checkpoint)
    try:
        rows_of = {row["decoder_layer"]: row for row in manifest["experts"]}
        rows = {decoder_layer: row["old_to_new"] for decoder_layer, row in rows_of.items()}
        ids = tuple(
            tuple(int(old) for old, _ in sorted(rows[d].items(), key=lambda row: int(row[1])))
            for d in topology.decoder_layers
        )
        if any(sorted(rows[d].values()) != list(range(topology.num_experts)) for d in topology.decoder_layers):
            raise ValueError("its experts are not those of the folder")
        first = manifest.get("original") or {
            **manifest["source"],
            "num_experts": manifest["source"]["topology"]["num_experts"],
            "top_k": manifest["source"]["topology"]["top_k"],
        }
        return Origin(
            str(first["name"]),
            first.get("revision"),
            str(first["fingerprint"]),
            int(first["num_experts"]),
            first.get("num_bytes"),
            ids,
            None if first.get("channels") is None else int(first["channels"]),
            _channels(structure, [rows_of[d] for d in topology.decoder_layers]),
            first.get("top_k"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{checkpoint.path / MANIFEST} does not describe the model in its folder: {error!r}. Remove it if the "
            "model was not pruned by moecover"
        ) from error
