"""A worker of a comparison on a machine of a cluster: refuses a machine that would not give the cells asked for.

Works in the run folder where the machine sees it; else in a temporary copy of what a job reads, which arrives before
the job, and gives what the job writes as pieces among its reports.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from moecover.checkpoints.remote_code import trust_remote_code
from moecover.checkpoints.shipped import where_is
from moecover.checkpoints.structure import read_structure
from moecover.comparison.config import Config, ModelEntry
from moecover.comparison.fingerprints import hashed_weights, weights_fingerprint
from moecover.comparison.jobs import CellDone, Job, ModelSetup, Report, WorkerSetup
from moecover.comparison.shipping import Arrivals, Piece, of_cell, pieces, written_by
from moecover.comparison.worker import worker
from moecover.errors import InputError, MoecoverError
from moecover.files.locks import claim
from moecover.progress import resolve
from moecover.runtime.devices import check_device


@dataclass
class RemoteWorker:
    """Handles jobs on this machine.

    Attributes:
        setup: of the worker, as this machine has it.
        handle: does a job in the folder of the setup.
        copies: whether that folder is a copy.
    """

    setup: WorkerSetup
    handle: Callable[[Job], Iterator[Report]]
    copies: bool
    _arrivals: Arrivals = field(init=False)
    _checked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._arrivals = Arrivals(self.setup.run)

    def receive(self, piece: Piece) -> None:
        """Take a piece of what the next job reads."""
        self._arrivals.take(piece)

    def do(self, job: Job) -> Iterator[Report | Piece]:
        """The reports on a job; those of a cell follow the pieces of its files.

        Raises:
            MoecoverError: the model has other weights here, or the disk is full.
        """
        if not self.copies:
            yield from self.handle(job)
            return
        self._check_weights(job.model)
        run = self.setup.run
        for report in self.handle(job):
            if isinstance(report, CellDone):
                yield from pieces(run, of_cell(report.cell))
            yield report
        yield from pieces(run, written_by(job))
        for part in run.iterdir():
            shutil.rmtree(part)

    def _check_weights(self, name: str) -> None:
        """Refuse other weights than those of the machine of the command; all of them are read once."""
        if name in self._checked:
            return
        structure = read_structure(self.setup.models[name].path)
        found = weights_fingerprint(structure, hashed_weights(structure, {}, resolve(False)))
        if found != self.setup.models[name].weights:
            raise MoecoverError(
                f"{platform.node()} has other weights of {name} than the machine of the command, in "
                f"{structure.checkpoint.path}. Give all machines the same files"
            )
        self._checked.add(name)


@contextlib.contextmanager
def remote_worker(setup: WorkerSetup) -> Iterator[RemoteWorker]:
    """A worker on this machine of a cluster.

    Args:
        setup: from the machine of the command.

    Raises:
        MoecoverError: this machine computes on another device, or does not see a model or a file of the configuration.
    """
    config, machine = setup.config, platform.node()
    if (device := check_device(config.dtype, config.device)) != setup.device:
        raise MoecoverError(
            f"{machine} computes on {device}, the machine of the command on {setup.device}. "
            "Run the command on a machine like the workers', or give the device"
        )
    _check_files(config, machine)
    models = {entry.name: _reached(entry, setup.models[entry.name], machine) for entry in config.models}
    mine, sees = replace(setup, models=models), setup.marker.is_file()
    with contextlib.ExitStack() as stack:
        if not sees:
            mine = replace(mine, run=stack.enter_context(_copy()))
        yield RemoteWorker(mine, stack.enter_context(worker(mine)), copies=not sees)


def _check_files(config: Config, machine: str) -> None:
    """Refuse a machine without the files that a configuration names, beside models and text."""
    for path in (config.data_dir, config.include_path, config.libllama, *config.plugins):
        if path is not None and not Path(path).exists():
            raise MoecoverError(f"{machine} does not see {path}. Give all machines the same paths")


def _reached(entry: ModelEntry, setup: ModelSetup, machine: str) -> ModelSetup:
    """The setup of a model with its place on this machine: the same path, or what its name leads to here."""
    for file in setup.files.values():
        if not file.exists():
            raise MoecoverError(f"{machine} does not see {file}. Give all machines the same paths")
    if setup.path.exists():
        return setup
    source = where_is(entry.model)
    try:
        if entry.trust_remote_code:
            trust_remote_code(source, revision=entry.revision)
        found = read_structure(source, revision=entry.revision)
    except InputError as error:
        raise MoecoverError(f"{machine} does not see the model {entry.name}: {error}") from error
    return replace(setup, path=found.checkpoint.path)


@contextlib.contextmanager
def _copy() -> Iterator[Path]:
    """An empty temporary folder, with a lock beside it; folders that killed workers have left are removed."""
    place, ending = Path(tempfile.gettempdir()), ".lock"
    prefix = f"moecover-run-{os.getuid()}-"
    for file in place.glob(f"{prefix}*{ending}"):
        if (give_back := claim(file)) is not None:
            shutil.rmtree(file.with_suffix(""), ignore_errors=True)
            file.unlink(missing_ok=True)
            give_back()
    folder = place / f"{prefix}{uuid.uuid4().hex}"
    while (give_back := claim(lock := folder.with_suffix(ending))) is None:  # another worker clears up
        folder = place / f"{prefix}{uuid.uuid4().hex}"
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
        give_back()
