"""What an evaluation records of the model, the texts, the tasks and the plans, as evaluation.json has it."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class EndpointRecord(TypedDict):
    """The server that answered: ``url`` without credentials, the server's name of the model and of itself (``server``).

    ``max_length`` tokens of a prompt and what follows, ``num_concurrent`` requests at the same time.
    """

    url: str
    served_name: str
    protocol: str
    server: str
    max_length: int
    num_concurrent: int


class RanRecord(TypedDict, total=False):
    """How a model ran: sequences per forward pass here, or the server that ran it."""

    batch_size: int
    endpoint: EndpointRecord


class ModelRecord(RanRecord):
    """The model that was evaluated, and how it ran; ``num_bytes`` of its checkpoint, ``layers`` with experts.

    ``batch_size``, ``threads`` of the CPU and ``versions`` of the libraries change the last digits of every number.
    """

    name: str
    revision: str | None
    fingerprint: str
    family: str
    dtype: str
    device: str
    num_bytes: int
    experts: int
    top_k: int
    layers: int
    threads: NotRequired[int]
    versions: NotRequired[dict[str, str]]


class TokenizerRecord(TypedDict):
    """The tokenizer of a text; perplexities of different ones do not compare."""

    sha256: str
    entries: int


class TextRecord(TypedDict):
    """A held-out text: the record of its `Corpus`, and the share of it that calibration text holds too, by row.

    ``overlap`` has the rows where that share is worth mentioning, see `corpora.overlap`; ``bos`` the ids that every
    window begins with, none for most tokenizers; ``sequences`` windows of ``length`` tokens at most.
    """

    source: str
    sha256: str
    tokens: int
    sequences: int
    sketch: str
    overlap: dict[str, float]
    length: NotRequired[int]
    bos: NotRequired[list[int]]
    split: NotRequired[str]
    tokenizer: NotRequired[TokenizerRecord]
    seed: NotRequired[int]
    left_by: NotRequired[str]
    blocks_left: NotRequired[int]


class TaskRecord(TypedDict):
    """A task as it was run; ``metric`` enters the mean of tasks, ``data`` is where its documents come from.

    ``cut``: documents with a request longer than the model's positions, whose beginning the harness leaves out;
    ``overlap``: the share of the task's text that calibration text holds too, by row, where it is worth mentioning;
    ``bos``: the ids that the tokenizer puts before every request.
    """

    version: list[str | int | float]
    num_fewshot: int
    items: int
    metrics: list[str]
    metric: str
    parts: int
    data: str
    harness: str
    cut: NotRequired[int]
    overlap: NotRequired[dict[str, float]]
    bos: NotRequired[list[int]]


class SkipRecord(TypedDict):
    """The text that a skipping rule was made on, its tokens, and the mean number of experts per token on it."""

    text: str
    tokens: int
    active: float


class PlanRecord(TypedDict):
    """The plan of a row.

    ``width`` is the number of channels of thinner experts, ``top_k`` the experts per token where that is not the
    model's own number, ``fingerprint`` is `planning.artifact.kept_hash`, ``repair`` the kind of repair, ``merge`` the
    merge, ``skip`` the rule by which tokens skip experts, if any.
    """

    method: str
    options: dict[str, Any]
    keep: int
    width: NotRequired[int]
    fingerprint: str
    repair: NotRequired[str]
    merge: NotRequired[str]
    top_k: NotRequired[int]
    skip: NotRequired[SkipRecord]
