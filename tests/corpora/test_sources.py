"""Named corpora, built in and added by a plugin, and corpora that arguments name."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from moecover.corpora.arguments import parse_corpora
from moecover.corpora.documents import FileCorpus, NamedCorpus
from moecover.corpora.hub import _one_try
from moecover.corpora.packing import load_corpus
from moecover.corpora.sources import CORPORA, Corpora
from moecover.errors import InputError
from tests.conftest import write_rows
from tests.support.tiny import TEXT, make_tokenizer

DOCUMENTS = [f"{i} " + TEXT * 4 for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["wikitxt2"], "unknown corpus 'wikitxt2'. Did you mean wikitext2"),
        (["c4", "c4"], "corpus c4 is given twice"),
        (["x=/nowhere/f.txt"], "corpus file /nowhere/f.txt does not exist"),
        (["x="], "there is no path after the equals sign"),
        (["=f.txt"], "give NAME=PATH"),
        (["x=~/nowhere/f.txt"], "corpus file /home/of/nowhere/f.txt does not exist"),
        (["x=/dev/null"], "corpus file /dev/null is no regular file. Pipe it into NAME=-"),
        (["x=owner/name"], "corpus file owner/name does not exist. Of the hub it would be hf:owner/name"),
        (["owner/name"], "corpus owner/name: give NAME=PATH for a file, NAME=hf:owner/name for a data set of the hub"),
        (["x=https://huggingface.co/datasets/o/n/tree/main"], "is an address of the hub. Write hf:o/n"),
        (["x=https://o.org/rows.jsonl"], "is an address. Fetch it, or pipe it into NAME=-"),
        ([], "no corpus"),
    ],
)
def test_bad_corpus_arguments(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of")
    with pytest.raises(InputError, match=message):
        parse_corpora(arguments)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that knows every commit."""

    def dataset_info(path: str, *, revision: str, timeout: float) -> types.SimpleNamespace:
        return types.SimpleNamespace(sha=revision, gated=False, siblings=[])

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: types.SimpleNamespace(dataset_info=dataset_info))


def stand_in(monkeypatch: pytest.MonkeyPatch, load_dataset: object) -> types.SimpleNamespace:
    """A `datasets` with this function; returns its configuration."""
    config = types.SimpleNamespace(STREAMING_READ_MAX_RETRIES=20)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, config=config))
    return config


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("name", ["wikitext2", "c4", "magicoder", "finemath", "aya"])
def test_hub_corpora_are_read_at_their_pinned_revision(name: str, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call on a stand-in for `datasets`: path, config, split, revision, and a seeded shuffle of the stream."""
    calls: list[tuple] = []

    class Stream(list):
        def shuffle(self, *, seed: int, buffer_size: int) -> Stream:
            calls.append(("shuffle", seed, buffer_size))
            return self

    def load_dataset(path: str, config: str, *, split: str, revision: str, streaming: bool) -> Stream:
        calls.append((path, config, split, revision, streaming))
        return Stream({CORPORA[name].key or "text": d, "content": "not this"} for d in DOCUMENTS)

    stand_in(monkeypatch, load_dataset)
    loaded = load_corpus(name, tokenizer=tokenizer, sequences=4, length=32, seed=5)
    row = CORPORA[name]
    assert calls[0] == (row.path, row.config, "train", row.revision, row.streaming)
    assert len(row.revision) == 40
    assert (("shuffle", 5, 10_000) in calls) == row.streaming
    assert loaded.record["source"] == f"{row.path}@{row.revision}"
    assert loaded.tokens.shape == (4, 32)


@pytest.mark.usefixtures("online")
def test_a_hub_that_does_not_answer_is_one_line(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nmore")

    stand_in(monkeypatch, load_dataset)
    with pytest.raises(
        InputError,
        match=r"from the hub: no route more. Check the connection, or give a local copy",
    ):
        load_corpus("c4", tokenizer=tokenizer)


@pytest.mark.usefixtures("online")
def test_a_stream_is_read_no_further_than_needed(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without twenty tries of `datasets` over those of the hub's client, where a connection is lost."""
    read, tries = [], []

    class Stream:
        def shuffle(self, **_: object) -> Stream:
            return self

        def __iter__(self):
            for i in range(1_000_000):
                read.append(i)
                tries.append(config.STREAMING_READ_MAX_RETRIES)
                yield {"text": DOCUMENTS[i % 40]}

    config = stand_in(monkeypatch, lambda *a, **k: Stream())
    load_corpus("c4", tokenizer=tokenizer, sequences=4, length=32)
    assert len(read) < 100
    assert (set(tries), config.STREAMING_READ_MAX_RETRIES) == ({1}, 20)
    first, second = _one_try(), _one_try()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # streams end in any order
    second.__exit__(None, None, None)
    assert config.STREAMING_READ_MAX_RETRIES == 20


def test_shipped_text_is_two_registers_of_60_kb_without_repetition() -> None:
    for name in ("encyclopedia", "web"):
        documents = [d for part in (name, f"{name}-heldout") for d in CORPORA[part].documents(0)]
        assert sum(len(d.encode()) for d in documents) > 60_000
        held_out = list(CORPORA[f"{name}-heldout"].documents(0))
        assert len(held_out) >= 10
        sentences = [s.strip() for d in documents for s in d.replace("\n", " ").split(". ") if len(s) > 40]
        assert len(sentences) == len(set(sentences))


def test_stdlib_parts_do_not_overlap() -> None:
    calibration, held_out = set(CORPORA["python"].documents(0)), set(CORPORA["python-heldout"].documents(0))
    assert not calibration & held_out
    assert 0.05 < len(held_out) / len(calibration) < 0.35


def test_every_corpus_row_says_its_licence() -> None:
    assert all(row.licence and row.summary for row in CORPORA.values())


USE = """
import json, sys
from pathlib import Path
from moecover import CORPORA, load_corpus
from moecover.checkpoints.structure import read_structure
from moecover.cli.main import main
from moecover.corpora.windows import load_windows

plugin, model = sys.argv[1:]
assert main(["ls", "corpora", "--plugin", plugin, "--plugin", plugin]) == 0  # a file may run twice
structure = read_structure(model)
corpus, held_out = load_corpus("tickets", structure=structure), load_windows("tickets", structure=structure)
print(json.dumps([corpus.record["sha256"], corpus.record["source"], held_out.record["source"]]))
out = str(Path(plugin).parent / "profile")
assert main(["profile", model, "--corpus", "tickets", "--corpus", "letters", "-o", out, "-q", "--json"]) == 0
"""


def test_a_plugin_adds_corpora_in_a_line_each(checkpoints, tmp_path: Path) -> None:
    """In a process of its own, so that no other test sees them."""
    from moecover.checkpoints.structure import read_structure

    rows = write_rows(tmp_path / "tickets.jsonl", [{"text": d} for d in DOCUMENTS])
    write_rows(tmp_path / "later.jsonl", [{"text": d} for d in DOCUMENTS[:9]])
    plugin = tmp_path / "mine.py"
    plugin.write_text(f"""
from pathlib import Path
from moecover import CORPORA
from moecover.corpora.documents import FileCorpus, NamedCorpus

HERE = Path({str(tmp_path)!r})
CORPORA.add("tickets", FileCorpus(HERE / "tickets.jsonl", summary="support tickets", held_out=HERE / "later.jsonl"))

class Letters(NamedCorpus):
    summary, licence = "letters of the alphabet", "none"

    def documents(self, seed):
        return (chr(97 + i % 26) * 9 for i in range(9000))

CORPORA.add("letters", Letters())
""")
    model = checkpoints("mixtral")
    done = subprocess.run(
        [sys.executable, "-c", USE, str(plugin), str(model)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (listed,) = [line for line in lines if line.startswith("tickets ")]
    assert listed.split(maxsplit=1)[1] == f"support tickets  [{rows}]"
    (listed,) = [line for line in lines if line.startswith("letters ")]
    assert listed.split(maxsplit=1)[1] == "letters of the alphabet  [none]"
    same = load_corpus("tickets", rows, structure=read_structure(model))
    assert [same.record["sha256"], "tickets.jsonl", "later.jsonl"] in [
        json.loads(line) for line in lines if line.startswith("[")
    ]
    assert list((tmp_path / "profile").iterdir())


class Letters(NamedCorpus):
    summary, licence = "letters", "none"

    def documents(self, seed: int) -> Iterator[str]:
        return iter(["a", "b"])


def test_names_of_corpora_are_kept_apart() -> None:
    mine = FileCorpus("a.jsonl", "mine")
    table = Corpora({"one": mine})
    table.add("one", FileCorpus("a.jsonl", "mine"))  # the same once more
    with pytest.raises(InputError, match="corpus one exists already. Choose another name"):
        table.add("one", FileCorpus("b.jsonl", "other"))
    for name in ("", "a/b", "a=b"):
        with pytest.raises(InputError, match="Choose another name"):
            table.add(name, mine)
    table.add("two", Letters())
    assert list(table) == ["one", "two"]
    with pytest.raises(InputError, match="unknown corpus 'tow'. Did you mean two"):
        table["tow"]


def test_a_corpus_of_ones_own_needs_only_its_documents() -> None:
    corpus = Letters()
    assert [row["text"] for row in corpus.rows(0)] == ["a", "b"]
    assert (corpus.source("x"), corpus.address, corpus.has_held_out, corpus.streaming) == ("x", "", False, False)


def test_a_named_file_gives_token_ids_too(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "ids.jsonl", [{"input_ids": [1, 2, 3]}])
    corpus = FileCorpus(path)
    assert list(corpus.rows(0)) == [{"input_ids": [1, 2, 3]}]
    with pytest.raises(InputError, match="row 1 holds token ids .`input_ids`., and text is needed here"):
        list(corpus.documents(0))
