"""What cells cost in memory and time: limits of a worker, cells that share a pass, an estimate for the whole run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moecover.checkpoints.structure import Structure
from moecover.comparison.config import UNMERGED, Config
from moecover.comparison.jobs import ModelSetup
from moecover.comparison.models import ComparedModel
from moecover.comparison.reading import Request
from moecover.errors import arg
from moecover.profiling.wide import num_bytes as wide_bytes
from moecover.repairing.memory import needed_bytes
from moecover.runtime.cost import Cost, cost, seconds_of
from moecover.runtime.devices import available_memory, check_device
from moecover.runtime.memory import parse_size

UNBOUNDED = 10**18  # bytes: what several devices hold is checked when the model is opened
REPAIR_PASSES = 10  # passes over its text that a repair is taken to cost, until one was timed


def memory_limit(config: Config, jobs: int) -> int:
    """Bytes of memory that one of several workers may use."""
    if config.memory_limit is not None:
        return parse_size(config.memory_limit)
    return int(0.9 * available_memory(check_device(config.dtype, config.device)) / jobs)


def setup_of(model: ComparedModel, config: Config, limit: int) -> ModelSetup:
    """What workers need to open a model and to measure its cells; ``limit``: bytes of memory of one worker."""
    texts = [*model.texts, *(corpus for sample in model.samples.values() for corpus in sample)]
    longest = max([corpus.tokens.shape[1] for corpus in texts] + [model.longest])
    passes = [model.texts, *model.samples.values()]
    extra = max((wide_bytes(model.structure, len(sample)) for sample in model.samples.values()), default=0)
    if model.places:
        keep = max(cell.keep for cell in model.cells if cell.repaired)
        tokens = max(sum(c.num_tokens for c in corpora) for corpora in model.fitted_on.values())
        for merge, kind in {(cell.merge, cell.repair) for cell in model.cells if cell.repaired}:
            beside = needed_bytes(
                model.structure, model.places, kind=kind, merge=merge, keep=keep, tokens=tokens, dtype=config.dtype
            )
            extra = max(extra, beside)
    return ModelSetup(
        name=model.name,
        path=_path(model.structure),
        files={name: _path(file) for name, file in model.files.items()},
        weights=model.weights,
        limit=limit,
        batch_tokens=config.batch_size * longest,
        tokens=max(sum(corpus.num_tokens for corpus in corpora) for corpora in passes),
        in_parts=(model.in_tasks[0] * len(model.cells), model.in_tasks[1] * len(model.cells)),
        extra=extra,
        texts=model.texts,
    )


def _path(structure: Structure) -> Path:
    """What opens a model again: its folder, or its first GGUF file."""
    checkpoint = structure.checkpoint
    return checkpoint.path if checkpoint.gguf is None else checkpoint.gguf.first.path


def pass_cost(
    model: ComparedModel, setup: ModelSetup, config: Config, tokens: int, in_parts: tuple[int, int] = (0, 0)
) -> Cost:
    """What a pass of a model takes, see `runtime.cost.cost`."""
    return cost(
        model.structure,
        tokens=tokens,
        batch_tokens=setup.batch_tokens,
        in_parts=in_parts,
        dtype=config.dtype,
        limit=setup.limit if config.device_map is None else UNBOUNDED,
        head=True,
        extra=setup.extra,
    )


def check_fits(request: Request, model: ComparedModel, setup: ModelSetup) -> None:
    """Refuse a model of which not even one layer fits, and tasks that need a model in memory which does not fit.

    Raises:
        InputError: with the line of the limit, or of the tasks.
    """
    if model.entry.gguf:
        return  # mapped from the disk
    found = pass_cost(model, setup, request.config, setup.tokens, setup.in_parts)
    allowed = f"{setup.limit / 1e9:.1f} GB may be used"
    if found.by_layer and model.in_memory:
        text = (
            f"{model.name}: {', '.join(model.in_memory)} needs the model in memory, which does not fit: "
            f"{found.whole / 1e9:.1f} GB of memory are needed, {allowed}. "
            "Leave the task out, or give a larger memory_limit"
        )
        raise request.error(text, "tasks")
    if found.by_layer and found.streamed > setup.limit:
        enough = math.ceil(found.streamed / 1e7) / 100  # in GB, rounded up
        text = (
            f"{model.name}: one layer at a time still needs {enough:.2f} GB of memory, {setup.limit / 1e9:.2f} GB may "
            f"be used. Give a memory_limit of {enough:.2f}GB or more, or fewer {arg('jobs')}"
        )
        raise request.error(text, "memory_limit")


def cells_per_pass(model: ComparedModel, setup: ModelSetup, config: Config) -> int | None:
    """How many cells of a model that runs layer by layer share one read of its weights; None for a model in memory.

    Every cell needs hidden states of its own for all texts, twice, and the repair of one layer.
    """
    if model.entry.gguf:
        return None
    found = pass_cost(model, setup, config, sum(text.num_tokens for text in model.texts))
    if not found.by_layer:
        return None
    refitted = {name for p in model.places for name in (*p.experts, *(p.shared or ())[1:])}
    if any(cell.merge != UNMERGED for cell in model.cells):
        refitted |= {name for name, one in model.structure.tensors.items() if one.routed}
    repairs = sum(e.num_bytes for n, e in model.structure.checkpoint.tensors.items() if n in refitted)
    each = 2 * found.hidden + repairs // max(len(model.places), 1)
    return max(1, int((setup.limit - found.streamed + each) // max(each, 1)))


def estimated_seconds(
    models: Sequence[ComparedModel], setups: Mapping[str, ModelSetup], config: Config
) -> float | None:
    """How long the pending cells take in one worker: from cells that were timed, else from a trial of this machine.

    Returns:
        None where llama.cpp runs a model of which no cell was timed yet: its speed is not estimated.
    """
    if any(model.pending and model.entry.gguf and not model.walls for model in models):
        return None
    return sum(_seconds(model, setups[model.name], config) for model in models if model.pending)


def _seconds(model: ComparedModel, setup: ModelSetup, config: Config) -> float:
    if model.walls:
        return len(model.pending) * sum(model.walls) / len(model.walls)
    device = check_device(config.dtype, config.device)
    passes = [(sum(text.num_tokens for text in model.texts), model.in_tasks)] * len(model.pending)
    passes += [(sum(c.num_tokens for c in sample), (0, 0)) for sample in model.samples.values()]
    passes += [(sum(c.num_tokens for c in model.fitted_on[c.calibrated_on]), (0, 0)) for c in model.pending if c.skips]
    repaired = [model.fitted_on[c.calibrated_on] for c in model.pending if c.repaired]
    passes += [(REPAIR_PASSES * sum(c.num_tokens for c in sample), (0, 0)) for sample in repaired]
    counted = [(pass_cost(model, setup, config, *one), times) for one, times in Counter(passes).items()]
    read = sum(times * found.read for found, times in counted)
    flops = sum(times * found.flops for found, times in counted)
    total = replace(counted[0][0], read=read, flops=flops)  # one trial of the machine for all passes
    return seconds_of(total, model.structure, dtype=config.dtype, device=device)
