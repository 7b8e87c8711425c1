"""The model that a worker holds: opened when a job first needs it, closed when a job asks for another one."""

from __future__ import annotations

import contextlib
from pathlib import Path

from moecover.checkpoints.structure import Structure, read_structure
from moecover.comparison.config import Config
from moecover.comparison.engines import Engine, Transformers
from moecover.comparison.jobs import ModelSetup, WorkerSetup
from moecover.comparison.llama_engine import Llama
from moecover.corpora.tokenizer import load_tokenizer
from moecover.evaluation.task_loading import resolve
from moecover.evaluation.tasks import Tasks
from moecover.llama.library import load
from moecover.llama.model import opened as opened_gguf
from moecover.runtime.memory import opened, parse_size
from moecover.runtime.passes import checked_map
from moecover.runtime.running import Running


class OpenModel:
    """At most one model at a time, with its structure and tasks; all of them by the model's name.

    Args:
        setup: of the worker.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup, self._name = setup, ""
        self._stack = contextlib.ExitStack()
        self._failure: Exception | None = None
        self._engine: Engine | None = None
        self._tasks: Tasks | None = None
        self._structure: Structure | None = None

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.setup.run

    @property
    def config(self) -> Config:
        return self.setup.config

    def setup_of(self, name: str) -> ModelSetup:
        """The setup of a model."""
        return self.setup.models[name]

    def structure(self, name: str) -> Structure:
        """The checkpoint of a model, headers only."""
        if name != self._name:
            self.close()
            self._name, self._failure = name, None
            self._structure = read_structure(self.setup_of(name).path)
        assert self._structure is not None
        return self._structure

    def engine(self, name: str) -> Engine:
        """What runs the model.

        Raises:
            Exception: what loading it raised, again for every cell that asks.
        """
        structure = self.structure(name)
        if self._failure is not None:
            raise self._failure
        if self._engine is None:
            try:
                self._engine = self._opened(structure, self.setup_of(name))
            except Exception as error:
                self._failure = error
                raise
        return self._engine

    def running(self, name: str) -> Running:
        """The live model of a checkpoint, for what runs its experts; as `engine`."""
        engine = self.engine(name)
        assert isinstance(engine, Transformers)
        return engine.running

    def _opened(self, structure: Structure, setup: ModelSetup) -> Engine:
        batch_size = self.config.batch_size
        if structure.checkpoint.gguf is not None:
            on_cpu, library = self.config.device == "cpu", load(self.config.libllama)
            model = self._stack.enter_context(opened_gguf(setup.path, library, on_cpu=on_cpu))
            return Llama(structure, model, setup.files, batch_size, on_cpu=on_cpu)
        limit: int | None = setup.limit
        if self.config.device_map is not None:  # of every device
            limit = None if self.config.memory_limit is None else parse_size(self.config.memory_limit)
        opening = opened(
            structure,
            tokens=setup.tokens,
            batch_tokens=setup.batch_tokens,
            in_parts=setup.in_parts,
            dtype=self.config.dtype,
            device=self.config.device,
            device_map=checked_map(self.config.device_map, None),
            memory_limit=limit,
            head=True,
            extra=setup.extra,
        )
        return Transformers(structure, self._stack.enter_context(opening), batch_size)

    @property
    def in_memory(self) -> bool:
        """Whether a model is loaded and in memory as a whole."""
        return self._engine is not None and not self._engine.by_layer

    def tasks(self, name: str) -> Tasks | None:
        """The tasks in the tokens of a model, None if the comparison has none."""
        structure = self.structure(name)
        if self._tasks is None and self.config.tasks:
            self._tasks = tasks_of(self.config, structure)
        return self._tasks

    def close(self) -> None:
        """Free the model."""
        self._engine = self._tasks = None
        self._stack.close()


def tasks_of(config: Config, structure: Structure) -> Tasks:
    """The tasks of a comparison in the tokens of a model.

    Raises:
        InputError: an unknown task, or its documents are missing.
    """
    return resolve(
        config.tasks,
        tokenizer=load_tokenizer(structure.checkpoint.path),
        data_dir=None if config.data_dir is None else Path(config.data_dir),
        include_path=None if config.include_path is None else Path(config.include_path),
        limit=config.limit,
        batch_size=config.batch_size,
    )
