"""Held-out blocks of calibration text: reads a profile's records of its corpora, gives the blocks it did not use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moecover.corpora.grammar import HUB, with_options
from moecover.corpora.sources import CORPORA
from moecover.errors import InputError, arg

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure
    from moecover.corpora.packing import Corpus
    from moecover.profiling.artifact import Profile

BLOCKS = 64  # held-out blocks of every corpus


def check_held_out(
    corpora: Mapping[str, Sequence[Mapping[str, Any]]], files: Mapping[str, str | None]
) -> dict[str, str | None]:
    """Where the calibration corpora of a profile can be read again, for the blocks that it did not use.

    Args:
        corpora: records by name, see `Profile.corpora`.
        files: by name, the files that the user gave.

    Returns:
        The file, or another source, of every corpus; None for a named one as it is.

    Raises:
        InputError: a corpus of several samples, one whose blocks were all used, or a file that was not given.
    """
    if unknown := [name for name in files if name not in corpora]:
        raise InputError(f"{arg('corpora', unknown[0])} is none of the profile's: {', '.join(corpora)}")
    return {name: _file_of(name, records, files.get(name)) for name, records in corpora.items()}


def _file_of(name: str, records: Sequence[Mapping[str, Any]], file: str | None) -> str | None:
    """The source of one corpus, None for a named one as it is; refused where no unused blocks are known."""
    record = records[0]
    remedy = f"Give held-out text as {arg('texts', 'NAME[=PATH]')}"
    if len(records) > 1 or "rows" in record or "seed" not in record:
        raise InputError(
            f"the profile's corpus {name} is not one sample of one text, so its unused blocks are not known. {remedy}"
        )
    if record.get("blocks_available", 0) <= record["sequences"]:
        raise InputError(
            f"the profile took all {record['sequences']} blocks of {name}, none is left to measure on. "
            f"{remedy}, or make the profile with fewer {arg('sequences')}"
        )
    for known in [name] if name in CORPORA else [] if file else CORPORA:
        if record["source"] == CORPORA[known].source(known):
            options = {key: record[key] for key in ("text", "n", "parse_special") if key in record}
            return with_options(known, options, f"corpus {name}") if options or known != name else None
    if record["source"].startswith(HUB):
        return str(record["source"])
    if not file:
        raise InputError(
            f"the profile read {name} from the file {record['source']}: give it as {arg('corpora', f'{name}=PATH')}, "
            f"for the blocks that it did not use, or held-out text as {arg('texts', 'NAME[=PATH]')}"
        )
    return file


def held_out(
    profile: Profile, files: Mapping[str, str | None], structure: Structure, *, blocks: int = BLOCKS
) -> list[Corpus]:
    """Blocks of every calibration corpus that the profile did not use, see `load_unused`.

    Args:
        profile: names the text that it used.
        files: from `check_held_out`.
        structure: the model.
        blocks: of each corpus at most.
    """
    from moecover.corpora.packing import load_unused

    return [
        load_unused(name, path, profile.corpora[name][0], structure=structure, blocks=blocks)
        for name, path in files.items()
    ]
