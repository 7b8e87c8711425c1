"""The harness's model of a server of completions: reads its requests, gives the answers of the server.

What is sent and how an answer is read is `local-completions` of lm-evaluation-harness; tokens are the local
tokenizer's. The requests go through `completions.Server`, and what was answered before is not asked again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import normalize_gen_kwargs

from moecover.errors import MoecoverError
from moecover.evaluation.checked_requests import CheckedRequests

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from moecover.corpora.packing import Corpus
    from moecover.evaluation.answers import Answer, Answers
    from moecover.evaluation.completions import Server
    from moecover.evaluation.harness import Request

NEW_TOKENS = 256  # that a task generates where it does not say how many, as the harness has it in memory
UNREADABLE = (KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Served:
    """A model on a server.

    Attributes:
        server: that serves it.
        name: by which the server knows it.
        owner: what the server calls itself, ``vllm`` or ``llamacpp``; empty if it does not say.
        max_length: tokens of a prompt and what is generated from it, at most.
        logprobs: whether the server gives the log-probabilities of a prompt's tokens.
        place: where the server has the model from, a folder or hub id; empty if it does not say.
    """

    server: Server
    name: str
    owner: str
    max_length: int
    logprobs: bool = False
    place: str = ""


def prompt_logprobs(answer: dict[str, Any], prompts: Sequence[Sequence[int]]) -> bool:
    """Whether an answer to prompts with ``echo`` has the log-probability of every token of theirs but the first.

    Args:
        answer: of the server.
        prompts: token ids; one token was generated from each.
    """
    try:
        choices = answer["choices"]
        found = [choice["logprobs"]["token_logprobs"] for choice in choices]
        tops = [choice["logprobs"]["top_logprobs"] for choice in choices]
        return len(found) == len(prompts) and all(
            len(values) == len(ids) + 1 == len(top) and all(isinstance(value, (int, float)) for value in values[1:])
            for values, top, ids in zip(found, tops, prompts, strict=True)
        )
    except UNREADABLE:
        return False


class EndpointLM(CheckedRequests, LocalCompletionsAPI):  # type: ignore[misc]
    """A model on a server."""

    def __init__(
        self, served: Served, tokenizer: PreTrainedTokenizerBase, answers: Answers, of: str, **settings: Any
    ) -> None:
        """Stand for a model on a server.

        Args:
            served: the model.
            tokenizer: of its folder.
            answers: those that are known.
            of: what identifies the model's files.
            **settings: of `CheckedRequests`.
        """
        super().__init__(
            model=served.name,
            base_url=f"{served.server.url}/completions",
            tokenizer_backend="none",  # the tokenizer is set below
            num_concurrent=2,  # several at the same time; `get_batched_requests` says how many
            max_length=served.max_length,
            max_gen_toks=NEW_TOKENS,
            **settings,
        )
        self.tokenizer, self.tokenizer_backend, self.tokenized_requests = tokenizer, "huggingface", True
        self.add_bos_token = None  # as the tokenizer has it, see `tok_encode`
        self._served, self._answers, self._of = served, answers, of

    @property
    def longest(self) -> int:
        """Tokens of a context and its continuation that are not cut: one more is generated."""
        return int(self.max_length)

    def tok_encode(self, string: Any, add_special_tokens: bool | None = None, **kwargs: Any) -> Any:
        """Token ids of a text, or of several; as the harness's model in memory has them."""
        if isinstance(string, str):
            return HFLM.tok_encode(self, string, add_special_tokens)
        return [HFLM.tok_encode(self, one, add_special_tokens) for one in string]

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        self._ask(requests)
        for one in requests:
            new = normalize_gen_kwargs(one.args[1], NEW_TOKENS)["max_gen_toks"]
            if len(self.tok_encode(one.args[0])) > self.max_length - new:
                self.note_cut(one.args[0])
        found: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return found

    def window_sums(self, text: Corpus) -> NDArray[np.float64]:
        """Negative log-likelihoods of the windows of a text.

        Args:
            text: held-out windows of at most `longest` tokens.

        Returns:
            float64 ``[window, 4]``: summed negative log-likelihood in nats, number of scored tokens, 0, 0.
        """
        rows = [row[keep].tolist() for row, keep in zip(text.tokens, text.mask, strict=True)]
        names = [f"corpus {text.name}, window {number}" for number in range(len(rows))]
        asked = [(name, ids[:1], ids[1:]) for name, ids in zip(names, rows, strict=True)]
        found = self._loglikelihood_tokens(asked)
        return np.array([(-value, len(ids) - 1, 0, 0) for (value, _), ids in zip(found, rows, strict=True)])

    async def get_batched_requests(
        self,
        requests: Sequence[list[int]],
        cache_keys: Sequence[Any],
        *,
        generate: bool = True,
        ctxlens: Sequence[int] | None = None,
        gen_kwargs: dict[str, Any] | None = None,
    ) -> list[list[Answer]]:
        """Answers to requests, each in a list of its own; called by the harness in place of its own way.

        Raises:
            MoecoverError: see `completions.Server.ask`; the answers that came before are kept.
        """
        server = self._served.server
        turns = asyncio.Semaphore(server.num_concurrent)
        async with server.session() as session:

            async def answered(ids: list[int], name: Any, known: int) -> list[Answer]:
                payload = self._create_payload(
                    [ids], generate=generate, gen_kwargs=dict(gen_kwargs or {}), seed=self._seed
                )
                key = self._answers.key(self._of, payload, known)
                if (answer := self._answers.find(key)) is None:
                    await turns.acquire()
                    answer = await self._asked(session, payload, known, generate)
                    turns.release()  # not after an error: nothing more is to be asked then
                    self._pass_on(name, answer)
                    self._answers.keep(key, answer)
                else:
                    self._pass_on(name, answer)
                return [answer]

            lengths = ctxlens or [0] * len(requests)
            tasks = [
                asyncio.create_task(answered(ids, name, known))
                for ids, name, known in zip(requests, cache_keys, lengths, strict=True)
            ]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()

    async def _asked(self, session: ClientSession, payload: dict[str, Any], known: int, generate: bool) -> Answer:
        """The server's answer to one request; ``known`` tokens of it are its context."""
        found = await self._served.server.ask(session, "/completions", payload)
        try:
            if generate:
                (text,) = self.parse_generations(found)
                return str(text or "")
            if not prompt_logprobs(found, payload["prompt"]):
                raise ValueError("without the log-probability of every token of the prompt")
            ((value, best),) = self.parse_logprobs(found, ctxlens=[known])
            return float(value), bool(best)
        except UNREADABLE as error:
            raise MoecoverError(
                f"{self.base_url}: an answer is not what the OpenAI completions API has "
                f"({error or type(error).__name__}): the job cannot go on. "
                "The answers that came before are kept; the same command goes on with them"
            ) from error

    def _pass_on(self, name: Any, answer: Answer) -> None:
        """Check an answer and count it; windows of whole texts have no name."""
        if name is not None:
            self.add_partial("generate_until" if isinstance(answer, str) else "loglikelihood", name, answer)
