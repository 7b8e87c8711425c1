"""Zero-shot tasks: reads a model that runs, gives the scores of lm-evaluation-harness, document by document.

Task definitions, their versions and the scoring are the harness's own, layer by layer and in several processes too
(`replayed_tasks`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.corpora.bos import prefix_of
from moecover.corpora.packing import Corpus, make_corpus
from moecover.errors import InputError, arg
from moecover.evaluation.artifact import Score
from moecover.evaluation.harness import (
    Loaded,
    answered_documents,
    quiet,
    text_of,
)
from moecover.evaluation.records import TaskRecord
from moecover.evaluation.task_scores import document_samples, document_scores, task_record, task_scores
from moecover.runtime.finite import watched
from moecover.runtime.world import check_alone

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from moecover.runtime.running import Running, Within

# Scores by task and metric, and the same of every document, float64 [item].
Scored = tuple[dict[str, dict[str, Score]], dict[str, dict[str, "NDArray[np.float64]"]]]

SAMPLE = 16  # documents of a task from which the length of its texts is estimated
CHOOSING = ("loglikelihood", "multiple_choice")  # output types whose forward passes do not depend on each other
GENERATING = "generate_until"  # output type of tasks that generate text


@dataclass(frozen=True)
class Tasks:
    """Tasks of the harness, ready to run.

    Attributes:
        loaded: what the harness's task manager gives.
        parts: by the name that was asked for, the harness's tasks that it stands for.
        tokenizer: of the model.
        data: where the documents come from, by the name that was asked for: ``hub``, a folder, or ``its definition``.
        limit: documents a task at most; None for all.
        batch_size: requests per forward pass.
        record: record of every task, by name; complete once the tasks have run.
    """

    loaded: Loaded
    parts: dict[str, list[str]]
    tokenizer: PreTrainedTokenizerBase
    data: Mapping[str, str]
    limit: int | None = None
    batch_size: int = 1
    record: dict[str, TaskRecord] = field(default_factory=dict)

    def score(
        self, model: Running, within: Sequence[Within], *, advance: Callable[[int], None] = lambda requests: None
    ) -> list[Scored]:
        """Run every task on every variant of a model.

        Args:
            model: the model; layer by layer, one read of the weights serves as many forward passes of all variants as
                may be held.
            within: for each variant, the context of a decoder layer, see `masking.masked_layers`.
            advance: called with 1 for every answered request, ``num_requests`` times a variant.

        Returns:
            For each variant, the scores by task and metric, and those of every document.

        Raises:
            InputError: see `check`; or an answer that is not finite, with its task and item.
        """
        self.check(model)
        with watched(model):
            if model.by_layer or model.world.size > 1:
                return self._replayed(model, within, advance)
            return self._whole(model, within, advance)

    def _replayed(self, model: Running, within: Sequence[Within], answered: Callable[[int], None]) -> list[Scored]:
        """Scores of all variants of a model that runs layer by layer, or in several processes."""
        from moecover.evaluation.replayed_tasks import Replay

        settings: dict[str, Any] = {"tokenizer": self.tokenizer, "batch_size": self.batch_size}
        with quiet():
            replay = Replay(model, within, answered=answered, **settings)
        results = []
        for number in range(len(within)):
            replay.variant = number
            results.append(self._run(replay))
        return results

    def _whole(self, model: Running, within: Sequence[Within], answered: Callable[[int], None]) -> list[Scored]:
        """Scores of all variants of a model in memory, one after the other."""
        from moecover.evaluation.harness_model import CheckedLM

        settings: dict[str, Any] = {"tokenizer": self.tokenizer, "batch_size": self.batch_size}
        with quiet():
            lm = CheckedLM(answered=answered, pretrained=model.module, **settings)
        results = []
        for context in within:
            with contextlib.ExitStack() as stack:
                for layer in range(len(model.layers)):
                    stack.enter_context(context(layer))
                results.append(self._run(lm))
        return results

    def score_with(self, lm: Any) -> Scored:
        """Scores of a model of the harness that runs elsewhere, see `endpoint_model`.

        Args:
            lm: a `CheckedRequests`.
        """
        return self._run(lm)

    def check(self, model: Running) -> None:
        """Refuse a model that cannot answer all tasks.

        Raises:
            InputError: the model runs layer by layer, and a task generates text or scores whole texts; or it runs in
                several processes, and a task scores whole texts.
        """
        if wrong := self._beyond(*CHOOSING, GENERATING):
            check_alone(model.world, f"{arg('tasks', ','.join(wrong))}, which scores whole texts,")
        if model.by_layer and (wrong := self.in_memory()):
            raise InputError(
                f"{arg('tasks', ','.join(wrong))}: generating text or scoring whole texts needs the model in memory, "
                f"but it runs layer by layer. Give a larger {arg('memory_limit')}, evaluate a pruned checkpoint that "
                "fits, or leave the task out"
            )
        config: Any = model.module.config
        self.check_room(getattr(config.get_text_config(), "max_position_embeddings", None))

    def check_room(self, longest: int | None) -> None:
        """Refuse a task that generates more text than the model has positions, which leaves none for the question.

        Args:
            longest: tokens of a question and its answer, at most; None where there is no limit.

        Raises:
            InputError: names the task.
        """
        from lm_eval.models.utils import normalize_gen_kwargs

        for name, parts in self.parts.items():
            for task in (self.loaded["tasks"][part] for part in parts):
                if longest is None or task.OUTPUT_TYPE != GENERATING:
                    continue
                new = normalize_gen_kwargs(dict(task.config.generation_kwargs or {}))["max_gen_toks"]
                if new + 1 >= longest:
                    raise InputError(
                        f"{arg('tasks', name)} generates up to {new} tokens, the model has {longest} positions: none "
                        "is left for the question. Leave the task out, or give a definition with fewer (max_gen_toks) "
                        f"in {arg('include_path', 'DIR')}"
                    )

    def in_memory(self) -> tuple[str, ...]:
        """The tasks that need a model in memory: those that generate text or score whole texts."""
        return self._beyond(*CHOOSING)

    def _beyond(self, *kinds: str) -> tuple[str, ...]:
        """The tasks with other output types than some."""
        tasks = self.loaded["tasks"]
        found = {name: {tasks[part].OUTPUT_TYPE for part in parts} for name, parts in self.parts.items()}
        return tuple(name for name, types in found.items() if not types <= set(kinds))

    def choosing(self) -> tuple[str, ...]:
        """The tasks that need the log-probabilities of given text: all but those that only generate."""
        tasks = self.loaded["tasks"]
        kinds = {name: {tasks[part].OUTPUT_TYPE for part in parts} for name, parts in self.parts.items()}
        return tuple(name for name, found in kinds.items() if found != {GENERATING})

    def documents(self) -> dict[str, list[str]]:
        """By task, what a model that answers right reads: context and right answer of every scored document.

        Of several right answers the first; for a task that scores whole texts, the text. For analysis only.
        """
        tasks, found = self.loaded["tasks"], dict[str, list[str]]()
        with quiet():
            for name, parts in self.parts.items():
                found[name] = [text for part in parts for text in answered_documents(tasks[part], self.limit)]
        return found

    @functools.cached_property
    def texts(self) -> dict[str, Corpus]:
        """By task, what the model reads: every context with every continuation that is scored, a sequence each."""
        found = {}
        with quiet():
            for name, parts in self.parts.items():
                read = dict[str, None]()
                for part in parts:
                    task = self.loaded["tasks"][part]
                    task.build_all_requests(limit=self.limit)
                    read |= dict.fromkeys(text_of(one) for one in task.instances)
                found[name] = _as_corpus(name, self._ids(list(read)))
        return found

    @property
    def num_requests(self) -> int:
        """Requests that one variant answers."""
        return self._requests[0]

    @property
    def longest(self) -> int:
        """Tokens of the longest request, approximately: only the `SAMPLE` longest texts of a task are tokenised."""
        return self._requests[1]

    @functools.cached_property
    def _requests(self) -> tuple[int, int]:
        longest = 0
        with quiet():
            for task in self.loaded["tasks"].values():
                task.build_all_requests(limit=self.limit)
                texts = sorted((text_of(one) for one in task.instances), key=len)[-SAMPLE:]
                longest = max(longest, *map(len, self._ids(texts)))
            number = sum(one.repeats for task in self.loaded["tasks"].values() for one in task.instances)
        return number, longest

    def num_tokens(self) -> int:
        """Tokens that one variant reads, estimated from the first `SAMPLE` documents of every task."""
        total = 0.0
        with quiet():
            for task in self.loaded["tasks"].values():
                documents = len(task.eval_docs) if self.limit is None else min(self.limit, len(task.eval_docs))
                task.build_all_requests(limit=min(SAMPLE, documents))
                lengths = map(len, self._ids([text_of(one) for one in task.instances]))
                total += documents * sum(lengths) / min(SAMPLE, documents)
        return round(total)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _run(self, lm: Any) -> Scored:
        """Scores of one variant, which the harness sees as a model of its own; notes the record."""
        from lm_eval import evaluator
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        for task in self.loaded["tasks"].values():  # as the harness's command does: all variants see the same examples
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        with quiet():
            found = evaluator.evaluate(lm, self.loaded, limit=self.limit, log_samples=True)
        assert found is not None
        scores, items, bos = {}, {}, list(prefix_of(self.tokenizer))
        for name, parts in self.parts.items():
            samples = document_samples(found, parts)
            items[name] = document_scores(samples)
            scores[name] = task_scores(found, name, parts, samples)
            cut = sum(task in parts for task, _ in lm.cut)
            self.record[name] = task_record(found, parts, samples, data=self.data[name], cut=cut, bos=bos)
        return scores, items


def _as_corpus(name: str, rows: Sequence[Sequence[int]]) -> Corpus:
    """Rows of token ids of any lengths, for comparisons with other texts."""
    tokens = np.zeros((len(rows), max(map(len, rows), default=0)), dtype=np.int64)
    mask = np.zeros(tokens.shape, dtype=bool)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    return make_corpus(name, tokens, mask, {})
