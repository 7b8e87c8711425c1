"""The files of a pruned checkpoint besides its shards: edited settings, copies of other files, card and manifest.

Only the expert count in config.json and the expert ids in quantisation settings are edited; tokenizer and other files
are copied byte for byte. The manifest (moecover.json) holds the plan, the new id of every expert and a hash of every
file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.checkpoints.config_edit import QUANTISATION_FILES, NewId, edited_config, edited_settings
from moecover.checkpoints.manifest import MANIFEST
from moecover.checkpoints.names import MTP
from moecover.checkpoints.pieces import Piece
from moecover.checkpoints.source import INDEX, OTHER_WEIGHTS, Checkpoint
from moecover.checkpoints.structure import Structure
from moecover.files.hashing import HASH, file_hash
from moecover.planning.artifact import Plan
from moecover.pruning.card import model_card
from moecover.pruning.shards import edited_index

if TYPE_CHECKING:
    from moecover.files.resumable import Partial
    from moecover.repairing.artifact import Repaired

CARD, ORIGINAL_CARD = "README.md", "README.original.md"


@dataclass(frozen=True)
class Cut:
    """A checkpoint to write.

    Attributes:
        structure: the source.
        plan: which experts stay.
        mtp: ``drop`` or ``prune``, see `writer.prune`.
        repaired: tensors that replace those of the source; None for none.
        command: the command line that the user typed; empty in Python.
        figures: a section of measured numbers for the card, see `card_numbers.measured`.
    """

    structure: Structure
    plan: Plan
    mtp: str = "drop"
    repaired: Repaired | None = None
    command: str = ""
    figures: str = ""


def new_ids(cut: Cut) -> NewId:
    """The function that gives the new id of an expert named in a setting, see `config_edit.renumbered`."""
    plan, layers = cut.plan, cut.structure.topology.decoder_layers
    layer_of = {number: layer for layer, number in enumerate(layers)}

    def new_id(name: str, decoder_layer: int, expert: int) -> int | None:
        layer = None if MTP.match(name) else layer_of.get(decoder_layer)
        if layer is None:
            if cut.mtp == "drop":
                return None
            layer = len(plan.layers) - 1
        kept = plan.layers[layer].kept
        return kept.index(expert) if expert in kept else None

    return new_id


def edited_files(cut: Cut, config: str, shards: Mapping[str, Sequence[Piece]]) -> dict[str, bytes]:
    """The content of config.json, of quantisation settings and of the index, by name, for the experts that remain.

    Args:
        cut: what is written.
        config: the source's config.json.
        shards: remaining tensors by shard.

    Raises:
        InputError: settings name experts in a way that cannot be renumbered.
        OSError: a file cannot be read.
    """
    structure, checkpoint, new_id = cut.structure, cut.structure.checkpoint, new_ids(cut)
    drop_mtp = bool(structure.mtp) and cut.mtp == "drop"
    experts = structure.topology.num_experts
    text = edited_config(config, structure.count_keys, experts, cut.plan.keep, new_id=new_id, drop_mtp=drop_mtp)
    found = {"config.json": text.encode()}
    for name in QUANTISATION_FILES:
        if (file := checkpoint.path / name).is_file():
            settings = edited_settings(file.read_text(encoding="utf-8", errors="surrogateescape"), new_id)
            found[name] = settings.encode(errors="surrogateescape")
    if checkpoint.index is not None:
        found[INDEX] = edited_index(checkpoint, shards).encode()
    return found


def copied_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """Files that are copied as they are, relative to the folder: no weights, no links to folders, nothing hidden."""
    skipped = {"config.json", INDEX, MANIFEST}
    if (checkpoint.path / MANIFEST).is_file():
        skipped.add(CARD)  # written by this program; the original card is README.original.md
    for parent, folders, files in os.walk(checkpoint.path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            path = Path(parent) / name
            relative = path.relative_to(checkpoint.path)
            wanted = not name.startswith(".") and not name.endswith(OTHER_WEIGHTS) and path.is_file()
            if wanted and relative.as_posix() not in skipped:
                yield relative


def left_out_files(checkpoint: Checkpoint) -> list[str]:
    """Weights in other formats and safetensors outside the index: they hold the whole model and are not copied."""
    return sorted(
        p.relative_to(checkpoint.path).as_posix()
        for p in checkpoint.path.rglob("*")
        if p.name.endswith(OTHER_WEIGHTS) and not (p.name in checkpoint.shard_metadata and p.parent == checkpoint.path)
    )


def write_other_files(cut: Cut, partial: Partial, edited: Mapping[str, bytes]) -> None:
    """Write everything but the shards: edited settings, copies, the card, and last the manifest.

    Args:
        cut: what is written.
        partial: the output folder, whose shards are finished.
        edited: from `edited_files`.
    """
    checkpoint, folder = cut.structure.checkpoint, partial.files
    hashes: dict[str, str] = {name: entry[HASH] for name, entry in partial.finished.items()}

    def put(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        hashes[name] = file_hash(folder / name)

    for relative in copied_files(checkpoint):
        name = ORIGINAL_CARD if relative.as_posix() == CARD else relative.as_posix()
        if name not in edited:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.path / relative, folder / name)
            hashes[name] = file_hash(folder / name)
    for name, content in edited.items():
        put(name, content)
    original = folder / ORIGINAL_CARD
    text = original.read_text(encoding="utf-8", errors="replace") if original.is_file() else ""
    card = model_card(
        cut.structure, cut.plan, repaired=cut.repaired, command=cut.command, original_card=text, figures=cut.figures
    )
    put(CARD, card.encode())
    manifest = json.dumps(_manifest(cut, hashes), indent=1) + "\n"
    (folder / MANIFEST).write_text(manifest, encoding="utf-8")


def _manifest(cut: Cut, hashes: Mapping[str, str]) -> dict[str, object]:
    """The content of moecover.json."""
    from moecover.version import VERSION

    structure, plan, checkpoint = cut.structure, cut.plan, cut.structure.checkpoint
    return {
        "schema": 1,
        "created_by": f"moecover {VERSION}",
        "command": cut.command,
        "source": {
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "fingerprint": structure.model_fingerprint,
            "topology": structure.topology.to_json(),
        },
        "experts": [
            {
                "decoder_layer": layer.decoder_layer,
                "old_to_new": {str(old): new for new, old in enumerate(layer.kept)},
            }
            for layer in plan.layers
        ],
        "plan": plan.to_dict(),
        **({"mtp": cut.mtp} if structure.mtp else {}),
        **({"repair": cut.repaired.manifest()} if cut.repaired is not None else {}),
        "left_out": left_out_files(checkpoint),
        "hash": HASH,
        "files": dict(sorted(hashes.items())),
    }
