"""What is used of lm-evaluation-harness: the index of its tasks, its requests, and silence while it works.

The harness is optional (extra ``tasks``) and untyped: the protocols here name the parts that are used.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

from moecover.errors import InputError, arg


class Request(Protocol):
    """A request of a task to a model; of ``args``, the strings are what the model reads."""

    args: tuple[Any, ...]
    doc: Mapping[str, Any]
    doc_id: int
    task_name: str
    repeats: int


class HarnessTask(Protocol):
    """One task of the harness; ``instances`` are the requests of `build_all_requests`."""

    OUTPUT_TYPE: str
    multiple_input: int
    instances: list[Request]
    config: Any
    doc_to_text: Callable[[Mapping[str, Any]], Any]
    doc_to_target: Callable[[Mapping[str, Any]], Any]
    doc_to_choice: Callable[[Mapping[str, Any]], list[str]]
    build_all_requests: Callable[..., None]
    set_fewshot_seed: Callable[..., None]
    dump_config: Callable[[], dict[str, Any]]

    @property
    def eval_docs(self) -> Sequence[Mapping[str, Any]]: ...


class Loaded(TypedDict):
    """What the harness's task manager gives: tasks by name, groups by name, and the members of every group."""

    tasks: dict[str, HarnessTask]
    groups: dict[str, Any]
    group_map: dict[str, Any]


def check_installed() -> None:
    """Refuse tasks where the harness is missing.

    Raises:
        InputError: it is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(f"{arg('tasks')} needs lm-evaluation-harness: pip install 'moecover[tasks]'") from error


def version_text() -> str:
    """Name and version of the harness, as records say it."""
    from importlib.metadata import version

    return f"lm_eval {version('lm_eval')}"


@functools.cache
def all_tasks() -> Any:
    """The task manager of the harness's own tasks, which takes seconds to build: it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def with_own_tasks(folder: Path) -> Any:
    """A task manager of the harness's tasks and of the definitions in a folder, which override those of their name."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for name, entry in all_tasks().task_index.items():
        manager.task_index.setdefault(name, entry)
    return manager


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness's advice and progress bars out of the log."""
    import tqdm  # type: ignore[import-untyped]

    logger = logging.getLogger("lm_eval")
    level, start = logger.level, tqdm.tqdm.__init__

    def silent(bar: Any, *args: Any, **kwargs: Any) -> None:
        start(bar, *args, **{**kwargs, "disable": True})

    logger.setLevel(logging.ERROR)
    setattr(tqdm.tqdm, "__init__", silent)  # noqa: B010  some bars of the harness cannot be turned off by its caller
    try:
        yield
    finally:
        setattr(tqdm.tqdm, "__init__", start)  # noqa: B010
        logger.setLevel(level)


def text_of(request: Request) -> str:
    """Everything that a model reads of a request."""
    return "".join(part for part in request.args if isinstance(part, str))


def answered_documents(task: HarnessTask, limit: int | None) -> Iterator[str]:
    """Context and right answer of the documents of a task.

    Args:
        task: of the harness.
        limit: documents at most; None takes all.
    """
    task.build_all_requests(limit=limit)
    by_document: dict[int, list[Request]] = {}
    for one in task.instances:
        by_document.setdefault(one.doc_id, []).append(one)
    for requests in by_document.values():
        document, (context, *rest) = requests[0].doc, requests[0].args
        if task.OUTPUT_TYPE == "multiple_choice":
            context, *rest = requests[_right_choice(task, document)].args
        elif task.OUTPUT_TYPE == "generate_until":
            rest = [f"{task.config.target_delimiter}{task.doc_to_target(document)}"]
        yield "".join([context, *rest])


def _right_choice(task: HarnessTask, document: Mapping[str, Any]) -> int:
    """The number of the right choice of a document, the first of several."""
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    gold = gold[0] if isinstance(gold, list) else gold
    return task.doc_to_choice(document).index(gold) if isinstance(gold, str) else int(gold)
