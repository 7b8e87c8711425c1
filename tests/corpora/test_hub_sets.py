"""Data sets of the hub over the real clients, against a small HTTP server that plays the hub."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from moecover.corpora.grammar import hub_place, parse_source
from moecover.corpora.hub import HubCorpus
from moecover.corpora.sources import CORPORA
from tests.support.fake_hub import COMMANDS, COMMIT, TOKEN, Hub, in_process, served
from tests.support.tiny import TEXT

SETS = "someone/sets"
CARD = """---
configs:
- config_name: code
  data_files:
  - {split: train, path: code/train-*.parquet}
  - {split: test, path: code/test.parquet}
- config_name: more
  data_files: code/test.parquet
---
"""
NAMED = ("magicoder", "finemath", "aya", "ultrachat")
PINNED = f"hf:{SETS}[code]/train?text=body&n=30&revision={COMMIT}"


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    sets, chats, script, gated = (root / name for name in ("sets", "chats", "script", "gated"))
    for folder in (sets / "code", chats, script, gated):
        folder.mkdir(parents=True)
    (sets / "README.md").write_text(CARD)
    rows = [{"body": f"{i} {TEXT}" * 3, "path": f"{i}.py"} for i in range(60)]
    for part in range(2):
        table = pyarrow.Table.from_pylist(rows[30 * part : 30 * part + 30])
        pyarrow.parquet.write_table(table, sets / f"code/train-{part}.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"body": TEXT, "path": "x"}]), sets / "code/test.parquet")
    said = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT, "tool_calls": None}]
    (chats / "a.jsonl").write_text(lines([{"messages": said, "text": "rendered"}] * 20))
    (script / "script.py").write_text("raise SystemExit('it ran')\n")
    (gated / "train.jsonl").write_text(lines([{"text": TEXT}] * 20))
    repos = {SETS: sets, "someone/chats": chats, "someone/script": script, "someone/gated": gated}
    for name in NAMED:
        row = CORPORA[name]
        assert isinstance(row, HubCorpus)
        folder = repos[row.path] = root / name
        folder.mkdir()
        config = f"config_name: {row.config or 'default'}, data_files: [{{split: {row.split}, path: rows.jsonl}}]"
        (folder / "README.md").write_text(f"---\nconfigs:\n- {{{config}}}\n---\n")
        (folder / "rows.jsonl").write_text(
            lines([{row.key: TEXT, "lang": "x"} if row.key else {"messages": said}] * 20)
        )
    with served(repos, "datasets") as server:
        server.gated.add("someone/gated")
        yield server


# Gives for every source the record of its corpus, or the message; an address or OFFLINE says where the hub is then.
READ = """
import json, sys, time
import datasets, huggingface_hub
from moecover.corpora import hub
from moecover.corpora.packing import load_corpus
from moecover.errors import InputError
from tests.support.tiny import make_tokenizer
tokenizer = make_tokenizer()
tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
for source in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        if source == "DOWNLOAD":
            for name in ("someone/sets", "someone/chats"):
                huggingface_hub.snapshot_download(name, repo_type="dataset")
            made = {}
        elif source == "ANSWERS":
            hub.check_answers("the task x", "or give files")
            made = {}
        elif source == "OFFLINE":
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = made = True
        elif source.startswith("http"):
            huggingface_hub.constants.ENDPOINT, hub.SECONDS = source, 0.5
            made = {}
        else:
            made = load_corpus("x", source, tokenizer=tokenizer, sequences=4, length=32).record
    except InputError as error:
        made = str(error)
    print(json.dumps([made, time.monotonic() - start]))
"""


def read(hub: Hub, cache: Path, *sources: str, **environment: str) -> list[Any]:
    return [made for made, _ in in_process(hub.url, cache, READ, sources, **environment)]


def test_data_sets_are_read_at_a_commit_and_every_failure_is_a_line(hub: Hub, tmp_path: Path) -> None:
    sources = {
        f"hf:{SETS}[code]?text=body&n=30": "",
        PINNED: "",
        "hf:someone/chats/train": "",
        f"hf:{SETS}[code]/test?text=body": "gives 1 block of 32 tokens, 4 are wanted",
        f"hf:{SETS}[code]?text=boddy": "row 1: unknown field 'boddy'. Did you mean body? Known: body, path",
        f"hf:{SETS}[code]": "row 1: no known form has its keys (body, path)",
        f"hf:{SETS}": "Config name is missing",
        f"hf:{SETS}[cod]": "'cod' not found. Available: ['code', 'more']. Write hf:someone/sets[CONFIG]/SPLIT",
        f"hf:{SETS}[code]/trian": "Bad split: trian. Available splits: ['train', 'test']",
        f"hf:{SETS}?revision=v9": "corpus someone/sets has no revision v9. Give another one",
        "hf:someone/script": "someone/script is a script, and code of a data set is never run. Give revision=refs",
        "hf:someone/gated": "someone/gated is gated. Accept its terms on its page of the hub and log in (hf auth",
        "hf:someone/stes": "corpus someone/stes: the hub has no such data set, or it is private",
    }
    found = dict(zip(sources, read(hub, tmp_path, *sources), strict=True))
    for source, message in sources.items():
        if message:
            assert message in found[source], source
    newest, again, chats = list(found.values())[:3]
    assert newest == again
    assert newest["source"] == PINNED
    assert newest["n"] == 30 >= newest["documents"]
    assert parse_source(newest["source"], "x").options["revision"] == COMMIT
    assert "chat_template" in chats
    assert "eos" not in chats


def test_sets_with_a_name_of_their_own(hub: Hub, tmp_path: Path) -> None:
    """Each at its pinned commit, from the key of its text; held-out text is another split."""
    found = read(hub, tmp_path, *NAMED)
    for name, record in zip(NAMED, found, strict=True):
        row = CORPORA[name]
        assert isinstance(row, HubCorpus)
        assert record["source"].startswith(f"{row.path}@"), record
        assert record["sequences"] == 4
        assert row.revision is not None
        assert len(row.revision) == 40


def test_no_connection_and_what_is_on_this_machine(hub: Hub, tmp_path: Path) -> None:
    """A hub that refuses and one that is silent; then offline, a set that was downloaded and one that was not."""
    silent = socket.create_server(("127.0.0.1", 0))
    closed = socket.create_server(("127.0.0.1", 0))
    urls = [f"http://127.0.0.1:{one.getsockname()[1]}" for one in (silent, closed)]
    closed.close()
    asked = [
        "DOWNLOAD",
        PINNED,
        urls[1],
        PINNED,
        urls[0],
        PINNED,
        "ANSWERS",
        "OFFLINE",
        PINNED,
        "hf:someone/chats",
        "hf:a/b",
        "c4",
    ]
    found = in_process(hub.url, tmp_path, READ, asked)
    silent.close()
    _, online, _, refused, _, unanswered, task, _, offline, chats, absent, named = [made for made, _ in found]
    assert "Connection refused" in refused
    assert "the hub has not answered within 0.5 seconds. Check the connection, set HF_HUB_OFFLINE=1" in unanswered
    assert "the task x: the hub has not answered within 0.5 seconds" in task
    assert offline["sha256"] == online["sha256"]
    assert offline["source"] == online["source"] == PINNED
    assert chats["source"] == f"hf:someone/chats/train?revision={COMMIT}"
    assert (
        "corpus a/b is not on this machine, and HF_HUB_OFFLINE is set. Fetch it where there is a connection" in absent
    )
    assert "hf download allenai/c4 --repo-type dataset --revision 1588ec" in named
    assert all(seconds < 5 for (_, seconds), source in zip(found, asked, strict=True) if source in ("hf:a/b", "c4"))


def test_a_gated_set_after_a_login_calibrates_a_profile(
    hub: Hub, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """And a plan finds the blocks that the profile did not use by the recorded source alone."""
    model, profile = checkpoints("qwen2_moe"), tmp_path / "p"
    commands = [
        ["profile", model, "--corpus", f"x=hf:{SETS}[code]?text=body", "--corpus", "y=hf:someone/gated", "-o", profile],
        [
            "plan",
            profile,
            "--model",
            model,
            "--max-perplexity-increase",
            "50%",
            "--windows",
            2,
            "-o",
            tmp_path / "plan",
        ],
    ]
    commands[0] += ["--sequences", "4", "--length", "32"]
    given = [list(map(str, one)) for one in commands]
    done = in_process(hub.url, tmp_path / "cache", COMMANDS, given, HF_TOKEN=TOKEN)
    assert [status for status, *_ in done] == [0, 0], done


def test_places_of_the_hub() -> None:
    assert hub_place("hf:a/b", "x") == ("a/b", None, "train")
    assert hub_place("hf:a/b[c-1]/d", "x") == ("a/b", "c-1", "d")
    assert hub_place("hf:a/b/d", "x") == ("a/b", None, "d")
