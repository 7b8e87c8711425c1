"""Stage 4, checkpoint: reads a checkpoint and a plan, writes the pruned checkpoint.

The model is not loaded: the byte ranges of what remains are copied from shard to shard, in the original layout. Only the
expert count in config.json is edited; tokenizer and other files are copied byte for byte.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.config_edit import QUANTISATION_FILES, NewId, edited_config, edited_settings
from moecover.checkpoints.header import TensorEntry, read_header
from moecover.checkpoints.manifest import MANIFEST
from moecover.checkpoints.names import MTP
from moecover.checkpoints.pieces import NOTHING, Piece, coalesced, pieces_by_shard
from moecover.checkpoints.source import INDEX, OTHER_WEIGHTS, Checkpoint
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, MoecoverError
from moecover.files.atomic import canonical_json, check_output, explained
from moecover.files.copying import HASH, file_hash, followed, write_ranges
from moecover.files.locks import locked
from moecover.files.resumable import Partial, restore, resumable_folder
from moecover.planning.artifact import Plan, check_plan
from moecover.pruning.card import model_card
from moecover.pruning.card_numbers import Measurement, measured
from moecover.registry import unknown_name

if TYPE_CHECKING:
    from moecover.repairing.store import Repaired

MTP_CHOICES = ("drop", "prune")
CARD, ORIGINAL_CARD = "README.md", "README.original.md"


def new_ids(structure: Structure, plan: Plan, *, mtp: str = "drop") -> NewId:
    """The new id of an expert that a setting names, see `config_json.renumbered`."""
    layer_of = {number: layer for layer, number in enumerate(structure.topology.decoder_layers)}

    def new_id(name: str, decoder_layer: int, expert: int) -> int | None:
        layer = None if MTP.match(name) else layer_of.get(decoder_layer)
        if layer is None:
            if mtp == "drop":
                return None
            layer = len(plan.layers) - 1
        kept = plan.layers[layer].kept
        return kept.index(expert) if expert in kept else None

    return new_id


def write_shard(
    source: Path,
    target: Path,
    pieces: list[Piece],
    metadata: dict[str, str] | None,
    tell: Callable[[Path | int | None], None],
    advance: Callable[[int], None],
) -> None:
    """Write one safetensors file from byte ranges of others.

    Args:
        source: the shard of the source, from which pieces are that name no other file.
        target: the file to write.
        pieces: its tensors, in order.
        metadata: its ``__metadata__``.
        tell: how the thread that hashes hears of the file, see `copying.followed`; completion is left to the caller.
        advance: called with the bytes of tensors that were written since the last call.

    Raises:
        MoecoverError: the source ends early (it changed while it was read).
        OSError: reading or writing failed.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for p in pieces:
        header[p.name] = {"dtype": p.dtype, "shape": list(p.shape), "data_offsets": [position, position + p.num_bytes]}
        position += p.num_bytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    head = struct.pack("<Q", len(raw)) + raw
    sizes: list[int] = []

    def written(size: int) -> None:
        if sizes:
            advance(size - sizes.pop())
        else:
            tell(target)
        tell(size)
        sizes.append(size)

    groups = itertools.groupby(pieces, key=lambda p: p.file or source)
    write_ranges(target, head, ((file, coalesced(of_file)) for file, of_file in groups), written)


def _other_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """Files to be copied as they are, relative to the folder: no weights, no links to folders, nothing hidden."""
    skipped = {"config.json", INDEX, MANIFEST}
    if (checkpoint.path / MANIFEST).is_file():
        skipped.add(CARD)  # the card that this program wrote; the original one is beside it
    for parent, folders, files in os.walk(checkpoint.path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            relative = (Path(parent) / name).relative_to(checkpoint.path)
            if (
                name.startswith(".")
                or not (Path(parent) / name).is_file()
                or name.endswith(OTHER_WEIGHTS)
                or relative.as_posix() in skipped
            ):
                continue
            yield relative


def left_out_files(checkpoint: Checkpoint) -> list[str]:
    """Weights in other formats and safetensors outside the index: they hold the whole model and are not copied."""
    return sorted(
        p.relative_to(checkpoint.path).as_posix()
        for p in checkpoint.path.rglob("*")
        if p.name.endswith(OTHER_WEIGHTS) and not (p.name in checkpoint.shard_metadata and p.parent == checkpoint.path)
    )


def _new_index(checkpoint: Checkpoint, shards: dict[str, list[Piece]]) -> str:
    assert checkpoint.index is not None
    metadata = dict(checkpoint.index.get("metadata") or {})
    pieces = [p for ps in shards.values() for p in ps]
    metadata["total_size"] = sum(p.num_bytes for p in pieces)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(p.shape) for p in pieces)
    weight_map = {p.name: shard for shard, ps in shards.items() for p in ps}
    index = {**checkpoint.index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def check_target(structure: Structure, output: str | Path, *, overwrite: bool = False) -> Path:
    """The output folder, refused before any work when it exists or lies inside the source (or around it).

    Raises:
        InputError: see above.
    """
    # A link is followed: its target is what gets replaced, on the disk where it lies.
    path, folder = Path(output).expanduser().resolve(), structure.checkpoint.folder
    source = folder.resolve() if folder else None  # a hub model that is not here yet lies in the cache
    if source and (path == source or source in path.parents or path in source.parents):
        raise InputError(
            f"the output {output} and the model {structure.checkpoint.name} overlap. Choose another folder"
        )
    check_output(path, overwrite=overwrite, marker=MANIFEST)
    return path


def _stamp(shard: Path) -> list[int]:
    stat = shard.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def inputs_of(structure: Structure, plan: Plan, config: str, *, mtp: str) -> dict[str, Any]:
    """What the bytes of the output's shards come from, by the name that a message gives it: state of a run belongs to it.

    Raises:
        InputError: a shard is not what it was when the structure was read.
        OSError: a shard cannot be read.
    """
    from moecover import __version__

    checkpoint, entries = structure.checkpoint, dict[str, TensorEntry]()
    inputs: dict[str, Any] = {
        "the version of moecover": __version__,
        "the plan": _digest([[layer.decoder_layer, layer.kept] for layer in plan.layers]),
        "--mtp": mtp,
        "config.json": _digest(config),
    }
    for shard, metadata in checkpoint.shard_metadata.items():
        stamp = _stamp(checkpoint.path / shard)
        found, found_metadata = read_header(checkpoint.path / shard)
        if found_metadata != metadata:
            raise InputError(f"{checkpoint.path / shard} changed after it was read. Start again")
        rows = [[e.name, e.dtype, e.shape, e.start, e.end] for e in found.values()]
        inputs[shard] = [*stamp, _digest([rows, metadata])]
        entries.update(found)
    for name, entry in checkpoint.tensors.items():
        if entries.get(name) != entry:
            raise InputError(f"{checkpoint.path / entry.shard} changed after it was read. Start again")
    return inputs


def _changed(shard: Path, inputs: dict[str, Any]) -> bool:
    try:
        return bool(_stamp(shard) != inputs[shard.name][:2])
    except OSError:
        return False  # gone, but it may come back


def _write_shards(
    structure: Structure, shards: dict[str, list[Piece]], partial: Partial, advance: Callable[[int], None]
) -> None:
    """Write the shards that are not finished yet, in order."""
    checkpoint = structure.checkpoint
    try:
        with followed(partial.finish) as tell:
            for shard, pieces in shards.items():
                if shard in partial.finished:
                    advance(sum(p.num_bytes for p in pieces))
                    continue
                source = checkpoint.path / shard
                write_shard(source, partial.files / shard, pieces, checkpoint.shard_metadata[shard], tell, advance)
                if _stamp(source) != partial.inputs[shard][:2]:
                    raise MoecoverError(f"{source} changed while it was read. Start again when it is at rest")
                tell(None)
    except MoecoverError:
        if any(_changed(checkpoint.path / shard, partial.inputs) for shard in checkpoint.shard_metadata):
            partial.forget()  # a later run finds other inputs
        raise


def _unfinished_bytes(shards: dict[str, list[Piece]], partial: Partial) -> int:
    return sum(p.num_bytes for shard, pieces in shards.items() if shard not in partial.finished for p in pieces)


def prune(
    structure: Structure,
    plan: Plan,
    output: str | Path,
    *,
    overwrite: bool = False,
    other_weights: bool = False,
    mtp: str = "drop",
    repaired: Repaired | None = None,
    command: str = "",
    evaluations: Mapping[str, Measurement] = NOTHING,
    advance: Callable[[int], None] = lambda num_bytes: None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the checkpoint that a plan leaves.

    The folder appears only when it is complete: it is filled beside, flushed and renamed. After an error or an interrupt
    the finished shards stay there, and the next call with the same inputs goes on from them.

    Args:
        structure: the source, from `read_structure`.
        plan: from `plan` or `Plan.load`.
        output: folder to write; must not exist, or ``overwrite`` and be one of ours.
        overwrite: replace a folder that this program wrote.
        other_weights: accept a plan made on other weights of the same shape.
        mtp: what becomes of multi-token-prediction layers that have experts of their own, which no forward pass of the
            model runs: ``drop`` leaves them out (config.json says so), ``prune`` keeps the ids of the last MoE layer.
        repaired: down projections that take the place of the source's, from `repair_files.repair` with the same plan.
        command: what the user typed, for the model card.
        evaluations: of the plan, by the name that messages give them: their numbers go on the card.
        advance: called with the bytes of every chunk written, and of every shard that an earlier run wrote.
        say: called with a line on what is there from an earlier run.

    Returns:
        The folder.

    Raises:
        InputError: the plan does not fit, the output exists or is being written by another run, the source changed, or
            settings name experts in a way that cannot be renumbered.
        MoecoverError: the disk is full or a file cannot be read or written; the message says what stays.
    """
    path = check_target(structure, output, overwrite=overwrite)
    check_plan(plan, structure, other_weights=other_weights)
    if mtp not in MTP_CHOICES:
        raise unknown_name("--mtp", mtp, MTP_CHOICES)
    figures = measured(structure, plan, evaluations) if evaluations else ""
    checkpoint = structure.checkpoint
    shards = pieces_by_shard(structure, plan.kept, mtp=mtp, others=repaired.pieces if repaired else NOTHING)
    new_id = new_ids(structure, plan, mtp=mtp)
    with locked(path):
        restore(path)
        check_target(structure, output, overwrite=overwrite)  # another run may have ended meanwhile
        with explained(f"reading {checkpoint.name}", left="Nothing was written"):
            config = (checkpoint.path / "config.json").read_text(encoding="utf-8")
            inputs = inputs_of(structure, plan, config, mtp=mtp)
            if repaired is not None:
                inputs["--repair"] = _digest(repaired.manifest())
            small = {"config.json": edited_config(
                config, structure.count_keys, structure.topology.num_experts, plan.keep, new_id=new_id,
                drop_mtp=bool(structure.mtp) and mtp == "drop",
            ).encode()}  # fmt: skip
            for name in QUANTISATION_FILES:
                if (file := checkpoint.path / name).is_file():
                    text = file.read_text(encoding="utf-8", errors="surrogateescape")
                    small[name] = edited_settings(text, new_id).encode(errors="surrogateescape")
        if checkpoint.index is not None:
            small[INDEX] = _new_index(checkpoint, shards).encode()
        with resumable_folder(path, inputs, say=say) as partial:
            if partial.finished:
                say(f"resuming: {len(partial.finished)} of {len(shards)} shards are there")
            needed, free = _unfinished_bytes(shards, partial), shutil.disk_usage(partial.folder).free
            if free < needed:
                raise MoecoverError(f"{output} needs {needed / 1e9:.2f} GB, {path.parent} has {free / 1e9:.2f} GB free. Free some space or choose another folder")  # fmt: skip
            _write_shards(structure, shards, partial, advance)
            repair = repaired.manifest() if repaired is not None else None
            _write_rest(structure, plan, partial, small, mtp=mtp, repair=repair, command=command, figures=figures)
    return path


def _write_rest(
    structure: Structure, plan: Plan, partial: Partial, small: dict[str, bytes], *, mtp: str,
    repair: dict[str, Any] | None, command: str, figures: str,
) -> None:  # fmt: skip
    """Write everything but the shards: given contents, files copied as they are, the card, the manifest."""
    from moecover import __version__

    checkpoint, folder = structure.checkpoint, partial.files
    hashes: dict[str, str] = {name: entry[HASH] for name, entry in partial.finished.items()}

    def put(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        hashes[name] = file_hash(folder / name)

    for relative in _other_files(checkpoint):
        name = ORIGINAL_CARD if relative.as_posix() == CARD else relative.as_posix()
        if name not in small:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.path / relative, folder / name)
            hashes[name] = file_hash(folder / name)
    for name, content in small.items():
        put(name, content)
    original_card = folder / ORIGINAL_CARD
    card = original_card.read_text(encoding="utf-8", errors="replace") if original_card.is_file() else ""
    about: dict[str, Any] = {"repair": repair, "command": command, "original_card": card, "measured": figures}
    put(CARD, model_card(structure, plan, **about).encode())
    manifest = {
        "schema": 1,
        "created_by": f"moecover {__version__}",
        "command": command,
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
        **({"mtp": mtp} if structure.mtp else {}),
        **({"repair": repair} if repair else {}),
        "left_out": left_out_files(checkpoint),
        "hash": HASH,
        "files": dict(sorted(hashes.items())),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
