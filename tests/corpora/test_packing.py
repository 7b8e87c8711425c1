"""Corpora by name and by path: formats, packing, sampling, hashes and what is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from moecover.corpora.arguments import parse_corpora
from moecover.corpora.packing import load_corpus
from moecover.corpora.tokenizer import load_tokenizer
from moecover.errors import InputError
from tests.conftest import SHARED, needs_shared, write_rows
from tests.support.tiny import TEXT, make_tokenizer

DOCUMENTS = [f"{i} " + TEXT * 4 for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def text_files(tmp_path: Path) -> dict[str, Path]:
    """The same documents in every format of rows."""
    rows = [{"text": d} for d in DOCUMENTS]
    plain = write_rows(tmp_path / "a.jsonl", rows)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    table = tmp_path / "c.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    return {"jsonl": plain, "gz": packed, "parquet": table}


def test_every_format_gives_the_same_tokens(text_files: dict[str, Path], tokenizer) -> None:
    hashes = {
        load_corpus("x", path, tokenizer=tokenizer, sequences=8, length=32).record["sha256"]
        for path in text_files.values()
    }
    assert len(hashes) == 1


def test_blocks_are_packed_from_whole_documents_with_an_end_mark(text_files: dict[str, Path], tokenizer) -> None:
    loaded = load_corpus("x", text_files["jsonl"], tokenizer=tokenizer, length=32)
    every = load_corpus(
        "x", text_files["jsonl"], tokenizer=tokenizer, length=32, sequences=loaded.record["blocks_available"]
    )
    stream = tokenizer.decode(every.tokens.reshape(-1))
    documents = stream.split("<end>")
    assert set(documents[:-1]) <= set(DOCUMENTS)
    assert len(documents[:-1]) >= len(DOCUMENTS) - 1
    assert every.mask.all()


def test_the_sample_is_seeded_and_without_repeats(text_files: dict[str, Path], tokenizer) -> None:
    """Guards against an unseeded choice of calibration blocks."""

    def load(seed: int):
        return load_corpus("x", text_files["jsonl"], tokenizer=tokenizer, sequences=5, length=16, seed=seed)

    assert load(1).record == load(1).record
    assert load(1).record["sha256"] != load(2).record["sha256"]
    assert len({row.tobytes() for row in load(3).tokens}) == 5


def test_a_text_file_is_sampled_all_over(tmp_path: Path, tokenizer) -> None:
    lines = [f"line {i} of the long book\n" for i in range(20_000)]
    path = tmp_path / "book.txt"
    path.write_text("".join(lines))
    loaded = load_corpus("book", path, tokenizer=tokenizer, sequences=16, length=32)
    numbers = [int(w) for row in loaded.tokens for w in tokenizer.decode(row).split() if w.isdigit()]
    assert min(numbers) < 7_000
    assert max(numbers) > 13_000


def test_unicode_line_separators_stay_inside_a_row(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "u.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two\u0085three " * 40}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_corpus("u", path, tokenizer=tokenizer, length=16).record["documents"] == 1


def test_too_little_text_is_said_with_the_number_of_blocks(text_files: dict[str, Path], tokenizer) -> None:
    available = load_corpus("x", text_files["jsonl"], tokenizer=tokenizer, length=64).record["blocks_available"]
    with pytest.raises(
        InputError,
        match=rf"corpus x gives {available} blocks of 64 tokens, 500 are wanted. Give sequences={available}",
    ):
        load_corpus("x", text_files["jsonl"], tokenizer=tokenizer, sequences=500, length=64)
    with pytest.raises(InputError, match=r"corpus x holds \d+ tokens, less than one block of 9000"):
        load_corpus("x", text_files["jsonl"], tokenizer=tokenizer, length=9000)


def test_input_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [0, 9, 8], "attention_mask": [0, 1, 1]}]
    loaded = load_corpus("ids", write_rows(tmp_path / "r.jsonl", rows), vocab_size=10)
    assert [row[keep].tolist() for row, keep in zip(loaded.tokens, loaded.mask, strict=True)] == [[1, 2, 3, 4], [9, 8]]
    assert loaded.num_tokens == 6
    other_padding = [rows[0], {"input_ids": [9, 8, 0, 0], "attention_mask": [1, 1, 0, 0]}]
    same = load_corpus("ids", write_rows(tmp_path / "s.jsonl", other_padding), vocab_size=10)
    assert same.record["sha256"] == loaded.record["sha256"]  # the hash covers tokens, not padding


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"input_ids": [1, 10]}], r"row 1: token id 10 is out of range. Allowed: 0 to 9"),
        ([{"input_ids": [1]}, {"input_ids": [-1]}], r"row 2: token id -1 is out of range"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "two equal lists"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "at least one 1"),
        ([{"input_ids": []}], "at least one 1"),
        ([{"input_ids": "abc"}], "must be a list of whole numbers"),
        ([{"input_ids": [1.7, 2]}], "must be a list of whole numbers"),
        ([{"input_ids": [1, True, "5"]}], "must be a list of whole numbers"),
        ([{"input_ids": [1, 2], "attention_mask": [0.6, 1]}], "must be a list of whole numbers"),
        ([{"input_ids": [[1, 2]]}], "two equal lists"),
        ([{"input_ids": list(range(9)) * 9}], "81 tokens, the model takes at most 64"),
        ([{"title": "x"}], "row 1: no known form has its keys .title.. Name the one that holds the text"),
        ([{"text": "x"}, {"input_ids": [1]}], "rows with and without it do not mix"),
    ],
)
def test_bad_rows(tmp_path: Path, tokenizer, rows: list, message: str) -> None:
    path = write_rows(tmp_path / "r.jsonl", rows)
    with pytest.raises(InputError, match=message):
        load_corpus("ids", path, tokenizer=tokenizer, vocab_size=10, max_length=64, length=8)


def test_text_without_a_tokenizer_is_refused(text_files: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="the model has no tokenizer. Give rows of `input_ids`"):
        load_corpus("x", text_files["jsonl"])


def test_length_above_the_positions_of_the_model(text_files: dict[str, Path], tokenizer) -> None:
    with pytest.raises(InputError, match="length=100 is above the 64 positions"):
        load_corpus("x", text_files["jsonl"], tokenizer=tokenizer, length=100, max_length=64)
    assert load_corpus("x", text_files["jsonl"], tokenizer=tokenizer, max_length=64).tokens.shape[1] == 64


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_corpus(tmp_path: Path, tokenizer, content: str) -> None:
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match="is empty|holds no text"):
            load_corpus("x", tmp_path / name, tokenizer=tokenizer)


def test_unknown_ending_and_broken_files(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "x.xml").write_text("a")
    with pytest.raises(InputError, match=r"unknown file type. Allowed: .txt"):
        parse_corpora([f"x={tmp_path / 'x.xml'}"])
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{oops\n')
    with pytest.raises(InputError, match="line 2: not JSON"):
        load_corpus("x", tmp_path / "x.jsonl", tokenizer=tokenizer)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:-20])
    with pytest.raises(InputError, match="could not be read"):
        load_corpus("x", tmp_path / "x.jsonl.gz", tokenizer=tokenizer)
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="x.txt is UTF-16 by its first bytes, UTF-8 is read. Convert it"):
        load_corpus("x", tmp_path / "x.txt", tokenizer=tokenizer)


def test_shards_have_hashes_of_their_own(text_files: dict[str, Path], tokenizer) -> None:
    whole = load_corpus("x", text_files["jsonl"], tokenizer=tokenizer, sequences=6, length=16)
    assert whole[:3].record["sha256"] != whole[3:].record["sha256"] != whole.record["sha256"]
    np.testing.assert_array_equal(np.concatenate([whole[:3].tokens, whole[3:].tokens]), whole.tokens)


def test_folder_without_tokenizer_and_with_a_broken_one(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="the tokenizer could not be loaded"):
        load_tokenizer(tmp_path)


@needs_shared
def test_real_corpora(checkpoints: Callable[..., Path], tokenizer) -> None:
    wiki = load_corpus("wikitext2", SHARED / "wikitext2" / "train_head.raw.txt", tokenizer=tokenizer, length=256)
    c4 = load_corpus("c4", SHARED / "c4" / "train_a.jsonl", tokenizer=tokenizer, length=256)
    assert wiki.tokens.shape == c4.tokens.shape == (128, 256)
    assert c4.record["documents"] >= 1000


def test_a_null_mask_is_no_mask(tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    rows = [{"input_ids": [1, 2, 3], "attention_mask": None}, {"input_ids": [4, 5], "attention_mask": [0, 1]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    assert load_corpus("t", table, vocab_size=10).num_tokens == 4


def test_files_that_are_not_what_they_are_called(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="is not a parquet file"):
        load_corpus("x", tmp_path / "x.parquet", tokenizer=tokenizer)
    packed = bytearray(gzip.compress(b'{"text": "abc"}\n' * 500))
    packed[20:40] = bytes(20)
    (tmp_path / "x.jsonl.gz").write_bytes(packed)
    with pytest.raises(InputError, match="could not be read|not JSON"):
        load_corpus("x", tmp_path / "x.jsonl.gz", tokenizer=tokenizer)


def test_lone_surrogates_do_not_stop_the_tokenizer(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"text": "' + "a \\ud83d b " * 40 + '"}\n')
    assert load_corpus("s", path, tokenizer=tokenizer, length=16).num_tokens >= 16


def test_model_gives_tokenizer_vocabulary_and_length(
    checkpoints: Callable[..., Path], text_files: dict[str, Path]
) -> None:
    from moecover.checkpoints.structure import read_structure

    structure = read_structure(checkpoints("mixtral"))
    loaded = load_corpus("x", text_files["jsonl"], structure=structure)
    assert loaded.tokens.shape[1] == 64  # the model's positions
    with pytest.raises(InputError, match="Tokenizer and model do not belong together"):
        load_corpus("x", text_files["jsonl"], structure=structure, vocab_size=50)


def test_token_ids_need_no_working_tokenizer(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    from moecover.checkpoints.structure import read_structure

    shutil.copytree(checkpoints("mixtral"), tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    structure = read_structure(tmp_path / "m")
    path = write_rows(tmp_path / "r.jsonl", [{"input_ids": [1, 2, 3]}])
    assert load_corpus("r", path, structure=structure).num_tokens == 3


def test_code_of_a_tokenizer_is_never_run(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(checkpoints("mixtral"), folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        load_tokenizer(folder)
    except InputError as error:
        assert "could not be loaded" in str(error)  # noqa: PT017
    assert not (tmp_path / "ran").exists()


def test_a_corpus_shows_itself(text_files: dict[str, Path], tokenizer) -> None:
    loaded = load_corpus("x", text_files["jsonl"], tokenizer=tokenizer, sequences=6, length=16)
    assert repr(loaded) == "<Corpus x: 6 sequences of up to 16 tokens, 96 in all, from a.jsonl>"
    assert loaded.to_frame().to_dict("records") == [
        {"corpus": "x", "sequences": 6, "length": 16, "tokens": 96, "source": "a.jsonl"}
    ]


def test_a_tokenizer_at_which_its_library_panics_is_refused(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A panic of a library in Rust is no Exception."""

    class PanicException(BaseException):
        pass

    def panics(*args: object, **kwargs: object) -> None:
        raise PanicException("range end index 12 out of range for slice of length 11")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panics)
    with pytest.raises(InputError, match="the tokenizer could not be loaded: range end index 12"):
        load_tokenizer(checkpoints("qwen3_moe"))
