"""Stage 4, GGUF: reads a GGUF model and a plan, writes the pruned GGUF model, as many parts as the source has.

The byte ranges of the kept experts are copied, whatever the type of their blocks; in the header the number of experts
changes, and ``moecover.*`` keys say what was kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moecover.checkpoints.pieces import NOTHING, Piece, pieces_by_shard
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, arg
from moecover.files.atomic import digest, explained, resolved, stamp, write_text
from moecover.files.gathering import ZEROS, Gather
from moecover.files.locks import locked
from moecover.files.reading import parse_json
from moecover.files.resumable import resumable_files, returned
from moecover.gguf.header import Header, read_header
from moecover.gguf.parts import GgufFiles, is_gguf, part_name, stem_of
from moecover.gguf.writing import head_bytes, padding
from moecover.planning.artifact import LayerPlan, Plan, kept_sets
from moecover.planning.fitting import check_plan
from moecover.pruning.card import model_card
from moecover.pruning.card_header import TAGS
from moecover.pruning.card_names import short_name
from moecover.pruning.card_numbers import Measurement, measured
from moecover.pruning.shards import check_space, write_shards
from moecover.version import VERSION

KEPT = "moecover.kept"  # JSON: for every MoE layer its decoder layer and the ids that it kept
CARD_ENDING = ".md"
OF_PLAN = ("method", "options", "model", "profile_fingerprint")  # what of a plan is recorded besides


def provenance(structure: Structure, plan: Plan) -> dict[str, int | str]:
    """The keys that say where a pruned file comes from; equal inputs give equal bytes."""
    about = {name: value for name in OF_PLAN if (value := getattr(plan, name))}
    if plan.model:
        about["model"] = short_name(plan.model)  # a path of this machine does not travel with the file
    return {
        "moecover.version": VERSION,
        "moecover.source.name": Path(structure.checkpoint.name).name,
        "moecover.source.expert_count": structure.topology.num_experts,
        "moecover.plan": json.dumps(about, sort_keys=True),
        KEPT: json.dumps(kept_sets(plan), separators=(",", ":")),
    }


def output_names(structure: Structure, output: Path) -> dict[str, str]:
    """The names of the output's files, in order, by those of the source: of a split model every part has one.

    Raises:
        InputError: the output is not named as a GGUF file.
    """
    shards = list(structure.checkpoint.shard_metadata)
    if not is_gguf(output):
        raise InputError(f"the output {output} does not end in .gguf: {structure.checkpoint.name} is a GGUF file")
    if len(shards) == 1:
        return {shards[0]: output.name}
    return {shard: part_name(stem_of(output), number, len(shards)) for number, shard in enumerate(shards)}


def gguf_target(structure: Structure, output: str | Path) -> Path:
    """The resolved first file of the output.

    Raises:
        InputError: it is not named as a GGUF file, or is a file of the source.
    """
    path, checkpoint = resolved(output), structure.checkpoint
    files = [path.with_name(name) for name in output_names(structure, path).values()]
    sources = {(checkpoint.path / shard).resolve() for shard in checkpoint.shard_metadata}
    if any(file.resolve() in sources for file in files):
        raise InputError(f"the output {output} and the model {checkpoint.name} overlap. Choose another name")
    return files[0]


def check_replaceable(first: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Refuse to replace a file, unless it may be overwritten and this program wrote it.

    Raises:
        InputError: names the file.
    """
    for file in (path for name in names if (path := first.with_name(name)).exists()):
        if not overwrite:
            raise InputError(f"{file} exists. Choose another output, or give {arg('overwrite')}")
        if not file.is_file() or not _is_ours(file, first):
            raise InputError(f"{file} was not written by moecover, so it is not overwritten. Choose another output")


def _check_card(card: Path) -> None:
    """Refuse to replace a text that is no card of this program.

    Raises:
        InputError: names the file.
    """
    if card.exists() and not (card.is_file() and TAGS[-1].encode() in card.read_bytes()[:1000]):
        raise InputError(
            f"{card}, the place of the model card, exists and is no card of moecover, so it is not overwritten. Choose "
            "another output"
        )


def _is_ours(file: Path, first: Path) -> bool:
    """Whether this program wrote a file; of a split model only the first part says so."""
    try:
        read = {name: read_header(name) for name in {file, first} if name.is_file()}
    except InputError:
        return False
    return file in read and any(KEPT in header.fields for header in read.values())


def new_numbers(structure: Structure, plan: Plan) -> dict[str, int]:
    """The integers of the header that a plan changes, by key."""
    numbers = {f"{structure.topology.family}.expert_count": plan.keep}
    if plan.width is not None and not isinstance(structure.width, str):
        numbers |= {key: plan.width for path in structure.width.keys for key in path}
    return numbers


@dataclass(frozen=True)
class Expected:
    """The files that a plan leaves, before any is written.

    Attributes:
        shards: tensors by the source's file; the padding behind each is part of it.
        heads: what precedes the tensor data, by the source's file.
    """

    shards: dict[str, list[Piece]]
    heads: dict[str, bytes]


def expected_files(structure: Structure, files: GgufFiles, plan: Plan) -> Expected:
    """What the files of a pruned model are made of."""
    pieces = pieces_by_shard(structure, plan.kept, channels=plan.channels)
    changed = new_numbers(structure, plan)
    heads, shards = dict[str, bytes](), dict[str, list[Piece]]()
    for part in files.parts:
        remaining = _in_order(part, pieces.get(part.path.name, []))
        about = provenance(structure, plan) if part is files.first else {}
        tensors = [(p.name, p.dtype, p.shape, p.num_bytes) for p in remaining]
        numbers = {key: value for key, value in changed.items() if key in part.fields}
        heads[part.path.name] = head_bytes(part, tensors, numbers=numbers, added=about)
        shards[part.path.name] = [_padded(p, part.alignment) for p in remaining]
    return Expected(shards, heads)


def _in_order(part: Header, pieces: Sequence[Piece]) -> list[Piece]:
    """The tensors in the order of the header, in which llama.cpp requires their data."""
    by_name = {p.name: p for p in pieces}
    return [by_name[name] for name in part.tensors]


def _padded(piece: Piece, alignment: int) -> Piece:
    """A tensor with zeros behind it up to the alignment."""
    if not (missing := padding(piece.num_bytes, alignment)):
        return piece
    first = piece.ranges[0]
    start = first.start if isinstance(first, Gather) else first[0]
    zeros = Gather(start, start + 1, 1, 1, (ZEROS,) * missing)
    return Piece(piece.name, piece.dtype, piece.shape, (*piece.ranges, zeros), piece.file)


def _inputs(structure: Structure, files: GgufFiles, plan: Plan) -> dict[str, object]:
    """Everything that determines the bytes of the output, by the name used in messages.

    Raises:
        InputError: a file changed since the structure was read.
    """
    inputs: dict[str, object] = {"the version of moecover": VERSION, "the plan": digest(provenance(structure, plan))}
    for part in files.parts:
        stamped = stamp(part.path)
        if not part.is_unchanged():
            raise InputError(f"{part.path} changed after it was read. Start again")
        inputs[part.path.name] = stamped
    return inputs


def prune_gguf(
    structure: Structure,
    plan: Plan,
    output: str | Path,
    *,
    overwrite: bool = False,
    evaluations: Mapping[str, Measurement] = NOTHING,
    command: str = "",
    advance: Callable[[int], None] = lambda num_bytes: None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the GGUF model that a plan leaves, and its model card beside it, NAME.md.

    The files appear only when all are complete: they are written in a hidden folder beside the output, flushed to the
    disk and renamed, the first part last. After an error the finished parts stay; the same call resumes.

    Args:
        structure: the source, a GGUF model.
        plan: made on the original checkpoint, or on any file converted from it.
        output: file to write; of a split model the first part or its name without the number.
        overwrite: replace files that this program wrote.
        evaluations: by a name for messages, evaluations of the plan whose numbers go on the card.
        command: what the user typed, for the card.
        advance: called with the bytes of every chunk written.
        say: called with a line of text when an earlier run is resumed.

    Returns:
        The first file.

    Raises:
        InputError: the plan does not fit, the output exists or another run is writing it, or the source changed.
        MoecoverError: the disk is full, or a file cannot be read or written.
    """
    files = structure.checkpoint.gguf
    assert files is not None
    check_plan(plan, structure)
    first = gguf_target(structure, output)
    names = output_names(structure, first)
    figures = measured(structure, plan, evaluations) if evaluations else ""
    card = first.with_name(stem_of(first) + CARD_ENDING)
    about = model_card(
        structure, plan, repaired=None, command=command, original_card="", figures=figures, output=first.name
    )
    with locked(first):
        returned(first, list(names.values()))
        check_replaceable(first, list(names.values()), overwrite=overwrite)
        _check_card(card)
        card.unlink(missing_ok=True)  # written last: where it stands, the files beside it are complete
        with explained(f"reading {structure.checkpoint.name}", left="Nothing was written"):
            inputs = _inputs(structure, files, plan)
        expected = expected_files(structure, files, plan)
        with resumable_files(first, list(names.values()), inputs, say=say) as partial:
            if partial.finished:
                say(f"resuming: {len(partial.finished)} of {len(names)} files are there")
            check_space(expected.shards, partial, output, first.parent, names=names)
            write_shards(structure.checkpoint, expected.shards, expected.heads, partial, advance, names=names)
        write_text(card, about)
    return first


def plan_in(files: GgufFiles) -> Plan:
    """What a pruned model kept, from its keys.

    Raises:
        InputError: it was not written by `prune_gguf`, or the keys are damaged.
    """
    first = files.first
    if (text := first.text(KEPT)) is None:
        raise InputError(f"{first.path} has no {KEPT}: it was not written by `moecover prune`")
    try:
        rows = [dict(zip(("decoder_layer", "kept", "channels"), row, strict=False)) for row in parse_json(text)]
        layers = [LayerPlan.model_validate(row) for row in rows]
        width = len(layers[0].channels[0]) if layers[0].channels else None
        return Plan(schema=1, keep=len(layers[0].kept), width=width, layers=layers)
    except (ValueError, TypeError, IndexError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{first.path}: {KEPT} is damaged: {reason}. Prune again") from error
