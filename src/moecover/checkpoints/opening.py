"""A model as users give it: a folder, a hub id or a `Structure`; read first by its headers, fetched when it is needed.

So that a refusal comes before a download: `described` reads configuration and headers only, `fetched` brings the files.
"""

from __future__ import annotations

from pathlib import Path

from moecover import rehearsal
from moecover.checkpoints.source import open_checkpoint
from moecover.checkpoints.structure import Structure, read_structure
from moecover.progress import Progress
from moecover.text import size_text

Model = str | Path | Structure


def described(model: Model, *, revision: str | None = None, progress: Progress) -> Structure:
    """The structure of a model; of a hub model from its headers alone.

    Args:
        model: folder, hub id (``owner/name``), or a structure.
        revision: branch, tag or commit of a hub model.
        progress: shows the reading, and takes the structure's warnings.

    Raises:
        InputError: what `read_structure` raises.
    """
    if isinstance(model, Structure):
        return model
    with progress.spinner(f"reading {model}"):
        structure = read_structure(open_checkpoint(model, revision=revision, headers_only=True))
    for warning in structure.warnings:
        progress.say(f"note: {warning}")
    return structure


def fetched(structure: Structure, *, revision: str | None = None, progress: Progress) -> Structure:
    """The structure with its files on this machine, downloaded if they are not.

    Raises:
        InputError: the hub does not give them.
    """
    checkpoint = structure.checkpoint
    if checkpoint.folder is not None:
        return structure
    rehearsal.ahead("read", f"{checkpoint.name}, from the hub", num_bytes=checkpoint.num_bytes)
    rehearsal.ahead("run", "what follows, once its files are here")
    rehearsal.stop()
    progress.say(f"fetching {checkpoint.name}, {size_text(checkpoint.num_bytes)}")
    return read_structure(checkpoint.name, revision=revision or checkpoint.revision)
