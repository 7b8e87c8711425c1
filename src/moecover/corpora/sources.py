"""Which corpora have a name of their own (`CORPORA`), and what the names of corpora are for.

A named corpus is one entry of `CORPORA`, built in or added by a plugin::

    from moecover.corpora.sources import CORPORA
    from moecover.corpora.documents import FileCorpus

    CORPORA.add("tickets", FileCorpus("/data/tickets.jsonl", summary="support tickets"))

All that lists or reads named corpora looks them up there.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence

from moecover.corpora.documents import NamedCorpus, ShippedCorpus, StdlibCorpus
from moecover.corpora.hub import HubCorpus
from moecover.errors import InputError
from moecover.registry import unknown_name

ALL_CORPORA = "pooled"  # in plans, the key of what holds for all corpora together; no corpus can have it as its name
LONGEST_NAME = 100  # characters


def check_name(name: object) -> None:
    """Refuse a name that no corpus can have: it is part of tensors' names, of file names and of option values.

    Raises:
        InputError: not a text of 1 to `LONGEST_NAME` printable characters, a / or = in it, or `ALL_CORPORA`.
    """
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > LONGEST_NAME:
        raise InputError(f"corpus {name!r}: a name has 1 to {LONGEST_NAME} printable characters. Choose another name")
    if "/" in name or "=" in name or name == ALL_CORPORA:
        raise InputError(
            f"corpus {name!r}: a name holds neither / nor =, and {ALL_CORPORA} stands for all corpora together. Choose "
            "another name"
        )


class Corpora(Mapping[str, NamedCorpus]):
    """Named corpora, in the order in which they were added."""

    def __init__(self, corpora: Mapping[str, NamedCorpus]) -> None:
        self._corpora = dict(corpora)

    def add(self, name: str, corpus: NamedCorpus) -> None:
        """Add a corpus.

        Args:
            name: for ``--corpus``, listings and files.
            corpus: where its text comes from.

        Raises:
            InputError: the name is taken by another corpus, or cannot be part of a tensor's name.
        """
        check_name(name)
        if name in self._corpora and not _same(self._corpora[name], corpus):
            raise InputError(f"corpus {name} exists already. Choose another name")
        self._corpora[name] = corpus

    def __getitem__(self, name: str) -> NamedCorpus:
        if name not in self._corpora:
            raise unknown_name("corpus", name, self._corpora)
        return self._corpora[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._corpora)

    def __len__(self) -> int:
        return len(self._corpora)


def _same(old: NamedCorpus, new: NamedCorpus) -> bool:
    """Whether a file that adds a corpus has run twice: an equal corpus, or one of the class of the same name."""
    names = [(type(corpus).__module__, type(corpus).__qualname__) for corpus in (old, new)]
    return old == new or (type(old) is not type(new) and names[0] == names[1])


CORPORA = Corpora(
    {
        "wikitext2": HubCorpus(
            summary="encyclopedic articles, train split",
            path="Salesforce/wikitext",
            config="wikitext-2-raw-v1",
            split="train",
            held_out="test",
            revision="b08601e04326c79dfdd32d625aee71d232d685c3",
            licence="CC BY-SA 3.0, GFDL",
            rows_are_lines=True,
        ),
        "c4": HubCorpus(
            summary="cleaned web crawl, train split, streamed",
            path="allenai/c4",
            config="en",
            split="train",
            held_out="validation",
            revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
            licence="ODC-BY 1.0, Common Crawl terms",
            streaming=True,
        ),
        "magicoder": HubCorpus(
            summary="answers to programming tasks in many languages, streamed",
            path="ise-uiuc/Magicoder-OSS-Instruct-75K",
            split="train",
            revision="5f839b1f368a76b161028bb9edff055db34022b2",
            licence="MIT",
            key="solution",
        ),
        "finemath": HubCorpus(
            summary="web pages of mathematics with their derivations, streamed",
            path="HuggingFaceTB/finemath",
            config="finemath-4plus",
            split="train",
            revision="e92b25a616738fe95dc186b64dfb19f9c8525594",
            licence="ODC-BY 1.0, Common Crawl terms",
            key="text",
        ),
        "aya": HubCorpus(
            summary="answers in 65 languages, written by their speakers, streamed",
            path="CohereLabs/aya_dataset",
            config="default",
            split="train",
            held_out="test",
            revision="f9ea04583f02a8f86404ff6c58bf75fe637df8a2",
            licence="Apache 2.0",
            key="targets",
        ),
        "ultrachat": HubCorpus(
            summary="dialogues, for models with a chat template, streamed",
            path="HuggingFaceH4/ultrachat_200k",
            split="train_sft",
            held_out="test_sft",
            revision="8049631c405ae6576f93f445c6b8166f76f5505a",
            licence="MIT",
        ),
        "encyclopedia": ShippedCorpus("articles written for this project, calibration part", "encyclopedia.jsonl"),
        "encyclopedia-heldout": ShippedCorpus("the same, held-out part", "encyclopedia-heldout.jsonl", held_out=True),
        "web": ShippedCorpus("web pages written for this project, calibration part", "web.jsonl"),
        "web-heldout": ShippedCorpus("the same, held-out part", "web-heldout.jsonl", held_out=True),
        "python": StdlibCorpus("source of the running interpreter's standard library", held_out=False),
        "python-heldout": StdlibCorpus("the same, modules that the shipped model was not trained on", held_out=True),
    }
)


def in_rows(corpora: Sequence[str]) -> list[str]:
    """Names of corpora, with consecutively numbered ones joined: self-1, self-2 ... self-8 become self-1..8."""

    def row(placed: tuple[int, str]) -> tuple[str, int | None]:
        place, name = placed
        stem, _, number = name.rpartition("-")
        return (stem, int(number) - place) if stem and number.isdecimal() else (name, None)

    parts = []
    for _, members in itertools.groupby(enumerate(corpora), key=row):
        names = [name for _, name in members]
        parts.append(names[0] if len(names) == 1 else f"{names[0]}..{names[-1].rpartition('-')[2]}")
    return parts


def set_name(corpora: Sequence[str], joint: str = "+") -> str:
    """The name of a calibration set: its corpora, see `in_rows`."""
    return joint.join(in_rows(corpora))


def set_folder(corpora: Sequence[str]) -> str:
    """The name of a calibration set as part of a file name; a long one is cut and ends in a hash."""
    name = set_name(corpora)
    return name if len(name.encode()) <= 100 else f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
