"""The files of a pruned checkpoint besides its shards: edited settings, copies of other files, card and manifest.

Only the expert count in config.json and the expert ids in quantisation settings are edited; tokenizer and other files
are copied byte for byte. The manifest (moecover.json) holds the plan, the new id of every expert and a hash of every
file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.checkpoints.config_edit import QUANTISATION_FILES, NewCount, edited_config, top_k_keys
from moecover.checkpoints.manifest import CARD, MANIFEST
from moecover.checkpoints.names import MTP, mtp_number
from moecover.checkpoints.pieces import Piece
from moecover.checkpoints.renumbering import NewId, Renumbering, renumbered
from moecover.checkpoints.structure import Structure
from moecover.checkpoints.weight_files import inside
from moecover.files.atomic import explained
from moecover.files.hashing import HASH, file_hash, sealed
from moecover.files.reading import parse_json
from moecover.planning.artifact import LayerPlan, Plan
from moecover.planning.channel_sets import packed
from moecover.pruning.card import model_card
from moecover.pruning.copies import ORIGINAL_CARD, Copies
from moecover.pruning.origin import Origin
from moecover.pruning.shards import edited_index

if TYPE_CHECKING:
    from moecover.files.resumable import Partial
    from moecover.pruning.request import Choice
    from moecover.repairing.artifact import Repaired


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
        origin: the first original, where the source was pruned before.
    """

    structure: Structure
    plan: Plan
    mtp: str = "drop"
    repaired: Repaired | None = None
    command: str = ""
    figures: str = ""
    origin: Origin | None = None


def new_ids(cut: Cut) -> NewId:
    """The function that gives the new id of an expert named in a setting, see `renumbering.renumbered`."""
    plan, topology = cut.plan, cut.structure.topology
    row_of = dict(zip(topology.decoder_layers, plan.layers, strict=True))
    of_mtp = {row.decoder_layer: row for row in plan.mtp}

    def new_id(name: str, decoder_layer: int, expert: int) -> int | None:
        named = MTP.match(name)
        row = None if named else row_of.get(decoder_layer)
        if row is None:
            if cut.mtp == "drop":
                return None
            number = topology.num_layers + mtp_number(name, topology.num_layers) if named else decoder_layer
            row = of_mtp.get(number, plan.layers[-1])
        return row.kept.index(expert) if expert in row.kept else None

    return new_id


def renumbering(cut: Cut) -> Renumbering:
    """What becomes of the experts' names in settings."""
    topology = cut.structure.topology
    names = tuple(cut.structure.checkpoint.tensors)
    own = (row.decoder_layer for row in cut.plan.mtp if cut.mtp == "prune")
    return Renumbering(new_ids(cut), (*topology.decoder_layers, *own), topology.num_experts, names)


def check_settings(structure: Structure, choice: Plan | Choice, *, mtp: str = "drop") -> None:
    """Refuse settings that name experts in a way that cannot be renumbered, before anything is made from text.

    Args:
        structure: the source.
        choice: a plan; or how one will be made: then settings must fit whichever experts stay.
        mtp: see `writer.prune`.

    Raises:
        InputError: see `renumbering.renumbered`.
    """
    decoder_layers, experts = structure.topology.decoder_layers, structure.topology.num_experts
    if not isinstance(choice, Plan):
        kept = [sorted((i + shift) % experts for i in range(choice.keep)) for shift in range(len(decoder_layers))]
        layers = [LayerPlan(decoder_layer=d, kept=k) for d, k in zip(decoder_layers, kept, strict=True)]
        choice = Plan(schema=1, keep=choice.keep, layers=layers)
    with explained(f"reading {structure.checkpoint.name}", left="Nothing was written"):
        edited_files(
            Cut(structure, choice, mtp), (structure.checkpoint.path / "config.json").read_text(encoding="utf-8"), {}
        )


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
    structure, checkpoint, how = cut.structure, cut.structure.checkpoint, renumbering(cut)
    drop_mtp = bool(structure.mtp) and cut.mtp == "drop"
    text = edited_config(config, _counts(cut), settings=lambda value: renumbered(value, how), drop_mtp=drop_mtp)
    found = {"config.json": text.encode()}
    for name in QUANTISATION_FILES:
        if (file := checkpoint.path / name).is_file() and inside(checkpoint.path, file):
            settings = _edited_settings(file.read_text(encoding="utf-8", errors="surrogateescape"), how)
            found[name] = settings.encode(errors="surrogateescape")
    if checkpoint.index_name is not None:
        found[checkpoint.index_name] = edited_index(checkpoint, shards).encode()
    return found


def _counts(cut: Cut) -> list[NewCount]:
    """The counts of config.json that change: of experts, of those per token, of channels, of shared experts."""
    structure, width = cut.structure, cut.structure.width
    found = [NewCount(structure.count_keys, structure.topology.num_experts, cut.plan.keep)]
    if cut.plan.width is not None and not isinstance(width, str):
        found.append(NewCount(width.keys, width.channels, cut.plan.width))
        found.append(NewCount(width.shared_keys, width.shared, width.shared_at(cut.plan.width)))
    if cut.plan.top_k is not None:
        own = structure.topology.top_k
        found.append(NewCount(top_k_keys(structure.checkpoint.config, own), own, cut.plan.top_k))
    return found


def write_other_files(cut: Cut, partial: Partial, edited: Mapping[str, bytes], copies: Copies) -> None:
    """Write everything but the shards: edited settings, copies, the card, and last the manifest.

    Args:
        cut: what is written.
        partial: the output folder, whose shards are finished.
        edited: from `edited_files`.
        copies: from `copies_of`.
    """
    checkpoint, folder = cut.structure.checkpoint, partial.files
    hashes: dict[str, str] = {name: entry[HASH] for name, entry in partial.finished.items()}

    def put(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        hashes[name] = file_hash(folder / name)

    for relative in copies.copied:
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
        cut.structure,
        cut.plan,
        repaired=cut.repaired,
        command=cut.command,
        original_card=text,
        figures=cut.figures,
        origin=cut.origin,
        mtp=cut.mtp,
    )
    put(CARD, card.encode())
    manifest = json.dumps(sealed(_manifest(cut, hashes, copies.left_out)), indent=1) + "\n"
    (folder / MANIFEST).write_text(manifest, encoding="utf-8")


def _manifest(cut: Cut, hashes: Mapping[str, str], left_out: Sequence[str]) -> dict[str, object]:
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
            "num_bytes": checkpoint.num_bytes,
            **({} if isinstance(structure.width, str) else {"channels": structure.width.channels}),
        },
        **({"original": cut.origin.to_json()} if cut.origin is not None else {}),
        "experts": [_experts(cut, layer) for layer in range(len(plan.layers))],
        "plan": plan.to_dict(),
        **({"mtp": cut.mtp} if structure.mtp else {}),
        **({"repair": cut.repaired.manifest()} if cut.repaired is not None else {}),
        "left_out": list(left_out),
        "hash": HASH,
        "files": dict(sorted(hashes.items())),
    }


def _experts(cut: Cut, layer: int) -> dict[str, object]:
    """What became of the experts of a MoE layer, by their ids in the first original.

    ``channels`` has a set of ids there for every expert, by new id; it is missing where all channels stayed.
    """
    row, first = cut.plan.layers[layer], cut.origin
    ids = first.ids[layer] if first is not None else range(cut.structure.topology.num_experts)
    found: dict[str, object] = {
        "decoder_layer": row.decoder_layer,
        "old_to_new": {str(ids[old]): new for new, old in enumerate(row.kept)},
    }
    before = [first.channels[layer][old] for old in row.kept] if first is not None and first.channels else None
    if row.channels:
        sets = (
            row.channels if before is None else [[b[j] for j in s] for b, s in zip(before, row.channels, strict=True)]
        )
        found["channels"] = [packed(s) for s in sets]
    elif before is not None:
        found["channels"] = [packed(s) for s in before]
    return found


def _edited_settings(text: str, how: Renumbering) -> str:
    """A quantiser's own settings file with the names of experts renumbered; the same text if it names none.

    Raises:
        InputError: see `renumbered`.
    """
    try:
        value = parse_json(text)
    except ValueError:
        return text  # not JSON in spite of its name: copied as it is
    edited = renumbered(value, how)
    return text if edited == value else json.dumps(edited, indent=4, ensure_ascii=False) + "\n"
