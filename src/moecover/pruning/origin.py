"""The first original behind a checkpoint that moecover has pruned before: reads the manifest in its folder."""

from __future__ import annotations

from dataclasses import dataclass

from moecover.checkpoints.manifest import MANIFEST, read_manifest
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError


@dataclass(frozen=True)
class Origin:
    """The model that nothing was removed from.

    Attributes:
        name: as the user gave it when it was pruned.
        revision: commit of a hub model, None for a folder.
        fingerprint: of the model.
        num_experts: experts per layer.
        num_bytes: bytes of its tensors; None where the manifest does not say.
        ids: by MoE layer, the ids there of the source's experts, in their order.
    """

    name: str
    revision: str | None
    fingerprint: str
    num_experts: int
    num_bytes: int | None
    ids: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, object]:
        """What the manifest of the next checkpoint says of it."""
        return {
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "num_experts": self.num_experts,
            "num_bytes": self.num_bytes,
        }


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
        rows = {row["decoder_layer"]: row["old_to_new"] for row in manifest["experts"]}
        ids = tuple(
            tuple(int(old) for old, _ in sorted(rows[d].items(), key=lambda row: int(row[1])))
            for d in topology.decoder_layers
        )
        if any(sorted(rows[d].values()) != list(range(topology.num_experts)) for d in topology.decoder_layers):
            raise ValueError("its experts are not those of the folder")
        first = manifest.get("original") or {
            **manifest["source"],
            "num_experts": manifest["source"]["topology"]["num_experts"],
        }
        return Origin(
            str(first["name"]),
            first.get("revision"),
            str(first["fingerprint"]),
            int(first["num_experts"]),
            first.get("num_bytes"),
            ids,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{checkpoint.path / MANIFEST} does not describe the model in its folder: {error!r}. Remove it if the "
            "model was not pruned by moecover"
        ) from error
