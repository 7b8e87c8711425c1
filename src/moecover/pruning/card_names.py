"""What a model card calls models, files and the repository: a card is read elsewhere, so no path of this machine."""

from __future__ import annotations

import itertools
import re
import shlex
from typing import TYPE_CHECKING

from moecover.checkpoints.shipped import SHIPPED

if TYPE_CHECKING:
    from moecover.checkpoints.source import Checkpoint
    from moecover.planning.artifact import Plan
    from moecover.pruning.origin import Origin

OWNER = "your-name"  # stands for the owner of the repository, until `upload` knows it
LONGEST = 60  # characters of the model's name in a repository's, which has 96 at most
_PLACEHOLDER = re.compile(rf"{OWNER}/[A-Za-z0-9._-]*[A-Za-z0-9_-]")
_PLACE = re.compile(r"[^=?&]*/[^=?&]*")  # within a word of a command: between the signs around a path


def placeholder(model: str, plan: Plan, *, gguf: bool = False) -> str:
    """A repository id that reads well: the model's name and the shape that is left.

    Args:
        model: name of the original.
        plan: which experts stay.
        gguf: whether the pruned model is a GGUF file.
    """
    name = re.sub(
        r"[^A-Za-z0-9_]*[^A-Za-z0-9_.][^A-Za-z0-9_]*|\.{2,}", "-", model.removeprefix(SHIPPED).removesuffix(".gguf")
    )
    name = name[:LONGEST].strip("-_.") or "model"
    shape = f"{plan.keep}-experts" if plan.width is None else f"{plan.keep}x{plan.width}"
    return f"{OWNER}/{name}-{shape}{'-GGUF' if gguf else ''}"


def with_repository(card: str, repository: str) -> str:
    """The card with the repository's id in place of the placeholder."""
    return _PLACEHOLDER.sub(lambda _: repository, card)


def short_name(name: str) -> str:
    """The last part of a path or id."""
    return name.rstrip("/").rpartition("/")[2] or name


def public_name(checkpoint: Checkpoint | Origin) -> str:
    """The hub id of a model, or the name of its folder or file."""
    return checkpoint.name if checkpoint.revision else short_name(checkpoint.name)


def public_command(command: str, model: str = "") -> str:
    """The command line with the last part of every path; ids of the hub stay.

    Args:
        command: as `shlex.join` writes it; anything else is left out.
        model: the hub id of the source; empty for a folder.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    kept = {model, *(word for option, word in itertools.pairwise(words) if option == "--push-to-hub")}
    return shlex.join(word if word in kept else _PLACE.sub(_last_part, word) for word in words)


def _last_part(place: re.Match[str]) -> str:
    text = place[0]
    if text.startswith("hf:") or "://" in text:
        return text
    attached = re.match(r"-[a-z](?=[/~.])", text)  # -o/tmp/out
    return (attached[0] if attached else "") + short_name(text)
