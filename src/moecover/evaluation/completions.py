"""A server of the OpenAI completions API: reads its address, posts requests to it, gives the JSON that it answers.

Every failure is one line. What may pass (too many requests, an overloaded server, a connection that breaks) is tried
again, see `waits`. The key comes from the environment alone and goes into no message and no record.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from moecover.errors import InputError, MoecoverError, arg
from moecover.files.reading import parse_json

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

KEY = "OPENAI_API_KEY"  # as lm-evaluation-harness has it
TIMEOUT = 300  # seconds for a request
AT_ONCE = 16  # requests that a server has at the same time
TRIES, FIRST_WAIT, LONGEST_WAIT = 6, 1.0, 60.0  # seconds
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be other ones a moment later
ADDRESS = "http://HOST:PORT/v1"


def server_at(endpoint: str, *, timeout: int | None = None, num_concurrent: int | None = None) -> Server:
    """A server by its address.

    Args:
        endpoint: with or without ``/v1`` and ``/completions``.
        timeout: seconds for a request; None for `TIMEOUT`.
        num_concurrent: requests at the same time; None for `AT_ONCE`.

    Raises:
        InputError: no address of HTTP, or one with a user, a password or a query in it.
    """
    given = endpoint.strip().rstrip("/").removesuffix("/completions")
    try:
        parts = urlsplit(given)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if "@" in given or parts.query:  # no word of it: a password may have @ and / in it
        raise InputError(
            f"{arg('endpoint')} has a user, a password or a query in its address. Give {ADDRESS}, and a key "
            f"as {KEY} in the environment"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"{arg('endpoint', endpoint)} is no address of a server. Give {ADDRESS}")
    name = f"[{host}]" if ":" in host else host
    url = f"{parts.scheme}://{name}{'' if port is None else f':{port}'}{parts.path or '/v1'}"
    return Server(url, timeout or TIMEOUT, num_concurrent or AT_ONCE)


def waits(tries: int) -> Iterator[float | None]:
    """Seconds to wait after every try, twice as long each time; None after the last one."""
    for number in range(tries - 1):
        yield min(FIRST_WAIT * 2**number, LONGEST_WAIT)
    yield None


def _said(text: str) -> str:
    """What a server says of an error, in words: its message if its JSON has one."""
    try:
        found = parse_json(text)
        inner = found.get("error") or found.get("message") or found.get("detail") or found
        said = inner.get("message", inner) if isinstance(inner, dict) else inner
    except (ValueError, AttributeError):
        said = text
    return str(said).strip() or "no reason given"


class _PassingError(Exception):
    """A failure that may be over after a moment; ``seconds`` as the server asks for, 0 if it does not."""

    def __init__(self, text: str, seconds: float = 0) -> None:
        super().__init__(text)
        self.seconds = seconds


@dataclass(frozen=True)
class Server:
    """A server.

    Attributes:
        url: what ``/completions`` and ``/models`` follow; without credentials.
        timeout: seconds for a request.
        num_concurrent: requests at the same time.
    """

    url: str
    timeout: int = TIMEOUT
    num_concurrent: int = AT_ONCE

    def session(self) -> ClientSession:
        """A session of the HTTP client, for `ask`; to be opened within a running loop."""
        from aiohttp import ClientSession, ClientTimeout, TCPConnector

        key = os.environ.get(KEY, "")
        return ClientSession(
            connector=TCPConnector(limit=self.num_concurrent),
            timeout=ClientTimeout(total=self.timeout),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )

    async def ask(
        self, session: ClientSession, path: str, payload: dict[str, Any] | None = None, *, tries: int = TRIES
    ) -> dict[str, Any]:
        """Ask the server, again where a failure may pass.

        Args:
            session: from `session`.
            path: ``/models`` or ``/completions``.
            payload: to be posted; None gets.
            tries: at most.

        Returns:
            A JSON object.

        Raises:
            InputError: the server cannot be reached at the first try, refuses the key, or does not know the path, the
                model or a parameter.
            MoecoverError: it did not answer in time, or each try failed, or the answer is not JSON.
        """
        for wait in waits(tries):
            try:
                return await self._once(session, path, payload)
            except _PassingError as failure:
                if wait is None:
                    kind = InputError if tries == 1 else MoecoverError
                    many = f", the last of {tries} tries" if tries > 1 else ""
                    raise kind(
                        f"{self.url}{path}: {failure}{many}. Is the server running there, and has it loaded its model? "
                        f"Give its address as {arg('endpoint', ADDRESS)}, or a smaller {arg('num_concurrent')}"
                    ) from failure
                await asyncio.sleep(max(wait, min(failure.seconds, LONGEST_WAIT)))
        raise AssertionError("the last wait is None")

    async def _once(self, session: ClientSession, path: str, payload: dict[str, Any] | None) -> dict[str, Any]:
        from aiohttp import ClientError

        method = "GET" if payload is None else "POST"
        try:
            async with session.request(method, self.url + path, json=payload, allow_redirects=False) as answer:
                text = (await answer.read()).decode(errors="replace")
        except TimeoutError as error:
            raise MoecoverError(
                f"{self.url}{path}: no answer within {self.timeout} seconds. Give a longer "
                f"{arg('timeout', 'SECONDS')}, or a smaller {arg('num_concurrent')} than {self.num_concurrent}"
            ) from error
        except (ClientError, OSError) as error:
            raise _PassingError(f"the connection failed ({error or type(error).__name__})") from error
        self._check_status(answer, path, text)
        try:
            found = parse_json(text)
        except ValueError as error:
            raise MoecoverError(
                f"{self.url}{path} answered something else than JSON: {text[:80]!r}. Is it an OpenAI-compatible server "
                f"of completions ({ADDRESS})?"
            ) from error
        if not isinstance(found, dict):
            raise MoecoverError(f"{self.url}{path} answered {json.dumps(found)[:80]}, where a JSON object is expected")
        return found

    def _check_status(self, answer: ClientResponse, path: str, text: str) -> None:
        """Refuse an answer that is an error."""
        status = answer.status
        if status == 200:
            return
        said = f"status {status} ({_said(text)[:200]})"
        if status in PASSING:
            asked = answer.headers.get("Retry-After", "")
            raise _PassingError(said, float(asked) if asked.isdecimal() else 0)
        at = f"{self.url}{path}: {said}"
        if status in (401, 403):
            raise InputError(f"{at}. Give the server's key as {KEY} in the environment")
        if 300 <= status < 400:
            raise InputError(f"{at}: it redirects. Give the address that it names, {answer.headers.get('Location')}")
        if status == 404:
            raise InputError(
                f"{at}. Give {arg('endpoint', ADDRESS)}, and as {arg('served_name')} a model of {self.url}/models"
            )
        if status < 500:
            raise InputError(f"{at}: the server does not take such a request")
        raise MoecoverError(f"{at}: the server failed")
