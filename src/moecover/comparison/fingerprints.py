"""Fingerprints: hashes of everything that a cell depends on, by which a finished cell is found again.

A cell whose fingerprint has changed is computed again. docs/compare.md lists what enters.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.checkpoints.structure import Structure
from moecover.comparison.cells import Cell
from moecover.comparison.config import UNMERGED, Config
from moecover.comparison.models import ComparedModel
from moecover.comparison.variants import OF_EVERY_METHOD
from moecover.files.atomic import canonical_json, digest, write_text
from moecover.files.hashing import file_hash, sealed, unsealed
from moecover.files.reading import read_json
from moecover.llama.library import Library
from moecover.planning.fitting import channel_groups
from moecover.planning.methods import METHODS
from moecover.progress import Progress
from moecover.runtime.devices import check_device

if TYPE_CHECKING:
    from moecover.evaluation.tasks import Tasks

WEIGHTS = "weights.json"
ShardHashes = dict[str, list[int | str]]  # by shard: what identifies the file, then its hash


def hashed_weights(structure: Structure, before: ShardHashes, progress: Progress) -> ShardHashes:
    """The hash of every shard, all of its bytes.

    Reading all weights takes as long as copying the checkpoint. A hash is therefore taken over for a shard whose size,
    times and inode are the same.

    Args:
        structure: a checkpoint on this machine.
        before: the hashes of an earlier run.
        progress: shows the reading.
    """
    folder, found = structure.checkpoint.path, ShardHashes()
    identities = {shard: _identity(folder / shard) for shard in sorted(structure.checkpoint.shard_metadata)}
    to_read = {shard: one[0] for shard, one in identities.items() if before.get(shard, [])[:-1] != one}
    label = f"{structure.checkpoint.name}: hashing the weights"
    with progress.bar(label, sum(to_read.values()), unit="bytes") if to_read else contextlib.nullcontext() as advance:
        for shard, identity in identities.items():
            if shard not in to_read:
                found[shard] = before[shard]
                continue
            found[shard] = [*identity, file_hash(folder / shard)]
            if advance is not None:
                advance(identity[0])
    return found


def weights_fingerprint(structure: Structure, hashes: ShardHashes) -> str:
    """Hash of every byte of the weights, from `hashed_weights`."""
    return digest([structure.model_fingerprint, {shard: known[-1] for shard, known in hashes.items()}])


def remembered(run: Path) -> dict[str, ShardHashes]:
    """The hashes that earlier runs stored, by model; empty where they cannot be read."""
    try:
        return unsealed(read_json(run / WEIGHTS))
    except (OSError, ValueError):
        return {}


def remember(run: Path, hashes: Mapping[str, ShardHashes]) -> None:
    """Store the hashes of the models for later runs."""
    write_text(run / WEIGHTS, json.dumps(sealed(hashes), indent=1) + "\n")


def _identity(path: Path) -> list[int]:
    """What stays the same of a file while nobody writes to it or replaces it."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def tasks_fingerprint(tasks: Tasks, limit: int | None) -> str:
    """Hash of tasks: their definitions, every document that is scored, and the version of the harness.

    Args:
        tasks: resolved.
        limit: documents per task at most; None for all.
    """
    from importlib.metadata import version

    hasher = hashlib.sha256(json.dumps([version("lm_eval"), tasks.parts, limit]).encode())
    for name, task in sorted(tasks.loaded["tasks"].items()):
        about = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(task.dump_config(), default=str, sort_keys=True))
        hasher.update(f"{name} {about}".encode())
        for document in itertools.islice(task.eval_docs, limit):
            hasher.update(json.dumps(document, default=str, sort_keys=True).encode())
    return hasher.hexdigest()


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
    if model.entry.trust_remote_code:
        code = sorted(model.structure.checkpoint.path.glob("*.py"))
        plugins += [hashlib.sha256(path.read_bytes()).hexdigest() for path in code]
    device = check_device(config.dtype, config.device)
    plan = [cell.file, model.files_weights[cell.file]] if cell.file else _plan_inputs(config, model, cell)
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
    """What the plan of a cell depends on, beside the calibration text; None for a cell without one."""
    variant = cell.variant
    if variant is None:
        return None
    options = variant.plan_options(cell.seed)
    complete = METHODS[variant.method].complete({k: v for k, v in options.items() if k not in OF_EVERY_METHOD})
    known = {k: v for k, v in complete.items() if isinstance(v, (str, int, float, bool, dict, type(None)))}
    found = [variant.method, known | options, cell.keep, config.search_tokens if variant.searches else None]
    if cell.width is not None:
        group = channel_groups(model.structure)
        found.append({"width": cell.width} | ({"group": group} if group > 1 else {}))
    if variant.top_k is not None:
        found.append({"top_k": variant.top_k})
    if cell.repaired:
        found += [cell.repair, _fitted_on(model, cell)]
    if cell.skips:
        found.append({"skip": _fitted_on(model, cell)})
    if cell.merge != UNMERGED:
        found.append({"merge": cell.merge})
    return found


def _fitted_on(model: ComparedModel, cell: Cell) -> int:
    """Tokens of the calibration text that merge, repair or skipping rule are made on."""
    return sum(c.num_tokens for c in model.fitted_on[cell.calibrated_on])


def versions(library: Library | None = None) -> dict[str, str]:
    """Versions of the packages that compute a cell; ``library`` is the llama.cpp that runs a GGUF model."""
    import torch
    import transformers

    from moecover.version import VERSION

    found = {"moecover": VERSION, "torch": torch.__version__, "transformers": transformers.__version__}
    return found if library is None else {**found, "llama.cpp": library.version}
