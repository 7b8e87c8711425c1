"""Rows of every form, each a small file with the tokens that it must give, and rows that are none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moecover.checkpoints.structure import read_structure
from moecover.corpora.encoding import Encoder
from moecover.corpora.forms import FORMS, Chat, documents
from moecover.corpora.loading import refused_text
from moecover.corpora.packing import load_corpus, load_unused
from moecover.corpora.windows import load_windows
from moecover.errors import InputError
from moecover.evaluation.held_out import check_held_out
from tests.conftest import write_rows
from tests.support.chats import OF_PARTS, TEMPLATE, word_tokenizer, words
from tests.support.tiny import make_tokenizer

PLAIN = word_tokenizer()
ASK = [{"role": "user", "content": "what is two"}, {"role": "assistant", "content": "four"}]
SAID = "<s> <user> what is two <assistant> four <end>"
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "weather"}}]}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]}]
CASES: dict[str, tuple[dict[str, Any], str, str]] = {  # a row, options, its tokens
    "text": ({"text": "hi there"}, "", "<s> hi there <end>"),
    "content": ({"content": "def a", "repo": "x"}, "", "<s> def a <end>"),
    "marks in a text are text": ({"text": "hi <s> <user>"}, "", "<s> hi < s > < user > <end>"),
    "unless they are asked for": ({"text": "hi <s> <user>"}, "?parse_special=yes", "<s> hi <s> <user> <end>"),
    "messages": ({"messages": ASK, "text": "rendered"}, "", SAID),
    "messages as JSON text": ({"messages": json.dumps(ASK)}, "", SAID),
    "another key": ({"messages": ASK, "raw": "hi"}, "?text=raw", "<s> hi <end>"),
    "another key of messages": ({"text": "hi", "chat": ASK}, "?text=chat", SAID),
    "tools": (
        {"messages": [ASK[0], CALL, {"role": "tool", "content": "sunny"}], "tools": [{"name": "weather"}]},
        "",
        "<s> <tools> weather <user> what is two <assistant> call weather <end> <tool> sunny",
    ),
    "tools as JSON text": (
        {"messages": ASK, "tools": '[{"name": "weather"}]'},
        "",
        "<s> <tools> weather <user> what is two <assistant> four <end>",
    ),
    "parts": ({"messages": PARTS}, "", "<s> <user> hi there"),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "what is two"}, {"from": "gpt", "value": "four"}]},
        "",
        SAID,
    ),
    "ShareGPT with a system prompt": (
        {"system": "be kind", "conversations": [{"from": "human", "value": "hi"}]},
        "",
        "<s> <system> be kind <user> hi",
    ),
    "messages under ShareGPT's key": ({"conversations": ASK}, "", SAID),
    "prompt, completion": ({"prompt": "what is two", "completion": "four"}, "", SAID),
    "prompt, completion of messages": ({"prompt": ASK[:1], "completion": ASK[1:]}, "", SAID),
    "instruction": ({"instruction": "what", "input": "is two", "output": "four"}, "", SAID),
    "instruction without input": ({"instruction": "what is two", "input": "", "output": "four"}, "", SAID),
}


@pytest.mark.parametrize("case", CASES)
def test_a_row_gives_these_tokens(case: str, tmp_path: Path) -> None:
    row, options, expected = CASES[case]
    path = write_rows(tmp_path / "r.jsonl", [row])
    loaded = load_corpus("r", f"{path}{options}", tokenizer=PLAIN, length=len(expected.split()))
    assert words(PLAIN, loaded.tokens[0]) == expected


def test_every_form_has_a_case() -> None:
    seen = {next(form.name for form in FORMS if set(form.keys) <= set(row)) for row, *_ in CASES.values()}
    assert seen == {form.name for form in FORMS}


@pytest.mark.parametrize("template", [TEMPLATE, OF_PARTS])
def test_chats_are_what_apply_chat_template_gives(template: str) -> None:
    """Row by row, and in blocks one after the other; a block begins with BOS once, whoever writes it."""
    tokenizer = word_tokenizer(template=template)
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"hi {'a b ' * i}"}, {"role": "assistant", "content": "c"}]}
        for i in range(20)
    ]
    rows += [{"messages": PARTS}] if template == OF_PARTS else [CASES["tools"][0]]
    expected = [
        tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=True, return_dict=True)[
            "input_ids"
        ]
        for row in rows
    ]
    found = list(documents(rows, "here"))
    assert Encoder(tokenizer, "here").ids(found) == expected
    stream = [token for ids in expected for token in ids]
    assert stream.count(1) == len(rows)  # the template's own


def test_a_block_begins_with_one_bos(tmp_path: Path) -> None:
    """Chats of six tokens in blocks of six: every other block begins within a chat, and gets one."""
    rows = [{"messages": [{"role": "user", "content": "hi there a b"}]}] * 10
    path = write_rows(tmp_path / "r.jsonl", rows)
    loaded = load_corpus("r", path, tokenizer=PLAIN, length=6)
    assert {words(PLAIN, row) for row in loaded.tokens} == {"<s> <user> hi there a b"}
    loaded = load_corpus("r", path, tokenizer=PLAIN, length=9)
    assert loaded.record["bos"] == [1]
    assert [words(PLAIN, row) for row in loaded.tokens[:2]] == [
        "<s> <user> hi there a b <s> <user> hi",
        "<s> there a b <s> <user> hi there a",
    ]
    loaded = load_corpus("r", path, tokenizer=PLAIN, length=9, bos="never")
    assert words(PLAIN, loaded.tokens[1]) == "there a b <s> <user> hi there a b"


def test_chats_that_the_template_refuses_are_counted_and_named(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"messages": ASK}, {"messages": ASK[1:]}, {"messages": ASK}, {"messages": []}]
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}
    path = write_rows(tmp_path / "r.jsonl", [*rows, {"messages": [picture]}])
    loaded = load_corpus("r", path, tokenizer=PLAIN, length=8)
    assert [words(PLAIN, row) for row in loaded.tokens] == [SAID] * 2
    assert loaded.record["refused"] | {"reason": ""} == {"count": 3, "of": 5, "rows": [2, 4, 5], "reason": ""}
    assert refused_text(loaded).startswith(
        "note: corpus r: the chat template refuses 3 of 5 chats, which are left out "
    )
    assert "(row 2, 4, 5)" in refused_text(loaded)
    write_rows(path, [{"messages": ASK[1:]}])
    with pytest.raises(InputError, match="the chat template refuses every row, row 1 because: the user must begin"):
        load_corpus("r", path, tokenizer=PLAIN, length=7)


def test_a_template_of_ones_own_and_none(tmp_path: Path) -> None:
    path, bare = write_rows(tmp_path / "r.jsonl", [{"messages": ASK}]), word_tokenizer(template=None)
    with pytest.raises(InputError, match="tokenizer has no chat template. Give one with --chat-template FILE"):
        load_corpus("r", path, tokenizer=bare, length=7)
    template = tmp_path / "t.jinja"
    template.write_text("{% for message in messages %}<user> {{ message.content }}{% endfor %}")
    loaded = load_corpus("r", f"{path}?chat_template={template}", tokenizer=bare, length=7)
    assert words(bare, loaded.tokens[0]) == "<s> <user> what is two <user> four"
    template.write_text("{% for %}")
    with pytest.raises(InputError, match="the chat template is not Jinja: line 1"):
        load_corpus("r", f"{path}?chat_template={template}", tokenizer=bare, length=7)
    with pytest.raises(InputError, match="corpus r: chat template nowhere does not exist"):
        load_corpus("r", f"{path}?chat_template=nowhere", tokenizer=bare)


BAD = {
    "no known form has its keys .title, body.. Name the one that holds the text": ([{"title": 1, "body": "x"}], ""),
    "row 1: unknown field 'txt'. Did you mean text": ([{"text": "a"}], "?text=txt"),
    "row 2 has no `text`; rows with and without it do not mix": ([{"text": "a"}, {"content": "a"}], ""),
    "row 1: `text` is null. Leave out rows without text": ([{"text": None, "n": 1}], ""),
    "row 2: token id 99 is out of range. Allowed: 0 to 50": ([{"input_ids": [1, 2]}, {"input_ids": [1, 99]}], ""),
    "row 1: `input_ids` must be a list of whole numbers": ([{"input_ids": "1 2"}], ""),
    "row 2: `text` holds a number, it must be text": ([{"text": "a"}, {"text": 3}], ""),
    "row 1: `messages` is text that is not JSON": ([{"messages": "hi"}], ""),
    "row 1: `messages` holds an object, it must be a list of objects": ([{"messages": {"role": "user"}}], ""),
    "row 1: `messages` has no `role` in message 1 .keys: content": ([{"messages": [{"content": "a"}]}], ""),
    "row 1: `messages` holds a number as `content`": ([{"messages": [{"role": "user", "content": 3}]}], ""),
    "row 1: `conversations` has the `from` 'bot' in turn 1. Known: human": (
        [{"conversations": [{"from": "bot", "value": "a"}]}],
        "",
    ),
    "row 1: `conversations` has no text as `value` of turn 1": ([{"conversations": [{"from": "gpt"}]}], ""),
    "row 1: `completion` holds a number, it must be text": ([{"prompt": "a", "completion": 3}], ""),
    "row 1: `tools` is text that is not JSON": ([{"messages": ASK, "tools": "weather"}], ""),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_rows_are_named_with_file_row_and_key(message: str, tmp_path: Path) -> None:
    rows, options = BAD[message]
    path = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(InputError, match=f"bad.jsonl.*{message}"):
        load_corpus("r", f"{path}{options}", tokenizer=PLAIN, length=2, vocab_size=51)


def test_bad_rows_of_a_folder_are_named_with_their_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write_rows(tmp_path / "a.jsonl", [{"text": "hi"}] * 3)
    for rows, message in (
        ([{"text": "a"}, {"body": "a"}], "deep/b.jsonl, row 2 has no `text`"),
        ([{"text": 3}], "deep/b.jsonl, row 1: `text` holds a number"),
    ):
        write_rows(tmp_path / "deep/b.jsonl", rows)
        with pytest.raises(InputError, match=f"corpus r, {tmp_path}/{message}"):
            load_corpus("r", f"{tmp_path}?glob=**/*.jsonl", tokenizer=PLAIN, length=2)
    write_rows(tmp_path / "a.jsonl", [{"input_ids": [1]}])
    write_rows(tmp_path / "deep/b.jsonl", [{"input_ids": [1]}, {"input_ids": [-1]}])
    with pytest.raises(InputError, match="deep/b.jsonl, row 2: token id -1 is out of range"):
        load_corpus("r", f"{tmp_path}?glob=**/*.jsonl")


def test_windows_of_chats(checkpoints: Any, tmp_path: Path) -> None:
    """Held-out text has the same forms: the chats one after the other, in the order of the file."""
    folder = tmp_path / "m"
    shutil.copytree(checkpoints("qwen2_moe"), folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}<end>{% endfor %}"
    tokenizer.save_pretrained(folder)
    rows: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": f"{i} " * 9}]} for i in range(20)]
    path = write_rows(tmp_path / "r.jsonl", rows)
    expected = [i for row in rows for i in tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"]]
    made = load_windows("r", f"{path}?n=15", structure=read_structure(folder), length=16, windows=4)
    assert made.tokens.reshape(-1).tolist() == expected[:64]
    assert {"n": 15, "source": "r.jsonl"}.items() <= made.record.items()
    assert "chat_template" in made.record


def test_how_rows_are_read_is_recorded_and_blocks_that_are_left_are_read_alike(
    checkpoints: Any, tmp_path: Path
) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    path = write_rows(tmp_path / "r.jsonl", [{"raw": f"{i} some text <end> and more"} for i in range(40)])
    source = f"{path}?text=raw&n=30&sequences=3&seed=7&weight=2&parse_special=yes"
    made = load_corpus("r", source, structure=structure, sequences=9, length=16)
    record = {"source": "r.jsonl", "text": "raw", "n": 30, "weight": 2, "seed": 7, "sequences": 3, "eos": [0]}
    assert record.items() <= made.record.items()
    assert made.record["documents"] == 30
    left = load_unused("r", source, made.record, structure=structure, blocks=4)
    assert left.record["left_by"] == made.record["sha256"]
    assert isinstance(next(documents([{"messages": ASK}], "here")), Chat)


def test_a_named_corpus_is_read_again_as_it_was_read(checkpoints: Any) -> None:
    """Under another name and with options too: the record names it."""
    structure, sources = read_structure(checkpoints("qwen2_moe")), ("web?n=9", "web?parse_special=yes", "web", "")
    for source, name in zip(sources, ("web", "mine", "other", "web"), strict=True):
        made = load_corpus(name, source, structure=structure, sequences=2, length=16)
        assert made.record["source"] == "web"
        again = check_held_out({name: [made.record]}, {})
        assert again == {name: source or None}
        assert load_unused(name, again[name], made.record, structure=structure, blocks=2).record["source"] == "web"
