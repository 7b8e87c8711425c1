"""A GGUF model of a comparison in llama.cpp: profiles it, and measures plans of it and further files beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from moecover.checkpoints.structure import Structure, read_structure
from moecover.comparison.engines import Repairs, Skips, peak_rss_bytes, processor
from moecover.comparison.jobs import RunFacts
from moecover.corpora.packing import Corpus
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.gguf import evaluate_gguf
from moecover.evaluation.gguf_job import variants_of
from moecover.evaluation.tasks import Tasks
from moecover.llama.model import Model
from moecover.planning.artifact import Plan
from moecover.planning.fitting import check_plan
from moecover.profiling.artifact import Profile
from moecover.profiling.gguf import profile_gguf
from moecover.progress import Silent


class Llama:
    """Runs a GGUF file; see `engines.Engine`.

    Args:
        structure: the file.
        model: it, opened.
        files: paths of further files by name.
        batch_size: sequences between two saves of the state of a profile.
        on_cpu: leave a GPU alone.
    """

    by_layer = False  # mapped from the disk

    def __init__(
        self, structure: Structure, model: Model, files: Mapping[str, Path], batch_size: int, *, on_cpu: bool
    ) -> None:
        self._structure, self._model, self._files = structure, model, files
        self._batch_size, self._on_cpu = batch_size, on_cpu

    def profile(self, corpora: Sequence[Corpus], *, state: Path, keep_inputs: tuple[int, Path] | None) -> Profile:
        """See `Engine`; inputs are kept for methods that a GGUF file is not planned by."""
        assert keep_inputs is None
        return profile_gguf(self._structure, corpora, model=self._model, batch_size=self._batch_size, state=state)

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
        """See `Engine`.

        Raises:
            InputError: a plan does not fit, a file does not load, or numbers that are not finite.
            MoecoverError: llama.cpp gives up.
        """
        import torch

        assert tasks is None
        assert full
        assert not repairs
        assert not skips
        for plan in plans.values():
            check_plan(plan, self._structure, other_weights=True)
        others = {row: read_structure(self._files[name]) for row, name in files.items()}
        with contextlib.ExitStack() as stack:
            variants = variants_of(self._structure, self._model, plans, others, stack, on_cpu=self._on_cpu)
            return evaluate_gguf(variants, texts, plans=plans, threads=torch.get_num_threads(), bar=Silent().bar)

    def facts(self) -> RunFacts:
        """See `Engine`."""
        return {
            "dtype": str(self._structure.quantised),
            "device": "llama.cpp",
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_device_bytes": None,
            "cpu": processor(),
            "layer_by_layer": False,
            "batch_size": None,
        }
