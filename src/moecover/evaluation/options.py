"""Keyword arguments of an evaluation, and what of them can be checked before a file is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from moecover.corpora.bos import check_bos
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.evaluation.endpoint_job import EndpointOptions
from moecover.runtime.options import RunOptions, check_known
from moecover.runtime.passes import Passes, check_least, passes


class TaskOptions(TypedDict, total=False):
    """Keyword arguments on tasks.

    Attributes:
        data_dir: folder with the tasks' documents, instead of the hub.
        include_path: folder with task definitions of your own.
        limit: documents per task at most.
    """

    data_dir: Path | None
    include_path: Path | None
    limit: int | None


class EvaluateOptions(RunOptions, TaskOptions, EndpointOptions, total=False):
    """Keyword arguments of `evaluate`."""


def checked_passes(
    texts: Mapping[str, str | Corpus | None],
    tasks: Sequence[str],
    options: EvaluateOptions,
    *,
    windows: int | None,
    length: int | None,
    bos: str | None,
) -> Passes:
    """How forward passes run, after a check of all arguments that can be checked before a file is read.

    Raises:
        InputError: nothing to measure, an argument on texts or tasks that are not there, or a value out of range.
    """
    if not tasks and not texts:
        raise InputError(f"nothing to measure. Give {arg('texts')} (NAME or NAME=PATH), {arg('tasks')}, or both")
    check_known(options, EvaluateOptions)
    _check_used(texts, tasks, options, windows=windows, length=length, bos=bos)
    check_least(1, limit=options.get("limit"), windows=windows, length=length)
    check_least(1, num_concurrent=options.get("num_concurrent"), timeout=options.get("timeout"))
    check_bos(bos or "auto")
    return passes(options, batch_size=1)


def _check_used(
    texts: Mapping[str, str | Corpus | None], tasks: Sequence[str], options: EvaluateOptions, **of_texts: object
) -> None:
    """Refuse arguments on texts or on tasks where there are none to read.

    Raises:
        InputError: names the argument.
    """
    stray = [name for name, value in of_texts.items() if value is not None]
    if stray and all(isinstance(text, Corpus) for text in texts.values()):
        raise InputError(f"{arg(stray[0])} says how held-out text is read: give {arg('texts')} by name or file")
    if not tasks and (unused := [name for name in TaskOptions.__annotations__ if options.get(name) is not None]):
        raise InputError(f"{arg(unused[0])} goes with {arg('tasks')}, and there are none")
