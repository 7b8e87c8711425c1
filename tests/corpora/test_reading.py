"""Long texts are read as far as they are used, and give what reading all of them gives."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from moecover.checkpoints.structure import read_structure
from moecover.corpora import streams, windows
from moecover.corpora.formats import file_rows
from moecover.corpora.packing import load_corpus
from moecover.corpora.pieces import pieces
from moecover.corpora.tokenizer import load_tokenizer
from moecover.corpora.windows import load_windows
from tests.support.tiny import TEXT, make_tokenizer

LINES = "".join(f"{i} {TEXT}{'x' * (i % 7)}\n\n" for i in range(4000))


@pytest.mark.parametrize("size", [1, 999, 20_000, 20_001, 10**9])
@pytest.mark.parametrize("text", [LINES[:90_000], "y" * 45_000, "", "\n" * 20_001])
def test_pieces_do_not_depend_on_how_the_text_arrives(text: str, size: int) -> None:
    """The rule on the whole text: cut behind the last line end within 20,000 characters, else after 20,000."""
    expected, rest = [], text
    while len(rest) > 20_000:
        end = rest.rfind("\n", 1, 20_000) + 1 or 20_000
        expected.append(rest[:end])
        rest = rest[end:]
    step = max(size, len(text) // 500)
    assert list(pieces(text[i : i + step] for i in range(0, len(text), step))) == [*expected, rest]


def test_a_text_file_is_read_as_far_as_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond lies what could not be read; and a short file gives the blocks that it always gave."""
    monkeypatch.setattr(streams, "CHUNK_CHARS", 1 << 12)
    path = tmp_path / "t.txt"
    path.write_bytes(LINES.encode() * 3 + b"\xff")
    wanted = {"tokenizer": make_tokenizer(), "sequences": 2, "length": 16}
    made = load_corpus("t", path, **wanted)
    assert made.tokens.shape == (2, 16)
    assert made.record["documents"] * 15_000 < 2 * len(LINES)
    wanted |= {"sequences": 8, "length": 32}  # for which all of the short file is read
    short = tmp_path / "s.txt"
    short.write_text(LINES[:60_000])
    as_rows = tmp_path / "s.jsonl"
    as_rows.write_text(json.dumps({"text": LINES[:60_000]}) + "\n")
    assert load_corpus("t", short, **wanted).record["sha256"] == load_corpus("t", as_rows, **wanted).record["sha256"]


def test_files_of_rows_are_read_as_far_as_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": f"{i} {TEXT}"}) + "\n" for i in range(5000)]
    plain, packed, table = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.parquet"
    plain.write_text("".join([*lines, "not JSON"]))
    packed.write_bytes(gzip.compress(plain.read_bytes())[:-4])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in lines]), table)
    sizes: list[int] = []
    each = pyarrow.parquet.ParquetFile.iter_batches

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        for batch in each(self, *args, **kwargs):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    for path in (plain, packed, table):
        assert [row["text"] for row in itertools.islice(file_rows(path), 3)] == [f"{i} {TEXT}" for i in range(3)]
    assert sum(sizes) < 1000


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
@pytest.mark.parametrize("number", [1, 3, 40])
def test_windows_of_a_long_text_are_those_of_all_of_it(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, number: int
) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    tokenizer = load_tokenizer(structure.checkpoint.path)
    assert tokenizer is not None
    path = tmp_path / f"t{ending}"
    path.write_text(LINES if ending == ".txt" else json.dumps({"text": LINES}) + "\n")
    tokenized: list[int] = []
    for chars in (windows.CHARS, 1):  # with too small a guess, more is read
        monkeypatch.setattr(windows, "CHARS", chars)
        made = load_windows("t", path, structure=structure, length=32, windows=number)
        expected = tokenizer(LINES, add_special_tokens=False, verbose=False)["input_ids"][: 32 * number]
        assert made.tokens.reshape(-1).tolist() == expected
    calls = type(tokenizer).__call__

    def counted(self: Any, text: str, *args: Any, **kwargs: Any) -> Any:
        tokenized.append(len(text))
        return calls(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    monkeypatch.setattr(windows, "CHARS", 8)
    load_windows("t", path, structure=structure, length=32, windows=1)
    assert sum(tokenized) < len(LINES) / 50


def test_the_last_window_of_a_text_that_ends(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """More windows than there are: the whole text with its end mark, and no memory for more than that."""
    structure = read_structure(checkpoints("qwen2_moe"))
    path = tmp_path / "t.txt"
    path.write_text(TEXT)
    made = load_windows("t", path, structure=structure, length=16, windows=10**10)
    tokenizer = make_tokenizer()
    assert made.tokens[made.mask].tolist() == [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id][: made.num_tokens]
    assert made.num_tokens >= len(tokenizer(TEXT)["input_ids"])
