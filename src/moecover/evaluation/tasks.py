"""Zero-shot tasks: reads a live model, gives the scores that lm-evaluation-harness gives, document by document.

The task definitions, their versions and the scoring are the harness's own, layer by layer too (`replay`). `LOCAL` says where a
folder holds the documents of a task for machines that do not reach the hub; only the place that they are read from differs then.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.errors import InputError
from moecover.evaluation.artifact import Score

if TYPE_CHECKING:
    from numpy.typing import NDArray

Scored = tuple[dict[str, dict[str, Score]], dict[str, dict[str, "NDArray[np.float64]"]]]


def _answer_as_label(rows: Any) -> Any:
    return rows.map(lambda row: {"label": int(row["answer"])})


def _gold_as_label(rows: Any) -> Any:
    return rows.rename_column("gold", "label")


def _pairs_as_sentences(rows: Any) -> Any:
    return rows.rename_columns({"good": "sentence_good", "bad": "sentence_bad"})


@dataclass(frozen=True)
class Local:
    """A task's documents in a folder.

    Attributes:
        files: by split of the harness.
        process: gives the rows the names that the harness knows.
        part: of a task with parts, the field that names a row's part, as in the harness's names behind the task's own.
        metrics: how the parts are taken together where that is not their plain mean, in the harness's words.
    """

    files: Mapping[str, str]
    process: Callable[[Any], Any] | None = None
    part: str | None = None
    metrics: Sequence[Mapping[str, Any]] = ()


LOCAL: dict[str, Local] = {
    "arc_easy": Local({"validation": "arc_easy/validation.jsonl", "test": "arc_easy/test.jsonl"}),
    "arc_challenge": Local({"validation": "arc_challenge/validation.jsonl", "test": "arc_challenge/test.jsonl"}),
    "boolq": Local({"validation": "boolq/validation.jsonl"}, _answer_as_label),
    "hellaswag": Local({"validation": "hellaswag/validation.jsonl"}, _gold_as_label),
    "piqa": Local({"validation": "piqa/validation.jsonl"}),
    "winogrande": Local({"validation": "winogrande/validation.jsonl"}),
    "gsm8k": Local({"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"}),
    "mmlu": Local({"dev": "mmlu/dev.jsonl", "test": "mmlu/test.jsonl"}, part="subject", metrics=({"metric": "acc", "weight_by_size": True},)),
    "blimp": Local({"train": "blimp/blimp.jsonl"}, _pairs_as_sentences, part="uid"),
}  # fmt: skip
OF_FILES = "files of "  # before a task's name: the group of the harness that its local parts are
SAMPLE = 16  # documents of a task that tell how long its texts are
CHOOSING = ("loglikelihood", "multiple_choice")  # kinds of tasks whose forward passes do not depend on each other
SIX = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "winogrande")


def _harness() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise InputError("--tasks needs lm-evaluation-harness: pip install 'moecover[tasks]'") from error
    return lm_eval


@dataclass(frozen=True)
class Tasks:
    """Tasks of the harness, ready to run.

    Attributes:
        loaded: what the harness's task manager gives.
        parts: by the name that was asked for, the names of the harness's tasks that it stands for.
        tokenizer: of the model.
        record: by task: version, num_fewshot, items, metrics, metric, data, harness; complete once the tasks have run.
        limit: documents a task at most.
        batch_size: requests per forward pass.
    """

    loaded: dict[str, Any]
    parts: dict[str, list[str]]
    tokenizer: Any
    data: str
    limit: int | None = None
    batch_size: int = 1
    record: dict[str, dict[str, Any]] = field(default_factory=dict)

    def score(self, model: Any, within: Sequence[Callable[[int], contextlib.AbstractContextManager[None]]], *, advance: Callable[[int], None] = lambda requests: None) -> list[Scored]:  # fmt: skip
        """Run every task on every variant of a model.

        Args:
            model: from `load_model`, or from `streamed`: then one read of the weights serves as many forward passes as may be
                held, of all variants.
            within: of every variant, the context of a decoder layer, see `masking.masked_layers`.
            advance: called with 1 for every request that is answered, of every variant `num_requests` times.

        Returns:
            Of every variant the scores by task and metric, and the same of every document.

        Raises:
            InputError: see `check`.
        """
        from lm_eval.models.huggingface import HFLM

        self.check(model)
        results, hook = list[Scored](), SimpleNamespace(add_partial=lambda kind, request, answer: advance(1))
        if model.by_layer:
            from moecover.evaluation.streamed_tasks import Replay

            with _quiet():
                replay = Replay(model, within, tokenizer=self.tokenizer, batch_size=self.batch_size)
            replay.set_cache_hook(hook)
            for number in range(len(within)):
                replay.variant = number
                results.append(self._run(replay))
            return results
        with _quiet():
            lm = HFLM(pretrained=model.module, tokenizer=self.tokenizer, batch_size=self.batch_size, backend="causal")
        lm.set_cache_hook(hook)
        for context in within:
            with contextlib.ExitStack() as stack:
                for layer in range(len(model.layers)):
                    stack.enter_context(context(layer))
                results.append(self._run(lm))
        return results

    def check(self, model: Any) -> None:
        """Refuse a model that cannot answer all tasks.

        Raises:
            InputError: a model that runs layer by layer, and a task that generates text or scores whole texts.
        """
        if model.by_layer and (wrong := self.in_memory()):
            raise InputError(f"--tasks {','.join(wrong)}: text that is generated or scored in pieces needs the model in memory, it runs layer by layer. Give a larger --memory-limit, evaluate a pruned checkpoint that fits, or leave the task out")  # fmt: skip

    def in_memory(self) -> tuple[str, ...]:
        """The tasks that need a model in memory: those that generate text or score whole texts."""
        tasks = self.loaded["tasks"]
        return tuple(name for name, parts in self.parts.items() if any(tasks[part].OUTPUT_TYPE not in CHOOSING for part in parts))  # fmt: skip

    def documents(self) -> dict[str, list[str]]:
        """What every task has a model read at its best: the context and the right answer of every document that is scored.

        Of a document with several right answers the first, of a task that scores whole texts the text. For analysis only.
        """
        found: dict[str, list[str]] = {}
        with _quiet():
            for name, parts in self.parts.items():
                found[name] = [text for part in parts for text in _answered(self.loaded["tasks"][part], self.limit)]
        return found

    @property
    def num_requests(self) -> int:
        """Requests that one variant answers."""
        return self._requests[0]

    @property
    def longest(self) -> int:
        """Tokens of the longest request, about: the longest of the `SAMPLE` of every task with the most characters."""
        return self._requests[1]

    @functools.cached_property
    def _requests(self) -> tuple[int, int]:
        longest = 0
        with _quiet():
            for task in self.loaded["tasks"].values():
                task.build_all_requests(limit=self.limit)
                texts = sorted((_text(one) for one in task.instances), key=len)[-SAMPLE:]
                longest = max(longest, *map(len, self._ids(texts)))
            number = sum(one.repeats for task in self.loaded["tasks"].values() for one in task.instances)
        return number, longest

    def num_tokens(self) -> int:
        """Tokens that one variant reads, about: of the first `SAMPLE` documents of every task, times their number."""
        total = 0.0
        with _quiet():
            for task in self.loaded["tasks"].values():
                documents = len(task.eval_docs) if self.limit is None else min(self.limit, len(task.eval_docs))
                task.build_all_requests(limit=min(SAMPLE, documents))
                lengths = map(len, self._ids([_text(one) for one in task.instances]))
                total += documents * sum(lengths) / min(SAMPLE, documents)
        return round(total)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _run(self, lm: Any) -> Scored:
        from lm_eval import evaluator
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        for task in self.loaded["tasks"].values():  # as the command does: all variants see the same examples
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        with _quiet():
            found = evaluator.evaluate(lm, self.loaded, limit=self.limit, log_samples=True)
        assert found is not None
        scores: dict[str, dict[str, Score]] = {}
        items: dict[str, dict[str, NDArray[np.float64]]] = {}
        for name, parts in self.parts.items():
            samples = [sorted(found["samples"][part], key=lambda one: one["doc_id"]) for part in parts]
            keys = _keys(samples[0])
            metrics = list(keys)
            items[name] = {
                shown: np.array([float(one[metric]) for part in samples for one in part if one["filter"] == by])
                for shown, (metric, by) in keys.items()
                if all(isinstance(one[metric], (int, float, np.floating, np.bool_)) for one in samples[0])
            }
            group = next((g for g in (name, OF_FILES + name) if g in found.get("groups", {})), None)
            whole = found["results"].get(name if group is None and len(parts) == 1 else group)
            scores[name] = {
                shown: _score(whole or {}, [found["results"][part] for part in parts], *key)
                for shown, key in keys.items()
            }
            self.record[name] = {
                "version": sorted({found["versions"][part] for part in parts}, key=str),
                "num_fewshot": max(found["n-shot"][part] for part in parts),
                "items": sum(len({one["doc_id"] for one in part}) for part in samples),
                "metrics": metrics,
                "metric": "acc" if "acc" in metrics else metrics[0],
                "parts": len(parts),
                "data": self.data,
                "harness": _version(),
            }
        return scores, items


def _text(request: Any) -> str:
    return "".join(part for part in request.args if isinstance(part, str))


def _answered(task: Any, limit: int | None) -> Iterator[str]:
    """Context and right answer of the documents of one task of the harness."""
    task.build_all_requests(limit=limit)
    by_document: dict[int, list[Any]] = {}
    for one in task.instances:
        by_document.setdefault(one.doc_id, []).append(one)
    for requests in by_document.values():
        document, (context, *rest) = requests[0].doc, requests[0].args
        if task.OUTPUT_TYPE == "multiple_choice":
            gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
            gold = gold[0] if isinstance(gold, list) else gold
            gold = task.doc_to_choice(document).index(gold) if isinstance(gold, str) else gold
            context, *rest = requests[gold].args
        elif task.OUTPUT_TYPE == "generate_until":
            rest = [f"{task.config.target_delimiter}{task.doc_to_target(document)}"]
        yield "".join([context, *rest])


def _version() -> str:
    from importlib.metadata import version

    return f"lm_eval {version('lm_eval')}"


def _keys(samples: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Metric and filter (what takes the answer out of a generated text) by the name that both have in results.

    Where there are several filters the name is the harness's, ``exact_match,strict-match``.
    """
    filters = list(dict.fromkeys(one["filter"] for one in samples))
    metrics = sorted({metric for one in samples for metric in one["metrics"]})
    return {m if len(filters) == 1 else f"{m},{by}": (m, by) for m in metrics for by in filters}


def _score(whole: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], metric: str, by: str) -> Score:
    """A metric of a task; of a task with parts the harness's own aggregate, or the mean of the parts."""

    def value(row: Mapping[str, Any], name: str) -> float | None:
        found = row.get(f"{name},{by}")
        return float(found) if isinstance(found, (int, float)) else None

    aggregated = value(whole, metric)
    if aggregated is not None:
        return Score(aggregated, value(whole, f"{metric}_stderr"))
    values = [v for part in parts if (v := value(part, metric)) is not None]
    errors = [value(part, f"{metric}_stderr") for part in parts]
    known = [error for error in errors if error is not None]
    return Score(statistics.fmean(values), sum(e * e for e in known) ** 0.5 / len(parts) if len(known) == len(parts) else None)  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's advice and bars out of the log."""
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


@functools.cache
def _all_tasks() -> Any:
    """The harness's own index of tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def resolve(
    names: Sequence[str],
    *,
    tokenizer: Any,
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
        include_path: folder with task definitions of the user's own, in the harness's form.
        limit: documents a task at most.
        batch_size: requests per forward pass.

    Raises:
        InputError: no harness, an unknown task, a file that is missing, or documents that cannot be read.
    """
    _harness()
    from lm_eval.config.group import AggMetricConfig
    from lm_eval.tasks import TaskManager

    if tokenizer is None:
        raise InputError("--tasks needs the model's tokenizer, it has none")
    with _quiet():
        manager = _all_tasks() if include_path is None else TaskManager(include_path=str(include_path))
        known, parts = set(manager.all_tasks), dict[str, list[str]]()
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise InputError(f"--tasks {name}: there is no such task.{f' Did you mean {near[0]}?' if near else ''} `lm_eval ls tasks` lists them")  # fmt: skip
        wanted: list[Any] = []
        for name in names:
            if data_dir is None or name not in LOCAL:
                wanted.append(name)
                continue
            wanted += [_from_files(name, data_dir, known)]
        try:
            loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
            for name, one in zip(names, wanted, strict=True):
                found = manager.load([one])
                parts[name] = list(found["tasks"])
                loaded["tasks"] |= found["tasks"]
                if not isinstance(one, str):
                    if not LOCAL[name].metrics:
                        continue
                    metrics = [AggMetricConfig(**metric) for metric in LOCAL[name].metrics]
                    found["groups"][OF_FILES + name].aggregate_metric_list = metrics
                loaded["groups"] |= found["groups"]
                loaded["group_map"] |= found["group_map"]
        except InputError:
            raise
        except Exception as error:  # the clients below raise many unrelated types
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"--tasks {name}: its documents could not be read: {reason}. Give a folder with --data-dir") from error  # fmt: skip
    return Tasks(loaded, parts, tokenizer, "hub" if data_dir is None else str(data_dir), limit, batch_size)


def _from_files(name: str, folder: Path, known: set[str]) -> dict[str, Any]:
    """The harness's own definition of a task, with documents from files."""

    def there(relative: str) -> str:
        if not (folder / relative).is_file():
            raise InputError(f"--tasks {name}: {folder / relative} is missing. docs/evaluation.md says what --data-dir holds")  # fmt: skip
        return str(folder / relative)

    local = LOCAL[name]
    files = {split: there(relative) for split, relative in local.files.items()}
    common = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    if "test" not in files or "train" not in files:
        common["training_split"] = None  # the harness's own has one, which is not scored
    if local.part is None:
        return {"group": OF_FILES + name, "task": [{"task": name, **common, **_processing(local.process)}]}
    named = dict.fromkeys(row[local.part] for path in files.values() for row in _rows(Path(path)))
    parts = [{"task": f"{name}_{part}", **common, **_processing(local.process, local.part, part)} for part in sorted(named) if f"{name}_{part}" in known]  # fmt: skip
    return {"group": OF_FILES + name, "task": parts}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _processing(process: Callable[[Any], Any] | None, field: str = "", value: str = "") -> dict[str, Any]:
    """The harness's entry for what is done to documents: those of one part, with the names that it knows."""

    def processed(rows: Any) -> Any:
        if field:
            rows = rows.select(np.flatnonzero(rows.data.column(field).to_pandas().to_numpy() == value))
        return rows if process is None else process(rows)

    return {} if process is None and not field else {"process_docs": processed}
