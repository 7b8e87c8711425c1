"""Fingerprints: hashes of everything that a cell depends on, by which a finished cell is found again.

A cell whose fingerprint has changed is computed again. docs/compare.md lists what enters.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.checkpoints.structure import Structure
from moecover.comparison.cells import Cell
from moecover.comparison.config import Config
from moecover.comparison.models import ComparedModel
from moecover.comparison.variants import SUPER_EXPERTS
from moecover.files.atomic import canonical_json
from moecover.planning.methods import METHODS
from moecover.runtime.loading import check_device

if TYPE_CHECKING:
    from moecover.evaluation.tasks import Tasks

HEAD_BYTES = 4096  # of every tensor, that enter the fingerprint of the weights


def weights_fingerprint(structure: Structure) -> str:
    """Hash of the first bytes of every tensor, to tell apart weights that share their routers."""
    digest = hashlib.sha256(structure.model_fingerprint.encode())
    files: dict[str, int] = {}
    try:
        for name, entry in sorted(structure.checkpoint.tensors.items()):
            if entry.shard not in files:
                files[entry.shard] = os.open(structure.checkpoint.path / entry.shard, os.O_RDONLY)
            digest.update(name.encode() + os.pread(files[entry.shard], min(entry.num_bytes, HEAD_BYTES), entry.start))
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    return digest.hexdigest()


def tasks_fingerprint(tasks: Tasks, limit: int | None) -> str:
    """Hash of tasks: their definitions, every document that is scored, and the version of the harness.

    Args:
        tasks: resolved.
        limit: documents per task at most; None for all.
    """
    from importlib.metadata import version

    digest = hashlib.sha256(json.dumps([version("lm_eval"), tasks.parts, limit]).encode())
    for name, task in sorted(tasks.loaded["tasks"].items()):
        about = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(task.dump_config(), default=str, sort_keys=True))
        digest.update(f"{name} {about}".encode())
        for document in itertools.islice(task.eval_docs, limit):
            digest.update(json.dumps(document, default=str, sort_keys=True).encode())
    return digest.hexdigest()


def cell_fingerprint(
    config: Config, model: ComparedModel, cell: Cell, tasks: str | None, versions: Mapping[str, str]
) -> str:
    """Hash of everything that a cell depends on.

    Args:
        config: the comparison.
        model: the cell's, with its texts and calibration samples.
        cell: one of its cells.
        tasks: see `tasks_fingerprint`; None without tasks.
        versions: of the packages that compute it, see `versions`.
    """
    corpora = [c.record for c in model.samples[cell.calibrated_on]] if cell.calibration else []
    texts = {text.name: text.record for text in model.texts}
    plugins = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in config.plugins]
    device = check_device(config.dtype, config.device)
    plan = _plan_inputs(config, model, cell)
    value = [
        model.weights,
        plan,
        corpora,
        texts,
        tasks,
        config.batch_size,
        config.dtype,
        device,
        versions,
        plugins,
    ]  # one position each: an added entry changes every fingerprint
    return hashlib.sha256(canonical_json(json.loads(json.dumps(value))).encode()).hexdigest()


def _plan_inputs(config: Config, model: ComparedModel, cell: Cell) -> list[object] | None:
    """What the plan of a cell depends on, beside the calibration text; None for the full model."""
    variant = cell.variant
    if variant is None:
        return None
    options = variant.plan_options(cell.seed)
    complete = METHODS[variant.method].complete({k: v for k, v in options.items() if k != SUPER_EXPERTS})
    known = {k: v for k, v in complete.items() if isinstance(v, (str, int, float, bool, dict, type(None)))}
    found = [variant.method, known | options, cell.keep, config.search_tokens if variant.searches else None]
    if cell.repaired:
        found += [cell.repair, sum(c.num_tokens for c in model.repaired_on[cell.calibrated_on])]
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that compute a cell."""
    import torch
    import transformers

    from moecover.version import VERSION

    return {"moecover": VERSION, "torch": torch.__version__, "transformers": transformers.__version__}
