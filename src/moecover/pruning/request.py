"""What `prune` is asked for, and what it returns; no work here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from moecover.merging.method import NONE
from moecover.planning.artifact import Plan
from moecover.runtime.world import ALONE, World
from moecover.text import Cell, Shown, size_text

if TYPE_CHECKING:
    from moecover.checkpoints.topology import Topology
    from moecover.corpora.loading import Corpora
    from moecover.corpora.options import JobOptions
    from moecover.pruning.card_numbers import Measurement
    from moecover.repairing.artifact import Repaired
    from moecover.runtime.passes import Passes


class WriteOptions(TypedDict, total=False):
    """Keyword arguments on how the checkpoint is written.

    Attributes:
        overwrite: replace a folder that moecover wrote.
        other_weights: accept a plan made on other weights of the same shape.
        mtp: multi-token-prediction layers with experts of their own: ``drop`` (default), or ``prune`` them by the
            plan's own ids for them, of experts and channels, or those of the last MoE layer where it has none.
        evaluations: by a name for messages, evaluations of the plan whose numbers go on the model card.
        command: what the user typed, for the model card.
    """

    overwrite: bool
    other_weights: bool
    mtp: str
    evaluations: Mapping[str, Measurement]
    command: str


@dataclass(frozen=True)
class Choice:
    """How one shot chooses: method, its options, experts per layer, channels of each, and where the profile goes."""

    method: str
    options: Mapping[str, Any]
    keep: int
    width: int | None = None
    profile_folder: Path | None = None
    search_tokens: int | None = None


@dataclass(frozen=True)
class Repair:
    """The repair that is asked for: its kind, calibration tokens (None for the default), and the merge before it.

    One of ``kind`` and ``merge`` may be ``none``.
    """

    kind: str
    tokens: int | None = None
    merge: str = NONE


@dataclass(frozen=True)
class Request:
    """What one call of `prune` asks for.

    Attributes:
        output: folder or file to write.
        choice: a plan, or how one is made from the corpora.
        corpora: calibration text, where something is made from it.
        text: how much of it.
        repair: what to repair, a finished repair, or None.
        how: see `Passes`; None where no model runs.
        writing: see `WriteOptions`.
        top_k: experts that a token is sent to; None for the plan's number.
        here: this process among those that share the work.
    """

    output: Path
    choice: Plan | Choice
    corpora: Corpora | None
    text: JobOptions
    repair: Repair | Repaired | None
    how: Passes | None
    writing: WriteOptions
    top_k: int | None = None
    here: World = ALONE


@dataclass(frozen=True, repr=False)
class Pruned(Shown):
    """What was written; stands for its path wherever one is expected.

    Attributes:
        output: folder of the checkpoint, or its first GGUF file.
        plan: which experts stayed.
        topology: of the source.
        bytes_before: of all tensors of the source.
        num_bytes: of all tensors of the checkpoint.
        repaired: the repair, None without one.
    """

    output: Path
    plan: Plan
    topology: Topology
    bytes_before: int
    num_bytes: int
    repaired: Repaired | None = None

    def __fspath__(self) -> str:
        return str(self.output)

    def __truediv__(self, name: str) -> Path:
        return self.output / name

    def sizes(self) -> str:
        """What became of experts and bytes."""
        share = self.num_bytes / self.bytes_before
        sizes = f"{size_text(self.bytes_before)} -> {size_text(self.num_bytes)} ({share:.0%})"
        thin = "" if self.plan.width is None else f" with {self.plan.width} channels each"
        fewer = "" if self.plan.top_k is None else f", {self.plan.top_k} instead of {self.topology.top_k} a token"
        return f"{self.plan.keep} of {self.topology.num_experts} experts per layer{thin}{fewer}, {sizes}"

    def summary(self) -> str:
        """See `Shown`."""
        return f"{self.output}: {self.sizes()}"

    def rows_shown(self) -> list[dict[str, Cell]]:
        """See `Shown`: the source, and what was written."""
        width = self.plan.width
        whole: dict[str, Cell] = {} if width is None else {"channels of each": "all"}
        thin: dict[str, Cell] = {} if width is None else {"channels of each": width}
        experts, before, after = self.topology.num_experts, size_text(self.bytes_before), size_text(self.num_bytes)
        return [
            {"": "source", "experts per layer": experts, **whole, "size": before},
            {"": str(self.output), "experts per layer": self.plan.keep, **thin, "size": after},
        ]
