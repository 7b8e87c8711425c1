"""An evaluation through a server that serves a written checkpoint: reads its folder's headers and tokenizer.

The weights are the server's; here are the texts, the tasks, and the harness.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

from moecover import rehearsal
from moecover.corpora.packing import Corpus, block_length
from moecover.corpora.tokenizer import load_tokenizer
from moecover.errors import InputError, arg
from moecover.evaluation.answers import kept_answers
from moecover.evaluation.artifact import FULL, Evaluation, Row, Score
from moecover.evaluation.completions import Server, server_at
from moecover.evaluation.given import load_texts
from moecover.evaluation.harness import quiet
from moecover.evaluation.notes import note_overlaps
from moecover.evaluation.perplexity import text_result
from moecover.evaluation.records import EndpointRecord
from moecover.evaluation.run import model_record, task_records, text_record
from moecover.evaluation.tasks import Tasks
from moecover.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moecover.checkpoints.source import Checkpoint
    from moecover.checkpoints.structure import Structure
    from moecover.evaluation.endpoint_model import EndpointLM, Served
    from moecover.runtime.options import RunOptions

T = TypeVar("T")
PROTOCOL = "OpenAI completions"
NEEDED = ("lm_eval", "aiohttp", "tenacity", "requests")  # the last three for the harness's API models


class EndpointOptions(TypedDict, total=False):
    """Keyword arguments on a server.

    Attributes:
        endpoint: address of a server that serves the checkpoint, ``http://HOST:PORT/v1``.
        served_name: the server's name of the model; None for the only one that it lists.
        num_concurrent: requests that the server has at the same time; None for 16.
        timeout: seconds for a request; None for 300.
    """

    endpoint: str | None
    served_name: str | None
    num_concurrent: int | None
    timeout: int | None


def checked_server(options: EndpointOptions, plans: object, run_options: RunOptions) -> Server | None:
    """The server that is asked for, None for none; refuses arguments that do not go together.

    Args:
        options: on the server.
        plans: of the model, as given.
        run_options: on how a model runs here.

    Raises:
        InputError: names the argument.
    """
    if (endpoint := options.get("endpoint")) is None:
        if stray := [name for name in EndpointOptions.__annotations__ if options.get(name) is not None]:
            raise InputError(f"{arg(stray[0])} goes with {arg('endpoint')}, and there is none")
        return None
    if plans:
        raise InputError(
            f"{arg('plan')} emulates a plan in a model that runs here, {arg('endpoint')} serves one checkpoint. Write "
            "the plan's with prune, serve it, and give its folder"
        )
    names = ("batch_size", "dtype", "device", "device_map", "memory_limit")
    if stray := [name for name in names if run_options.get(name) is not None]:
        raise InputError(
            f"{arg(stray[0])} says how a model runs here, with {arg('endpoint')} the server decides it. Leave it out"
            + (f", or give {arg('num_concurrent')}" if stray[0] == "batch_size" else "")
        )
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise InputError(f"{arg('endpoint')} needs {', '.join(missing)}: pip install 'moecover[tasks]'")
    return server_at(endpoint, timeout=options.get("timeout"), num_concurrent=options.get("num_concurrent"))


def outside_loop(work: Callable[[], T]) -> T:
    """Do work that runs event loops of its own, in a thread where one runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def evaluate_served(
    structure: Structure,
    server: Server,
    *,
    served_name: str | None,
    texts: Mapping[str, str | Corpus | None],
    tasks: Callable[[], Tasks] | None,
    windows: int | None,
    length: int | None,
    bos: str | None,
    output: Path | None,
    progress: Progress,
) -> Evaluation:
    """Measure a checkpoint that a server serves.

    Args:
        structure: of the folder that is served.
        server: from `checked_server`.
        served_name: see `EndpointOptions`.
        texts: see `given.load_texts`.
        tasks: reads the tasks; None for none.
        windows: see `given.load_texts`.
        length: see `given.load_texts`.
        bos: see `given.load_texts`.
        output: beside which answers are kept until the job is done; None keeps none.
        progress: shows bars and lines.

    Returns:
        One row, of the model itself.

    Raises:
        InputError: the server does not serve the folder's model, or gives no log-probabilities where they are needed.
        MoecoverError: the server fails; answers that came before are kept.
    """
    from moecover.evaluation.endpoint_model import EndpointLM
    from moecover.evaluation.endpoint_probe import probe

    checkpoint = structure.checkpoint
    tokenizer = load_tokenizer(checkpoint.folder) if checkpoint.folder is not None else None
    if tokenizer is None:
        raise InputError(
            f"{arg('endpoint')} needs the folder that the server serves, with its tokenizer: {checkpoint.name} is none"
        )
    positions = checkpoint.text_config.get("max_position_embeddings")
    with progress.spinner(f"asking {server.url}"):
        served = outside_loop(
            lambda: asyncio.run(probe(server, tokenizer, served_name=served_name, positions=positions))
        )
    if note := _another_model(served, checkpoint):
        progress.say(note)
    _check_logprobs(served, "texts", list(texts))
    longest = served.max_length - 1  # one token is generated
    fits = _window_length(length, positions, longest, texts, progress)
    loaded = load_texts(texts, structure, length=fits, windows=windows, bos=bos, progress=progress)
    _check_windows(loaded, longest)
    note_overlaps(loaded, {}, structure, progress)
    found = None if tasks is None else tasks()
    if found is not None:
        _check_logprobs(served, "tasks", list(found.choosing()))
        found.check_room(served.max_length)
    rehearsal.ahead("run", f"requests to {server.url}")
    rehearsal.stop()
    with quiet(), kept_answers(output) as answers:
        if answers.kept:
            progress.say(f"{answers.kept:,} answers are there from an earlier attempt")

        def model(advance: Callable[[int], None]) -> EndpointLM:
            return EndpointLM(served, tokenizer, answers, structure.model_fingerprint, answered=advance)

        return outside_loop(lambda: _measured(structure, served, model, loaded, found, progress))


def _another_model(served: Served, checkpoint: Checkpoint) -> str:
    """A note where no name that the server has for its model is the folder's; weights cannot be compared."""
    assert checkpoint.folder is not None
    ours = {checkpoint.folder.name, Path(checkpoint.name).name}
    theirs = {Path(one).name for one in (served.name, served.place) if one}
    if ours & theirs:
        return ""
    named = " from ".join(dict.fromkeys(one for one in (served.name, served.place) if one))
    return (
        f"note: the server serves {named}, the folder is {checkpoint.name}. Their weights are not compared: make sure "
        "that it is the same model"
    )


def _check_logprobs(served: Served, argument: str, names: Sequence[str]) -> None:
    """Refuse what needs the log-probabilities of a prompt's tokens where the server gives none."""
    if names and not served.logprobs:
        raise InputError(
            f"{arg(argument, ','.join(names))}: {served.server.url} ({served.owner or 'server'}) does not give the "
            "log-probabilities of a prompt's tokens (`echo` with `logprobs`). Allowed there: tasks that generate text. "
            "vLLM and SGLang give them; or evaluate the folder without "
            f"{arg('endpoint')}"
        )


def _window_length(
    length: int | None, positions: int | None, longest: int, texts: Mapping[str, object], progress: Progress
) -> int | None:
    """The length of windows: as given, or what is usual as far as it fits into a request."""
    if length is not None and length > longest:
        raise InputError(
            f"{arg('length', length)} is above the {longest} tokens that fit into a request to the server, beside one "
            f"that it generates. Give {arg('length', longest)} or less"
        )
    if length is None and texts and block_length(None, positions) > longest:
        progress.say(f"note: windows have {longest} tokens, the server takes {longest + 1} with the one it generates")
        return longest
    return length


def _check_windows(texts: Sequence[Corpus], longest: int) -> None:
    for text in texts:
        if text.tokens.shape[1] > longest:
            raise InputError(
                f"the windows of {text.name} have {text.tokens.shape[1]} tokens, a request to the server holds "
                f"{longest}. Load them with {arg('length', longest)} or less"
            )


def _measured(
    structure: Structure,
    served: Served,
    model: Callable[[Callable[[int], None]], EndpointLM],
    texts: Sequence[Corpus],
    tasks: Tasks | None,
    progress: Progress,
) -> Evaluation:
    """The evaluation of a model on a server."""
    sums = {}
    if texts:
        with progress.bar("measuring perplexity", sum(len(t.tokens) for t in texts), unit="windows") as advance:
            lm = model(advance)
            sums = {text.name: lm.window_sums(text) for text in texts}
    scores: dict[str, dict[str, Score]] = {}
    items: dict[str, dict[str, NDArray[np.float64]]] = {}
    if tasks is not None:
        with progress.bar("scoring tasks", tasks.num_requests, unit="requests") as advance:
            scores, items = tasks.score_with(model(advance))
    record: EndpointRecord = {
        "url": served.server.url,
        "served_name": served.name,
        "protocol": PROTOCOL,
        "server": served.owner,
        "max_length": served.max_length,
        "num_concurrent": served.server.num_concurrent,
    }
    experts, results = structure.topology.num_experts, {name: text_result(name, found) for name, found in sums.items()}
    row = Row(FULL, None, experts, experts, structure.checkpoint.num_bytes, results, scores)
    return Evaluation(
        model_record(structure, dtype="the server's dtype", device=served.server.url, endpoint=record),
        {text.name: text_record(text, {}, structure) for text in texts},
        {} if tasks is None else task_records(tasks, {}, structure),
        [row],
        {row.name: items} if items else {},
        {row.name: {name: found[:, :2] for name, found in sums.items()}},
    )
