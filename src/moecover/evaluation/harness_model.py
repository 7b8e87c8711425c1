"""The harness's model on this machine, with the checks of `checked_requests`: reads requests, gives their answers."""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM

from moecover.evaluation.checked_requests import CheckedRequests


class CheckedLM(CheckedRequests, HFLM):  # type: ignore[misc]
    """A model of the harness in memory.

    It generates text for as many requests at a time as the batch size says, sorted by length and padded on the left.
    """

    def __init__(self, **settings: Any) -> None:
        """Wrap a model.

        Args:
            **settings: of `CheckedRequests` and the harness's own class.
        """
        super().__init__(backend="causal", **settings)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> Any:
        if left_truncate_len:
            for text in strings:
                if len(self.tok_encode(text)) > left_truncate_len:
                    self.note_cut(text)
        return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
