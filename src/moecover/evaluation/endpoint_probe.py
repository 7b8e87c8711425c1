"""What a server can do for an evaluation, asked before the long job: reads its answers to four small requests.

Which models it serves, whether its tokens are those of the local tokenizer, whether it takes token ids, and whether it
gives the log-probabilities of a prompt's tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moecover.errors import InputError, MoecoverError, arg
from moecover.evaluation.endpoint_model import Served, prompt_logprobs

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from transformers import PreTrainedTokenizerBase

    from moecover.evaluation.completions import Server

TEXT = 'The mill stands by the river since 1874: Größe, 東京, naïve.\n\n\tif (x != 0x1F) { return "a  b"; }'
SHOWN = 5  # models that a message lists


async def probe(
    server: Server, tokenizer: PreTrainedTokenizerBase, *, served_name: str | None, positions: int | None
) -> Served:
    """Find the model on a server, and what the server gives.

    Args:
        server: to be asked.
        tokenizer: of the model's folder.
        served_name: by which the server knows the model; None for the only one that it lists.
        positions: of the model, None where its configuration does not say.

    Raises:
        InputError: no such server or model, or the server's tokens are others than the tokenizer's.
        MoecoverError: the server does not answer in time, or not as the API has it.
    """
    async with server.session() as session:
        found = await _model(server, session, served_name)
        name, stated = str(found["id"]), _stated_length(found)
        longest = min(stated or positions or 2048, positions or stated or 2048)
        owner = str(found.get("owned_by") or "")
        await _check_tokens(server, session, name, tokenizer)
        ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][: longest - 1]
        answer = await server.ask(session, "/completions", _request(name, [ids], logprobs=1, echo=True))
        place = str(found.get("root") or "")
        return Served(server, name, owner, longest, prompt_logprobs(answer, [ids]), place)


async def _model(server: Server, session: ClientSession, served_name: str | None) -> dict[str, Any]:
    """The entry of the model in the server's list."""
    answer = await server.ask(session, "/models", tries=1)
    listed = answer.get("data")
    if not isinstance(listed, list) or not all(isinstance(one, dict) and "id" in one for one in listed):
        raise MoecoverError(f"{server.url}/models lists no models as the OpenAI API has it: {str(answer)[:80]}")
    names = [str(one["id"]) for one in listed]
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    if served_name is None and len(names) != 1:
        raise InputError(f"{server.url} serves {len(names)} models ({shown}). Say which: {arg('served_name', 'NAME')}")
    if served_name is not None and served_name not in names:
        raise InputError(f"{arg('served_name', served_name)}: {server.url} has no such model. It serves {shown}")
    found: dict[str, Any] = listed[0 if served_name is None else names.index(served_name)]
    return found


def _stated_length(model: dict[str, Any]) -> int | None:
    """The longest prompt with what follows that a server states for a model, in tokens."""
    about = model.get("meta")
    stated = [model.get("max_model_len"), *([about.get("n_ctx")] if isinstance(about, dict) else [])]
    return next((value for value in stated if isinstance(value, int) and value > 1), None)


def _request(name: str, prompt: object, **settings: object) -> dict[str, Any]:
    return {"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0, **settings}


async def _check_tokens(server: Server, session: ClientSession, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a server that makes another number of tokens of `TEXT`; one that does not say how many passes."""
    answer = await server.ask(session, "/completions", _request(name, TEXT))
    used = answer.get("usage")
    theirs = used.get("prompt_tokens") if isinstance(used, dict) else None
    ours = {len(tokenizer(TEXT, add_special_tokens=special)["input_ids"]) for special in (False, True)}
    if isinstance(theirs, int) and theirs not in ours:
        raise InputError(
            f"{server.url} makes {theirs} tokens of a text of which the model's folder makes {min(ours)}: "
            f"{name} there is another model, or has another tokenizer. Give the folder that the server serves"
        )
