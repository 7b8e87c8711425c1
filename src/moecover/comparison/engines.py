"""What runs a model of a comparison, one small interface for both formats: `Engine`, and that of transformers.

Reads corpora, plans, texts and tasks; gives profiles and evaluations. That of llama.cpp is in `llama_engine`.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from moecover.checkpoints.structure import Structure
from moecover.comparison.jobs import RunFacts
from moecover.corpora.packing import Corpus
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.run import evaluate
from moecover.evaluation.skipping import Skipping
from moecover.evaluation.tasks import Tasks
from moecover.planning.artifact import Plan
from moecover.profiling.artifact import Profile
from moecover.profiling.run import profile
from moecover.repairing.applied import LayerRepair
from moecover.runtime.devices import name_of, peak_memory
from moecover.runtime.running import Running

Repairs = Mapping[str, Callable[[int], LayerRepair]]  # by row, what gives the repair of a MoE layer

Skips = Mapping[str, Skipping]  # by row, the rule by which tokens skip experts


class Engine(Protocol):
    """Runs one model."""

    @property
    def by_layer(self) -> bool:
        """Whether the model does not fit into memory, so that variants share a read of its weights."""

    def profile(self, corpora: Sequence[Corpus], *, state: Path, keep_inputs: tuple[int, Path] | None) -> Profile:
        """A profile.

        Args:
            corpora: calibration text.
            state: folder for the state from which an interrupted pass resumes.
            keep_inputs: tokens and folder of the expert layers' inputs, for methods that run the experts.
        """

    def evaluate(
        self,
        plans: Mapping[str, Plan],
        *,
        files: Mapping[str, str],
        repairs: Repairs,
        skips: Skips,
        texts: Sequence[Corpus] = (),
        tasks: Tasks | None = None,
        full: bool = True,
    ) -> Evaluation:
        """The figures of the model itself and of rows beside it.

        Args:
            plans: by row, to be emulated.
            files: name of a further file by row.
            repairs: of plans that are repaired.
            skips: of plans whose tokens skip experts.
            texts: held-out text.
            tasks: benchmarks; None for none.
            full: whether the model itself is a row too; it always is on texts.
        """

    def facts(self) -> RunFacts:
        """How the model runs in this process."""


class Transformers:
    """Runs a checkpoint.

    Args:
        structure: the checkpoint.
        running: it, opened.
        batch_size: sequences per forward pass.
    """

    def __init__(self, structure: Structure, running: Running, batch_size: int) -> None:
        self._structure, self.running, self._batch_size = structure, running, batch_size

    @property
    def by_layer(self) -> bool:
        """See `Engine`."""
        return self.running.by_layer

    def profile(self, corpora: Sequence[Corpus], *, state: Path, keep_inputs: tuple[int, Path] | None) -> Profile:
        """See `Engine`."""
        return profile(
            self._structure,
            corpora,
            model=self.running,
            batch_size=self._batch_size,
            state=state,
            keep_inputs=keep_inputs,
        )

    def evaluate(
        self,
        plans: Mapping[str, Plan],
        *,
        files: Mapping[str, str],
        repairs: Repairs,
        skips: Skips,
        texts: Sequence[Corpus] = (),
        tasks: Tasks | None = None,
        full: bool = True,
    ) -> Evaluation:
        """See `Engine`; a checkpoint has no further files."""
        assert not files
        return evaluate(
            self._structure,
            plans,
            model=self.running,
            texts=texts,
            tasks=tasks,
            full=full,
            repairs=repairs,
            skips=skips,
            batch_size=self._batch_size,
        )

    def facts(self) -> RunFacts:
        """See `Engine`."""
        device = self.running.device
        return {
            "dtype": str(self.running.dtype).removeprefix("torch."),
            "device": name_of(device),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_device_bytes": peak_memory(device),
            "cpu": processor(),
            "layer_by_layer": self.by_layer,
            "batch_size": self._batch_size,
        }


def peak_rss_bytes() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@functools.cache
def processor() -> str:
    """Name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
