"""Tasks by name: reads the harness's index, local files and a user's own definitions, gives tasks ready to run."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.corpora.hub import check_answers
from moecover.errors import InputError, arg
from moecover.evaluation.harness import Loaded, all_tasks, check_installed, quiet, with_own_tasks
from moecover.evaluation.task_files import GROUP_PREFIX, LOCAL, from_files
from moecover.evaluation.tasks import Tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def resolve(
    names: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    data_dir: Path | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> Tasks:
    """Tasks by name, with their documents.

    Args:
        names: of the harness (tasks, groups and tags), of `LOCAL`, or of a task in ``include_path``.
        tokenizer: of the model.
        data_dir: folder with the files of `LOCAL`; without it the documents come from the hub.
        include_path: folder with task definitions of the user's own, in the harness's format.
        limit: documents a task at most; None for all.
        batch_size: requests per forward pass.

    Raises:
        InputError: the harness or the model's tokenizer is missing, an unknown task, one that runs the code that a
            model writes, a missing file, or documents that cannot be read.
    """
    check_installed()
    if tokenizer is None:
        raise InputError(f"{arg('tasks')} needs the model's tokenizer, it has none")
    loaded: Loaded = {"tasks": {}, "groups": {}, "group_map": {}}
    with quiet():
        manager = all_tasks() if include_path is None else with_own_tasks(include_path)
        known = set(manager.task_index)
        _check_names(names, known)
        if data_dir is not None and not set(names) & LOCAL.keys():
            raise InputError(f"{arg('data_dir')} has files of {', '.join(LOCAL)}: none of these is asked for")
        local = {name: from_files(name, data_dir, known) for name in names if data_dir is not None and name in LOCAL}
        own = known - set(all_tasks().task_index)
        if from_hub := [name for name in names if name not in local and name not in own]:
            check_answers(arg("tasks", from_hub[0]), f"or give a folder with {arg('data_dir')}")
        for name in names:
            if manager.task_index[name].yaml_path and runs_code(manager.task_index[name].yaml_path):
                raise _unsafe(name)
        parts = {name: _load(manager, name, local.get(name), loaded) for name in names}
        for name, members in parts.items():  # of groups
            if any(getattr(loaded["tasks"][one], "UNSAFE_CODE", False) for one in members):
                raise _unsafe(name)
    data = {n: str(data_dir) if n in local else "its definition" if n in own else "hub" for n in names}
    return Tasks(loaded, parts, tokenizer, data, limit, batch_size)


def runs_code(definition: Path) -> bool:
    """Whether a task's definition says that it runs the code that a model writes; the definition's own is not run."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(definition, resolve_func=False).get("unsafe_code", False) is not False


def _unsafe(name: str) -> InputError:
    """The error for a task that runs code."""
    return InputError(
        f"{arg('tasks', name)} runs the code that the model writes, which this program does not do. Write the "
        f"checkpoint, and in a sandbox give it to lm_eval --tasks {name} --confirm_run_unsafe_code"
    )


def _check_names(names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InputError(f"{arg('tasks', name)}: there is no such task.{hint} `lm_eval ls tasks` lists them")


def _load(manager: Any, name: str, definition: dict[str, Any] | None, loaded: Loaded) -> list[str]:
    """Load a task, by name or by its definition, into ``loaded``; gives the harness's tasks that it stands for."""
    from lm_eval.config.group import AggMetricConfig

    try:
        found = manager.load([name if definition is None else definition])
    except InputError:
        raise
    except Exception as error:  # the harness's clients raise many unrelated types
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{arg('tasks', name)}: its documents could not be read: {reason}. Give a folder with {arg('data_dir')}"
        ) from error
    loaded["tasks"] |= found["tasks"]
    if definition is not None and LOCAL[name].metrics:
        metrics = [AggMetricConfig(**metric) for metric in LOCAL[name].metrics]
        found["groups"][GROUP_PREFIX + name].aggregate_metric_list = metrics
    if definition is None or LOCAL[name].metrics:
        loaded["groups"] |= found["groups"]
        loaded["group_map"] |= found["group_map"]
    return list(found["tasks"])
