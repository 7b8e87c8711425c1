"""Two checks around a model of the harness: the items that it cuts are counted, answers that are not finite refused.

Reads the harness's requests, knows the task and the document of each. What the harness sends and how it cuts what is
longer than the model's positions (from the left) stays its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM

from moecover.runtime.finite import not_finite, taken

if TYPE_CHECKING:
    from moecover.evaluation.harness import Request

Encoded = tuple[Any, list[int], list[int]]  # a request's name, tokens of its context and continuation
Item = tuple[str, int]  # a task of the harness and the index of its document


def _strings(parts: Sequence[Any]) -> tuple[str, ...]:
    """The texts of a request."""
    return tuple(part for part in parts if isinstance(part, str))


class CheckedRequests(TemplateLM):  # type: ignore[misc]
    """To be put before a class of the harness's models.

    Attributes:
        cut: documents of which the model saw only the end, because a request is longer than its positions.
    """

    def __init__(self, *, answered: Callable[[int], None], **settings: Any) -> None:
        """Make the harness's model.

        Args:
            answered: called with 1 for every answered request.
            **settings: of the harness's own class.
        """
        super().__init__(**settings)
        self.cut: set[Item] = set()
        self._answered = answered
        self._requested: Sequence[Request] = ()
        self._items: dict[tuple[str, ...], Item] = {}
        self.set_cache_hook(self)

    @property
    def longest(self) -> int:
        """Tokens of a context and its continuation that are not cut; the last one is not read but predicted."""
        return int(self.max_length) + 1

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

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self.count(requests)
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return found

    def count(self, requests: Sequence[Encoded]) -> None:
        """Note which of the requests that were just asked are longer than the model's positions."""
        asked, self._requested = self._requested, ()
        if len(asked) == len(requests):
            for one, (_, context, continuation) in zip(asked, requests, strict=True):
                if len(context) + len(continuation) > self.longest:
                    self.cut.add((one.task_name, one.doc_id))

    def note_cut(self, context: str) -> None:
        """Note that the beginning of a context is left out before text is generated."""
        if (context,) in self._items:
            self.cut.add(self._items[context,])

    def add_partial(self, kind: str, request: Sequence[Any], answer: Any) -> None:
        """Called by the harness with every answer; its caches have this name for it.

        Raises:
            InputError: the answer is not finite, or was generated from numbers that are not.

        Args:
            kind: as the harness calls it.
            request: what was asked, or its name.
            answer: a log-likelihood and whether it is that of the most likely tokens, or text.
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
        if isinstance(request, str):
            return request
        task, document = self._items.get(_strings(request), ("", -1))
        return f"task {task}, item {document}" if task else ""
