"""Zero-shot tasks layer by layer or in several processes: reads the harness's requests, gives every variant's answers.

The harness takes a batch's logits and scores them before it asks for the next batch; layer by layer all batches run
side by side, and several processes share them out. So the harness first runs with empty logits, to learn which requests
it puts into which batch. Then every batch is a forward pass of its own, for every variant, scored at its end by the
harness's own code, and the results are replayed when the harness asks again.

Text is generated in memory only: every process goes through all batches of the harness and runs its own of them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from moecover.errors import MoecoverError
from moecover.evaluation.checked_requests import Encoded
from moecover.evaluation.harness import Request
from moecover.evaluation.harness_model import CheckedLM
from moecover.evaluation.sharing import run_shared
from moecover.files.atomic import digest
from moecover.runtime.distributed import check_same, shared_out
from moecover.runtime.running import Running, Within

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Answer = tuple[float, bool]  # log-likelihood of the continuation, whether every token of it is the most likely one


def _numbered(request: Any, number: int) -> Request:
    """A request to generate text whose context has its number."""
    numbered, (context, settings) = copy.copy(request), request.args
    numbered.arguments = _Context(context), settings
    numbered.arguments[0].number = number
    found: Request = numbered
    return found


@dataclass(frozen=True)
class _Batch:
    """A forward pass: int64 ``[row, position]``, and the numbers of the requests that it answers."""

    tokens: torch.Tensor
    requests: list[int] = field(default_factory=list)


class _Batching(HFLM):  # type: ignore[misc]
    """Records what would run: every call of the model is a batch, the requests answered after it are in that batch."""

    def __init__(self, stream: Running, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        super().__init__(pretrained=stream.module, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        self._device = stream.device

    def batches(self, requests: Sequence[Encoded]) -> list[_Batch]:
        self._found: list[_Batch] = []
        self.set_cache_hook(self)
        numbered = [(number, *tokens) for number, (_, *tokens) in enumerate(requests)]
        self._loglikelihood_tokens(numbered, disable_tqdm=True)
        if sorted(n for batch in self._found for n in batch.requests) != list(range(len(requests))):
            raise MoecoverError(
                "this version of lm-evaluation-harness does not tell which requests are in a batch: please report this"
            )
        return self._found

    def add_partial(self, kind: str, number: int, answer: Answer) -> None:
        self._found[-1].requests.append(number)

    def _model_call(self, inps: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        self._found.append(_Batch(inps.cpu()))
        return inps.new_empty((*inps.shape, 0), dtype=torch.float32)

    def _select_cont_toks(
        self, logits: torch.Tensor, contlen: int | None = None, inplen: int | None = None
    ) -> torch.Tensor:
        vocabulary = int(self.config.get_text_config().vocab_size)
        return torch.zeros((), dtype=torch.uint8, device=logits.device).expand(contlen or 0, vocabulary)


class _Context(str):
    """What is read before text is generated, with the number of its request."""

    number: int


class Replay(CheckedLM):
    """A model of the harness that stands for all variants of a model.

    Attributes:
        variant: the number of the current variant. At the first requests, all of them are run for all variants.
    """

    def __init__(
        self,
        stream: Running,
        within: Sequence[Within],
        *,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        answered: Callable[[int], None] = lambda requests: None,
    ) -> None:
        """Stand for the first variant.

        Args:
            stream: the model.
            within: for each variant, the context of a decoder layer.
            tokenizer: of the model.
            batch_size: requests per forward pass.
            answered: called with 1 for every answered request.
        """
        super().__init__(answered=answered, pretrained=stream.module, tokenizer=tokenizer, batch_size=batch_size)
        self._device, self.variant = stream.device, 0
        self._stream, self._within = stream, within
        self._asked: list[list[list[int]]] | None = None
        self._answers: list[list[Answer]] = []
        self._expected: torch.Tensor | None = None
        self._generated: dict[int, str] = {}  # by number of the request, in this process
        self._calls = 0  # batches of text so far

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text of the current variant for every request, in every process that shares the work.

        Raises:
            InputError: the tasks ask the processes different things.
        """
        self._generated, self._calls, world = {}, 0, self._stream.world
        check_same(world, {"what the tasks ask": digest([one.args[0] for one in requests])})
        with contextlib.ExitStack() as stack:
            for layer in range(len(self._stream.layers)):
                stack.enter_context(self._within[self.variant](layer))
            super().generate_until([_numbered(one, n) for n, one in enumerate(requests)], disable_tqdm=disable_tqdm)
        found: dict[int, str] = {}
        for part in shared_out(world, range(world.size), lambda mine: [self._generated for _ in mine]):
            found |= part
        return [found[number] for number in range(len(requests))]

    def _model_generate(self, context: torch.Tensor, **settings: Any) -> torch.Tensor:
        """A batch's tokens, continued if the batch is this process's."""
        self._calls += 1
        if not self._is_mine():
            return context
        made: torch.Tensor = super()._model_generate(context, **settings)
        return made

    def _is_mine(self) -> bool:
        """Whether the batch that is generated is this process's."""
        return self._stream.world.mine(self._calls - 1)

    def add_partial(self, kind: str, request: Sequence[Any], answer: Any) -> None:
        """See `CheckedRequests`; what other processes generate is left to them."""
        context = request[0]
        if isinstance(context, _Context):
            if not self._is_mine():
                return
            self._generated[context.number] = answer
        super().add_partial(kind, request, answer)

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], *args: object, **kwargs: object) -> list[Answer]:
        self.count(requests)
        asked = [tokens for _, *tokens in requests]
        if self._asked is None:
            self._asked, self._answers = asked, self._run(requests)
        if asked != self._asked:
            raise MoecoverError(
                "the tasks ask one variant of the model something else than the first: "
                "they are not deterministic and need a model in memory"
            )
        return self._answers[self.variant]

    def _run(self, requests: Sequence[Encoded]) -> list[list[Answer]]:
        """Answers of every variant."""
        batches = _Batching(self._stream, self.tokenizer, self.batch_size).batches(requests)
        passes = [(variant, batch) for variant in range(len(self._within)) for batch in batches]
        found = run_shared(
            self._stream,
            [functools.partial(self._scored, requests, batch) for _, batch in passes],
            [batch.tokens.numel() for _, batch in passes],
            within=[self._within[variant] for variant, _ in passes],
        )
        answers: list[dict[int, Answer]] = [{} for _ in self._within]
        for (variant, batch), answered in zip(passes, found, strict=True):
            answers[variant] |= zip(batch.requests, answered, strict=True)
        return [[of_variant[number] for number in range(len(requests))] for of_variant in answers]

    def _scored(self, requests: Sequence[Encoded], batch: _Batch) -> list[Answer]:
        """The harness's answers to the requests of one batch."""
        one = copy.copy(self)
        one._expected = batch.tokens
        found: list[Answer] = HFLM._loglikelihood_tokens(one, [requests[n] for n in batch.requests], disable_tqdm=True)
        return found

    def _model_call(self, inps: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if self._expected is None or not torch.equal(inps.cpu(), self._expected):
            raise MoecoverError(
                "this version of lm-evaluation-harness puts requests into other batches when it is asked again: "
                "please report this"
            )
        logits: torch.Tensor = self.model(inps, use_cache=False).logits
        return logits
