"""Stage 4, checkpoint: reads a checkpoint and a plan, writes the pruned checkpoint.

The model is not loaded: the byte ranges of the remaining tensors are copied from shard to shard, in the original layout
(`shards`); the other files are edited or copied (`other_files`). Only tables of experts by token id are rewritten.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.checkpoints.header import TensorEntry, read_header
from moecover.checkpoints.id_tables import read_table, remapped
from moecover.checkpoints.manifest import MANIFEST
from moecover.checkpoints.names import kind_of, suffix_of, twin_of
from moecover.checkpoints.pieces import NOTHING, Piece, pieces_by_shard, uncut_mtp
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, arg
from moecover.files.atomic import check_output, digest, explained, resolved, stamp
from moecover.files.locks import locked
from moecover.files.resumable import restore, resumable_folder
from moecover.gguf.parts import is_gguf
from moecover.merging.method import NONE
from moecover.planning.artifact import Plan, kept_sets
from moecover.planning.fitting import check_plan
from moecover.pruning.card_numbers import Measurement, measured
from moecover.pruning.copies import copies_of, notes_on
from moecover.pruning.origin import origin_of
from moecover.pruning.other_files import Cut, edited_files, write_other_files
from moecover.pruning.overwriting import check_replaceable
from moecover.pruning.shards import check_space, safetensors_head, write_shards
from moecover.registry import unknown_name

if TYPE_CHECKING:
    from moecover.repairing.artifact import Repaired

MTP_CHOICES = ("drop", "prune")


def check_target(structure: Structure, output: str | Path, *, overwrite: bool = False) -> Path:
    """The resolved output folder; refused when it exists or overlaps the source, before any work is done.

    What ``overwrite`` would remove must be what this program wrote.

    Raises:
        InputError: see above.
    """
    if is_gguf(output):
        raise InputError(
            f"the output {output} ends in .gguf, and that of {structure.checkpoint.name} is a folder: llama.cpp's "
            "convert_hf_to_gguf.py makes a file of it. Choose another name"
        )
    path, folder = resolved(output), structure.checkpoint.folder
    source = folder.resolve() if folder else None  # a hub model that is not downloaded yet lies in the cache
    if source and (path == source or source in path.parents or path in source.parents):
        raise InputError(
            f"the output {output} and the model {structure.checkpoint.name} overlap. Choose another folder"
        )
    check_output(path, overwrite=overwrite, marker=MANIFEST)
    if overwrite and (path / MANIFEST).is_file():
        check_replaceable(path)
    return path


def check_mtp(structure: Structure, width: int | None, mtp: str) -> None:
    """Refuse what cannot be done with multi-token-prediction layers.

    Args:
        structure: the source.
        width: channels of an expert that stay; None for all.
        mtp: see `prune`.

    Raises:
        InputError: an unknown choice, layers that cannot be cut to this width, or that look up experts by token id.
    """
    if mtp not in MTP_CHOICES:
        raise unknown_name(arg("mtp"), mtp, MTP_CHOICES)
    tables = {suffix_of(kind_of(name)) for name in structure.tables}
    if mtp == "prune" and (name := next((n for n in structure.mtp if twin_of(n, tables)), None)):
        raise InputError(
            f"{arg('mtp', mtp)} does not rewrite {name}, a table of experts by token id: give {arg('mtp', 'drop')}"
        )
    if mtp == "prune" and width is not None and (name := uncut_mtp(structure)):
        raise InputError(
            f"{arg('mtp', mtp)} cannot keep {width} channels of {name}, which is not stored as in other layers: "
            f"give {arg('mtp', 'drop')}"
        )


def _written(plan: Plan, mtp: str) -> Plan:
    """A plan with the layers that a checkpoint is cut by."""
    return plan.with_mtp if mtp == "prune" else plan


def inputs_of(structure: Structure, plan: Plan, config: str, *, mtp: str) -> dict[str, object]:
    """Everything that determines the bytes of the output's shards, by the name used in messages.

    An interrupted run is only resumed with the same inputs.

    Args:
        structure: the source.
        plan: which experts stay.
        config: the source's config.json.
        mtp: see `prune`.

    Raises:
        InputError: a shard changed since the structure was read.
        OSError: a shard cannot be read.
    """
    from moecover.version import VERSION

    checkpoint, entries = structure.checkpoint, dict[str, TensorEntry]()
    inputs: dict[str, object] = {
        "the version of moecover": VERSION,
        "the plan": digest(kept_sets(_written(plan, mtp))),
        "--mtp": mtp,
        "config.json": digest(config),
    }
    for shard, metadata in checkpoint.shard_metadata.items():
        stamped = stamp(checkpoint.path / shard)
        found, found_metadata = read_header(checkpoint.path / shard)
        if found_metadata != metadata:
            raise InputError(f"{checkpoint.path / shard} changed after it was read. Start again")
        rows = [[e.name, e.dtype, e.shape, e.start, e.end] for e in found.values()]
        inputs[shard] = [*stamped, digest([rows, metadata])]
        entries.update(found)
    for name, entry in checkpoint.tensors.items():
        if entries.get(name) != entry:
            raise InputError(f"{checkpoint.path / entry.shard} changed after it was read. Start again")
    return inputs


@contextlib.contextmanager
def _rewritten_tables(structure: Structure, plan: Plan) -> Iterator[dict[str, Piece]]:
    """The tables of experts by token id for the kept experts, in files that last as long as the block; by tensor name.

    Raises:
        InputError: a table names experts that its layer does not have.
        MoecoverError: reading or writing failed.
    """
    found, experts = dict[str, Piece](), structure.topology.num_experts
    with contextlib.ExitStack() as folders:
        with explained(f"reading {structure.checkpoint.name}", left="Nothing was written"):
            folder = Path(folders.enter_context(tempfile.TemporaryDirectory())) if structure.tables else Path()
            for name, table in structure.tables.items():
                ids = remapped(read_table(structure.checkpoint, name, experts), plan.kept[table.layer], experts)
                file, entry = folder / str(len(found)), structure.checkpoint.tensors[name]
                file.write_bytes(ids.tobytes())
                found[name] = Piece(name, entry.dtype, entry.shape, ((0, ids.nbytes),), file)
        yield found


def _write(
    cut: Cut,
    path: Path,
    output: str | Path,
    tables: Mapping[str, Piece],
    *,
    advance: Callable[[int], None],
    say: Callable[[str], None],
) -> None:
    """Write the folder ``path`` (``output`` as the user wrote it); resumes an interrupted run."""
    structure, checkpoint, repaired = cut.structure, cut.structure.checkpoint, cut.repaired
    others = {**(repaired.pieces if repaired is not None else NOTHING), **tables}
    whole = _written(cut.plan, cut.mtp)
    shards = pieces_by_shard(structure, whole.kept, channels=whole.channels, mtp=cut.mtp, others=others)
    with explained(f"reading {checkpoint.name}", left="Nothing was written"):
        config = (checkpoint.path / "config.json").read_text(encoding="utf-8")
        inputs = inputs_of(structure, cut.plan, config, mtp=cut.mtp)
        edited, copies = edited_files(cut, config, shards), copies_of(checkpoint)
    for note in notes_on(copies):
        say(f"note: {note}")
    if cut.mtp == "prune" and structure.mtp and not cut.plan.mtp:
        say(
            "note: the plan does not rate the experts of multi-token-prediction layers: they keep the ids of decoder "
            f"layer {structure.topology.decoder_layers[-1]}"
        )
    if repaired is not None:
        inputs["--repair"] = digest(repaired.manifest())
    with resumable_folder(path, inputs, say=say) as partial:
        if partial.finished:
            say(f"resuming: {len(partial.finished)} of {len(shards)} shards are there")
        check_space(shards, partial, output, path.parent)
        heads = {s: safetensors_head(pieces, checkpoint.shard_metadata[s]) for s, pieces in shards.items()}
        write_shards(checkpoint, shards, heads, partial, advance)
        write_other_files(cut, partial, edited, copies)


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

    The output folder appears only when it is complete: it is filled under a hidden name, flushed to the disk and
    renamed. After an error or an interrupt the finished shards stay; the next call with the same inputs resumes.

    Args:
        structure: the source, from `read_structure`.
        plan: from `plan` or `Plan.load`.
        output: folder to write; must not exist, unless ``overwrite`` is set and this program wrote it.
        overwrite: replace a folder that this program wrote.
        other_weights: accept a plan made on other weights of the same shape (a fine-tuned sibling).
        mtp: what happens to multi-token-prediction layers with experts of their own, which the model's forward pass
            does not run: ``drop`` removes them (and says so in config.json), ``prune`` keeps the plan's own ids for
            them, or those of the last MoE layer's experts and channels where it has none.
        repaired: refitted down projections that replace the source's, from `repairing.store.repair` with the same plan.
        command: the command line that the user typed, for the model card.
        evaluations: evaluations of the plan, by the name used in messages; their numbers go on the model card.
        advance: called with the bytes of every chunk written, and of every shard finished by an earlier run.
        say: called with a line of text when an earlier run is resumed.

    Returns:
        The folder.

    Raises:
        InputError: the plan does not fit, the output exists or another run is writing it, the source changed, settings
            name experts in a way that cannot be renumbered, or a table names experts that its layer does not have.
        MoecoverError: the disk is full or a file cannot be read or written; the message says what was kept.
    """
    path = check_target(structure, output, overwrite=overwrite)
    check_plan(plan, structure, other_weights=other_weights)
    check_mtp(structure, plan.width, mtp)
    changed = (repaired.kind, repaired.merge) if repaired is not None else ()
    repair, merge = (one if one != NONE else None for one in (*changed, NONE, NONE)[:2])
    figures = measured(structure, plan, evaluations, repair, merge) if evaluations else ""
    with locked(path):
        restore(path)
        check_target(structure, output, overwrite=overwrite)  # another run may have finished meanwhile
        cut = Cut(structure, plan, mtp, repaired, command, figures, origin_of(structure))
        with _rewritten_tables(structure, plan) as tables:
            _write(cut, path, output, tables, advance=advance, say=say)
    return path
