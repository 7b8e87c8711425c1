"""Which writer serves a model: reads the format of its files, and refuses what that format has no place for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from moecover.checkpoints.pieces import NOTHING
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, arg
from moecover.planning.artifact import Plan
from moecover.pruning.gguf_writer import gguf_target, prune_gguf
from moecover.pruning.writer import check_target, prune

if TYPE_CHECKING:
    from moecover.pruning.request import WriteOptions
    from moecover.repairing.artifact import Repaired

NO_PLACE = {
    "other_weights": "the weights of a GGUF file are never compared with those that the plan was made on",
}


def output_of(structure: Structure, output: Path, *, overwrite: bool) -> Path:
    """The resolved output, a folder or a file; refused where it cannot be written.

    Raises:
        InputError: what the format's writer refuses.
    """
    if structure.checkpoint.gguf is not None:
        return gguf_target(structure, output)
    return check_target(structure, output, overwrite=overwrite)


def write(
    structure: Structure,
    plan: Plan,
    output: Path,
    *,
    repaired: Repaired | None,
    advance: Callable[[int], None],
    say: Callable[[str], None],
    **options: Unpack[WriteOptions],
) -> Path:
    """Write the pruned model in the format of its source; see `writer.prune` and `gguf_writer.prune_gguf`.

    Raises:
        InputError: an option that has no use for the format, or what the writer refuses.
        MoecoverError: the disk is full, or a file cannot be read or written.
    """
    if structure.checkpoint.gguf is None:
        return prune(structure, plan, output, repaired=repaired, advance=advance, say=say, **options)
    if repaired is not None:
        raise InputError(f"{arg('repaired')} has no use here: repair the original, then convert the result to GGUF")
    for name, why in NO_PLACE.items():
        if options.get(name):
            raise InputError(f"{arg(name)} has no use here: {why}")
    return prune_gguf(
        structure,
        plan,
        output,
        overwrite=options.get("overwrite", False),
        evaluations=options.get("evaluations", NOTHING),
        command=options.get("command", ""),
        advance=advance,
        say=say,
    )
