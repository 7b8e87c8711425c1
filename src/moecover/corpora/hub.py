"""Data sets of the hub: reads one at a fixed commit, row by row as it is needed, or what of it is on this machine.

Nothing of a data set is run: a set that is a script is refused. With ``HF_HUB_OFFLINE`` no request is made.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from moecover.corpora.documents import NamedCorpus
from moecover.corpora.formats import without_nulls
from moecover.corpora.forms import Row, documents
from moecover.corpora.grammar import HUB
from moecover.errors import InputError

SECONDS = 10  # that the hub has for its first answer
CLIENT_SECONDS = 30  # after which the client gives up by itself, later than `SECONDS`
SHUFFLED = 10_000  # rows among which a stream is shuffled
CONVERTED = "refs/convert/parquet"  # the revision where the hub keeps its own conversion of a data set
LOCAL = "or give a local copy as NAME=PATH"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class HubCorpus(NamedCorpus):
    """A data set of the hub.

    Attributes:
        path: the data set's id.
        config: the data set's configuration; None where it has one.
        split: read for calibration.
        held_out: the split that perplexity is measured on; None for the same.
        revision: commit, branch or tag; None for the newest.
        streaming: download only the rows that are used.
        rows_are_lines: whether the rows are lines of one text instead of documents.
        key: of a row that holds its text; None for the first of the known forms.
    """

    path: str
    split: str
    config: str | None = None
    held_out: str | None = None
    revision: str | None = None
    summary: str = "a data set of the hub"
    licence: str = ""
    streaming: bool = True
    rows_are_lines: bool = False
    key: str | None = None

    @property
    def has_held_out(self) -> bool:
        return self.held_out is not None

    @property
    def address(self) -> str:
        return self.path

    @property
    def place(self) -> str:
        """As a source is written, see `moecover.corpora.grammar`."""
        return f"{HUB}{self.path}{f'[{self.config}]' if self.config else ''}/{self.split}"

    def source(self, name: str) -> str:
        return f"{self.path}@{self.revision}"

    def resolved(self) -> HubCorpus:
        """The same at a commit.

        Raises:
            InputError: the hub does not answer within `SECONDS`, has no such data set or revision, asks for a login, or
                the set is a script; offline, nothing of it is on this machine.
        """
        if _offline():
            folder = _cached(self)
            return self if folder is None else replace(self, revision=folder.name)
        with _explained(self):
            return replace(self, revision=_within(SECONDS, lambda: _commit(self), f"corpus {self.path}", LOCAL))

    def rows(self, seed: int) -> Iterator[Row]:
        return self._rows(self.split, seed)

    def documents(self, seed: int) -> Iterator[str]:
        return (one for one in documents(self.rows(seed), f"corpus {self.path}") if isinstance(one, str))

    def held_out_rows(self, longest: int) -> Iterator[Row]:
        del longest
        return self._rows(self.held_out or self.split, None)

    def held_out_record(self, name: str) -> dict[str, str]:
        return {"source": self.source(name), "split": self.held_out or self.split}

    def _rows(self, split: str, seed: int | None) -> Iterator[Row]:
        with _explained(self), _one_try():
            data = _loaded(self, split)
            if self.streaming and seed is not None:
                data = data.shuffle(seed=seed, buffer_size=SHUFFLED)
            if self.rows_are_lines:
                yield {"text": "\n\n".join(row["text"] for row in data)}
            elif self.key is not None:
                yield from ({"text": row[self.key]} for row in data)
            else:
                yield from map(without_nulls, data)


@contextlib.contextmanager
def _explained(corpus: HubCorpus) -> Iterator[None]:
    """Turns what the clients of the hub raise within the block into one line with the next step."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(_explanation(corpus, error)) from error


@contextlib.contextmanager
def _one_try() -> Iterator[None]:
    """While a stream is read, a lost connection is tried again by the hub's own client, which takes half a minute.

    `datasets` would have it do that twenty times over, ten minutes without a word.
    """
    from datasets import config

    usual = _usual_tries()
    config.STREAMING_READ_MAX_RETRIES = 1
    try:
        yield
    finally:
        config.STREAMING_READ_MAX_RETRIES = usual


@functools.cache
def _usual_tries() -> int:
    """The library's own number, as it was before the first stream: streams may end in any order."""
    from datasets import config

    return int(config.STREAMING_READ_MAX_RETRIES)


def _explanation(corpus: HubCorpus, error: Exception) -> str:
    """What went wrong and what to do: the clients raise many unrelated types."""
    from huggingface_hub import errors

    what = f"corpus {corpus.path}"
    reason = " ".join(str(error).split()).partition(" For more information")[0]
    if isinstance(error, errors.GatedRepoError):
        return f"{what} is gated. Accept its terms on its page of the hub and log in (hf auth login), {LOCAL}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{what}: the hub has no such data set, or it is private. Check the id, log in (hf auth login), {LOCAL}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what} has no revision {corpus.revision}. Give another one, or leave it out"
    if "scripts are no longer supported" in reason:
        return _script(corpus)
    if isinstance(error, ValueError) and ("onfig" in reason or "split" in reason):
        return f"{what}: {reason}. Write hf:{corpus.path}[CONFIG]/SPLIT"
    return f"{what} could not be read from the hub: {reason}. Check the connection, {LOCAL}"


def _script(corpus: HubCorpus) -> str:
    return (
        f"corpus {corpus.path} is a script, and code of a data set is never run. Give revision={CONVERTED}, where the "
        f"hub keeps its own conversion of many such sets, {LOCAL}"
    )


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _commit(corpus: HubCorpus) -> str:
    """The commit of a revision; asks for the terms of a gated set and refuses a script."""
    from huggingface_hub import HfApi

    client = HfApi()
    found = client.dataset_info(corpus.path, revision=corpus.revision, timeout=CLIENT_SECONDS)
    if found.gated:
        client.auth_check(corpus.path, repo_type="dataset")
    if f"{corpus.path.rpartition('/')[2]}.py" in (file.rfilename for file in found.siblings or ()):
        raise InputError(_script(corpus))
    return str(found.sha)


def check_answers(what: str, remedy: str) -> None:
    """Refuse a job that needs the hub where that does not answer; offline, nothing is asked.

    Args:
        what: needs it.
        remedy: another way.

    Raises:
        InputError: no answer within `SECONDS`.
    """
    from huggingface_hub import constants, get_session

    if _offline():
        return
    try:
        _within(SECONDS, lambda: get_session().head(constants.ENDPOINT, timeout=CLIENT_SECONDS), what, remedy)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: the hub cannot be reached: {error}. Check the connection, {remedy}") from error


def _within(seconds: float, call: Callable[[], T], what: str, remedy: str) -> T:
    """What a call gives, if it does so in time: a look-up of a name, for one, has no limit of its own.

    Raises:
        InputError: it does not.
    """
    given, raised = list[T](), list[Exception]()

    def run() -> None:
        try:
            given.append(call())
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not given:
        raise InputError(
            f"{what}: the hub has not answered within {seconds:g} seconds. Check the connection, set HF_HUB_OFFLINE=1 "
            f"to use what is on this machine, {remedy}"
        )
    return given[0]


def _cached(corpus: HubCorpus) -> Path | None:
    """The folder of a data set in the hub's cache; None where it is not there, or nothing but its description is."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(corpus.path, repo_type="dataset", revision=corpus.revision, local_files_only=True)
        )
    except (OSError, ValueError):
        return None
    data = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    return folder if next(data, None) else None


def _loaded(corpus: HubCorpus, split: str) -> Any:
    """A split as `datasets` gives it: a stream, or a table on disk."""
    if _offline():
        return _on_this_machine(corpus, split)
    from datasets import load_dataset

    return load_dataset(corpus.path, corpus.config, split=split, revision=corpus.revision, streaming=corpus.streaming)


def _on_this_machine(corpus: HubCorpus, split: str) -> Any:
    """A split from the hub's cache (``hf download``) or from that of `datasets`.

    Raises:
        InputError: it is in neither.
    """
    from datasets import load_dataset

    if (folder := _cached(corpus)) is not None:
        return load_dataset(str(folder), corpus.config, split=split, streaming=corpus.streaming)
    try:
        data = load_dataset(corpus.path, corpus.config, split=split, revision=corpus.revision)
        return data.to_iterable_dataset() if corpus.streaming else data
    except Exception as error:
        at = f" --revision {corpus.revision}" if corpus.revision else ""
        raise InputError(
            f"corpus {corpus.path} is not on this machine, and HF_HUB_OFFLINE is set. Fetch it where there is a "
            f"connection (hf download {corpus.path} --repo-type dataset{at}), {LOCAL}"
        ) from error
