"""The files that a pruned checkpoint takes over as they are: reads the names in the source's folder.

Left out are weights, what describes the unpruned weights, and symbolic links to files outside the folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moecover.checkpoints.manifest import CARD, MANIFEST
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.weight_files import ADAPTER, OTHER_WEIGHTS, inside

ORIGINAL_CARD = "README.original.md"
# Indices of weights, other programs' descriptions of the same model, and adapters to it.
STALE = re.compile(r".*\.index\.json|(.*/)?(params|original_config|model_index|genai_config|openvino_config)\.json")
STALE_FOLDERS = ("original", "metal", "onnx", "openvino")  # the model in another program's format


@dataclass(frozen=True)
class Copies:
    """What becomes of the files besides weights and settings.

    Attributes:
        copied: relative to the folder, in order.
        weights: files with weights that are not copied, as text.
        stale: files that describe the unpruned weights.
        links: symbolic links to files outside the folder.
    """

    copied: list[Path]
    weights: list[str]
    stale: list[str]
    links: list[str]

    @property
    def left_out(self) -> list[str]:
        """Everything that is not copied."""
        return sorted([*self.weights, *self.stale, *self.links])


def copies_of(checkpoint: Checkpoint) -> Copies:
    """Look through the source's folder, except hidden files and folders and links to folders."""
    found = Copies([], [], [], [])
    skipped = {"config.json", MANIFEST, checkpoint.index_name, *checkpoint.shard_metadata}
    if (checkpoint.path / MANIFEST).is_file():
        skipped.add(CARD)  # written by this program; the original card is README.original.md
    for relative in _files(checkpoint.path):
        name = relative.as_posix()
        if name in skipped:
            continue
        if name.endswith(OTHER_WEIGHTS):
            found.weights.append(name)
        elif _is_stale(relative):
            found.stale.append(name)
        elif not inside(checkpoint.path, checkpoint.path / relative):
            found.links.append(name)
        elif (checkpoint.path / relative).is_file():
            found.copied.append(relative)
    return found


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield (Path(parent) / name).relative_to(folder)


def _is_stale(relative: Path) -> bool:
    name = relative.as_posix()
    return name == ADAPTER or STALE.fullmatch(name) is not None or relative.parts[0] in STALE_FOLDERS


def notes_on(copies: Copies) -> list[str]:
    """Lines on what a user may miss in the output."""
    lines = []
    if copies.links:
        lines.append(
            f"links to files outside the model's folder are not copied: {_some(copies.links)}. "
            "Put the files themselves there if they belong to the model"
        )
    if copies.stale:
        lines.append(f"descriptions of the unpruned weights are not copied: {_some(copies.stale)}")
    return lines


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
