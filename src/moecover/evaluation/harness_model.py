"""The harness's model with two checks: counts the items that it cuts, and refuses answers that are not finite.

Reads the harness's requests, knows the task and the document of each. What the harness sends and how it cuts what is
longer than the model's positions (from the left) stays its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from moecover.runtime.finite import not_finite, taken

if TYPE_CHECKING:
    from moecover.evaluation.harness import Request

Encoded = tuple[Any, list[int], list[int]]  # a request's name, tokens of its context and continuation
Item = tuple[str, int]  # a task of the harness and the index of its document


class CheckedLM(HFLM):  # type: ignore[misc]
    """A model of the harness.

    Attributes:
        cut: documents of which the model saw only the end, because a request is longer than its positions.
    """

    def __init__(self, *, answered: Callable[[int], None], **settings: Any) -> None:
        """Wrap a model.

        Args:
            answered: called with 1 for every answered request.
            **settings: of the harness's own class.
        """
        super().__init__(backend="causal", **settings)
        self.cut: set[Item] = set()
        self._answered = answered
        self._requested: Sequence[Request] = ()
        self._items: dict[tuple[str, ...], Item] = {}
        self.set_cache_hook(self)

    def loglikelihood(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._ask(requests)
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        self._ask(requests)
        self._requested = ()  # windows of a whole text: nothing is cut
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return found

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        self._ask(requests)
        found: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return found

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> Any:
        if left_truncate_len:
            for text in strings:
                if len(self.tok_encode(text)) > left_truncate_len and (text,) in self._items:
                    self.cut.add(self._items[text,])
        return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self.count(requests)
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return found

    def count(self, requests: Sequence[Encoded]) -> None:
        """Note which of the requests that were just asked are longer than the model's positions."""
        asked, self._requested = self._requested, ()
        if len(asked) == len(requests):
            for one, (_, context, continuation) in zip(asked, requests, strict=True):
                if len(context) + len(continuation) > self.max_length + 1:
                    self.cut.add((one.task_name, one.doc_id))

    def add_partial(self, kind: str, request: Sequence[Any], answer: Any) -> None:
        """Called by the harness with every answer; its caches have this name for it.

        Raises:
            InputError: the answer is not finite, or was generated from numbers that are not.
        """
        value, noticed = answer[0] if isinstance(answer, tuple) else answer, taken()
        wrong = not math.isfinite(value) if isinstance(value, float) else bool(noticed)
        if wrong:
            what = "the logits of the text that it generates are" if isinstance(value, str) else "the log-likelihood is"
            raise not_finite(self._name(request), what, noticed)
        self._answered(1)

    def _ask(self, requests: Sequence[Request]) -> None:
        self._requested = requests
        self._items = {_strings(one.args): (one.task_name, one.doc_id) for one in reversed(requests)}

    def _name(self, request: Sequence[Any]) -> str:
        task, document = self._items.get(_strings(request), ("", -1))
        return f"task {task}, item {document}" if task else ""


def _strings(parts: Sequence[Any]) -> tuple[str, ...]:
    """The texts of a request."""
    return tuple(part for part in parts if isinstance(part, str))
