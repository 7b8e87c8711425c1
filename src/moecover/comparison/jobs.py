"""Jobs, reports and the setup of a worker: what passes between the processes of a comparison; data only.

A job is the profile of a calibration sample with all plans made from it (`PlanJob`), the evaluation of some cells of
one model (`EvaluationJob`), or the profile of a model on the texts of its tasks (`TaskProfileJob`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from moecover.comparison.cells import Cell, Sample
from moecover.comparison.config import Config
from moecover.corpora.packing import Corpus
from moecover.corpora.sources import set_folder
from moecover.errors import MoecoverError, is_out_of_memory


@dataclass(frozen=True)
class ModelSetup:
    """A model on this machine, with the texts that its cells are measured on.

    Attributes:
        name: of the model.
        path: its folder, or its first GGUF file.
        files: paths of further GGUF files by name.
        weights: a hash of them.
        limit: bytes of memory that it may use.
        batch_tokens: tokens of the largest forward pass.
        tokens: of the largest set of texts that one pass reads.
        in_parts: tokens and forward passes of all cells in the tasks, see `runtime.cost.cost`.
        extra: bytes of memory that repairs take beside the model.
        texts: for perplexity.
    """

    name: str
    path: Path
    files: Mapping[str, Path]
    weights: str
    limit: int
    batch_tokens: int
    tokens: int
    in_parts: tuple[int, int]
    extra: int
    texts: tuple[Corpus, ...]


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs.

    Attributes:
        run: the run folder.
        config: the comparison.
        models: setups by name of the model.
        threads: of torch in this process; None leaves them as they are.
        device: that cells are computed on.
        marker: a file of the run folder that no other folder has.
    """

    run: Path
    config: Config
    models: Mapping[str, ModelSetup]
    threads: int | None
    device: str
    marker: Path


# ----------------------------------------------------------------------------------------------------------------- jobs
@dataclass(frozen=True)
class PlanJob:
    """Profile a model on a calibration sample, and plan some cells from the profile."""

    model: str
    corpora: tuple[Corpus, ...]
    sample: int
    cells: tuple[Cell, ...]

    @property
    def folder(self) -> str:
        """The profile's folder, relative to the run folder."""
        return f"profiles/{self.model}/{set_folder([c.name for c in self.corpora])}-{self.sample}"


@dataclass(frozen=True)
class EvaluationJob:
    """Evaluate some cells of a model, whose plans exist already.

    Attributes:
        model: its name.
        cells: to evaluate.
        fingerprints: by cell id.
        fitted_on: calibration text of merges, repairs and skipping rules, by sample.
    """

    model: str
    cells: tuple[Cell, ...]
    fingerprints: Mapping[str, str]
    fitted_on: Mapping[Sample, tuple[Corpus, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskProfileJob:
    """Profile a model on the texts of its tasks, to tell afterwards which experts they use."""

    model: str

    @property
    def cells(self) -> tuple[Cell, ...]:
        """None: no cell depends on this profile."""
        return ()

    @property
    def folder(self) -> str:
        """The profile's folder, relative to the run folder."""
        return f"profiles/{self.model}/tasks"


Job = PlanJob | EvaluationJob | TaskProfileJob


# -------------------------------------------------------------------------------------------------------------- reports
@dataclass(frozen=True)
class CellDone:
    """A cell is complete and on disk; ``words`` are its figures in a line of log."""

    cell: Cell
    words: str


@dataclass(frozen=True)
class CellFailed:
    """A cell could not be made."""

    cell: Cell
    reason: str


@dataclass(frozen=True)
class Note:
    """A line of log."""

    line: str


class RunFacts(TypedDict):
    """How a model ran: dtype, device, processor, sequences per forward pass, and the peak memory so far in bytes."""

    dtype: str
    device: str
    peak_rss_bytes: int
    peak_device_bytes: int | None
    cpu: str
    layer_by_layer: bool
    batch_size: int | None  # None in runs of older versions


@dataclass(frozen=True)
class ModelRan:
    """A model ran in a worker."""

    model: str
    facts: RunFacts


def why(error: BaseException) -> str:
    """The reason of a failure in one line."""
    if is_out_of_memory(error):
        return (
            "not enough memory. Give a smaller batch_size, length or window, a smaller dtype, or a memory_limit to run "
            "layer by layer"
        )
    text = " ".join(str(error).split())
    return text if isinstance(error, MoecoverError) else f"{type(error).__name__}: {text}"


Report = CellDone | CellFailed | Note | ModelRan
