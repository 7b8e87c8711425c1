"""Files of every format and standard input: what they give, as far as they are read, and where they are broken."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moecover.corpora.arguments import parse_corpora, source_of
from moecover.corpora.formats import SUFFIXES, file_rows
from moecover.corpora.packing import load_corpus
from moecover.errors import InputError
from tests.conftest import write_rows
from tests.support.tiny import TEXT, make_tokenizer

ROWS = [{"text": f"{i} {TEXT}"} for i in range(3)]
BOM = b"\xef\xbb\xbf"


def table(delimiter: str) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([["n", "text"], *([i, row["text"]] for i, row in enumerate(ROWS))])
    return file.getvalue().encode()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CONTENTS = {
    ".txt": "".join(row["text"] for row in ROWS).encode(),
    ".md": "".join(row["text"] for row in ROWS).encode(),
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".csv": table(","),
    ".tsv": table("\t"),
}


def packed(content: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(content)
    return pyarrow.compress(content, codec="zstd", asbytes=True) if suffix.endswith(".zst") else content


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_text(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix.upper() if suffix in ('.txt', '.csv.gz', '.parquet') else suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        content = CONTENTS[suffix.removesuffix(".gz").removesuffix(".zst")]
        path.write_bytes(packed(content, suffix))
    assert "".join(str(row["text"]) for row in file_rows(path)) == "".join(row["text"] for row in ROWS)
    if suffix in CONTENTS:
        path.write_bytes(BOM + content)
        assert "".join(str(row["text"]) for row in file_rows(path)) == "".join(row["text"] for row in ROWS)


def test_json_objects_one_after_the_other_and_large_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecover.corpora.streams.CHUNK_CHARS", 7)
    path = tmp_path / "x.json"
    rows = [{"text": "x" * 50, "n": [1, {"a": "é\\"}]}, {"text": "]"}]
    for content in (LINES.decode(), json.dumps(rows), " [ ]", json.dumps(rows[0])):
        path.write_text(content)
        expected = [json.loads(line) for line in content.splitlines()] if content[0] == "{" else json.loads(content)
        assert list(file_rows(path)) == expected


def test_json_and_tables_are_read_as_far_as_they_are_used(tmp_path: Path) -> None:
    rows = [{"text": f"{i} {TEXT}"} for i in range(30_000)]
    long, wide = tmp_path / "x.json", tmp_path / "x.csv"
    long.write_text(json.dumps(rows)[:-1] + ", oops")
    wide.write_text("text\n" + "".join(f'"{row["text"]}"\n' for row in rows) + '"oops')
    for path in (long, wide):
        assert list(itertools.islice(file_rows(path), 3)) == rows[:3]
        with pytest.raises(InputError, match="row 30001: not JSON|line 90002|unexpected end of data"):
            list(file_rows(path))


BROKEN = {
    ("a.txt", b"abc\xffdef"): "a.txt: byte 3 .0xff. is not UTF-8. Convert the file",
    ("a.txt", BOM + b"abc\xff"): "a.txt: byte 6 .0xff. is not UTF-8",
    ("a.txt", b"abc\xc3"): "a.txt: byte 3 .0xc3. is not UTF-8",
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n'): "a.jsonl: byte 24 .0xe9. is not UTF-8",
    ("a.jsonl", BOM + b'{"text": "\xe9"}\n'): "a.jsonl: byte 13 .0xe9. is not UTF-8",
    ("a.md", "hi".encode("utf-16")): "a.md is UTF-16 by its first bytes, UTF-8 is read. Convert it: iconv",
    ("a.txt", "hi".encode("utf-16-le")): "a.txt: byte 1 is zero, so it is a binary file, or UTF-16 without",
    ("a.csv", b"text\na\nb\0\n"): "a.csv: byte 8 is zero",
    ("a.jsonl", b'{"text": "a"}\n{"text": "b\n'): "a.jsonl, line 2: not JSON .Invalid control character at column 12.",
    ("a.jsonl", b"[1]\n"): r"a.jsonl, line 1: \[1\] is no JSON object",
    ("a.json", b'[{"text": "a"}, {"text"]'): "a.json, row 2: not JSON",
    ("a.json", b'[{"text": "a"}'): "a.json: the list of rows has no end after row 1",
    ("a.json", b'[{"text": "a"}, "b"]'): "a.json, row 2: it must be a JSON object",
    ("a.json", b'[{"text": "a'): "a.json, row 1: not JSON .Unterminated string",
    ("a.csv", b"text,text\na,b\n"): "a.csv, line 1: two columns are called 'text'",
    ("a.csv", b"text,n\na,1\nb\n"): "a.csv, line 3: 1 values, the first line names 2",
    ("a.tsv", b'text\n"a\n'): "a.tsv, line 2: unexpected end of data",
    ("a.txt.zst", b"hello"): "a.txt.zst could not be read",
    ("a.txt.gz", b"hello"): "a.txt.gz could not be read",
    ("a.jsonl.zst", packed(LINES * 99, ".zst")[:-9]): "a.jsonl.zst could not be read",
}


@pytest.mark.parametrize("name, content", BROKEN)
def test_broken_files_are_named_with_the_place(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=BROKEN[name, content]):
        load_corpus("x", tmp_path / name, tokenizer=make_tokenizer(), length=8)


def test_code_of_a_folder_is_one_corpus(tmp_path: Path) -> None:
    for name in ("a.py", "deep/b.py", "deep/c.txt", ".hidden/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n" + TEXT * 9)
    source = f"{tmp_path}?glob=**/?.py"
    assert list(parse_corpora([f"code={source}"])) == ["code"]
    found = [str(row["text"]).split("\n")[0] for row in source_of("code", source).rows(0)]
    assert found == ["# a.py", "# deep/b.py"]
    loaded = load_corpus("code", source, tokenizer=make_tokenizer(), length=16)
    assert (loaded.record["documents"], loaded.record["source"]) == (2, f"{tmp_path.name}/**/?.py")
    with pytest.raises(InputError, match="holds no file of the glob '.*rs'"):
        parse_corpora([f"code={tmp_path}?glob=*.rs"])
    with pytest.raises(InputError, match="the glob '/x' cannot be used"):
        parse_corpora([f"code={tmp_path}?glob=/x"])


def test_standard_input_is_read_again_from_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    class Input:  # as sys.stdin: it can be referred to weakly
        buffer = io.BytesIO(LINES * 20)

    monkeypatch.setattr("sys.stdin", Input())
    given = {"tokenizer": make_tokenizer(), "sequences": 2, "length": 16}
    made = [load_corpus("x", "-?format=jsonl", **given).record for _ in range(2)]
    assert made[0] == made[1]
    assert (made[0]["source"], made[0]["documents"]) == ("standard input", 60)
    with pytest.raises(InputError, match="corpora x and y are both standard input"):
        parse_corpora(["x=-", "y=-?format=csv"])
    with pytest.raises(InputError, match="unknown format 'yaml'"):
        parse_corpora(["x=-?format=yaml"])


@pytest.mark.parametrize(
    "source, message",
    [
        ("{}?txt=a", "corpus x: unknown option 'txt'. Did you mean text"),
        ("{}?text", "corpus x: text has no value. Give text=KEY"),
        ("{}?text=a&text=b", "corpus x: text is given twice"),
        ("{}?n=0", "corpus x: n=0 is out of range. Allowed: a whole number of 1 or more"),
        ("{}?parse_special=1", "Allowed: yes or no"),
        ("{}?n=9999999999999999999", "n=9.* is out of range. Allowed: a whole number of 1 or more, 18 digits at most"),
        ("{}?revision=main", "corpus x: revision says nothing of .*. It is for data sets of the hub"),
        ("{}?glob=*", "glob says nothing of"),
        ("hf:name/train/x/y", "is no data set. Write hf:OWNER/NAME"),
        ("hf:name", "is no data set. Write hf:OWNER/NAME"),
    ],
)
def test_sources_that_cannot_be_read_are_refused_before_anything_is(source: str, message: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match=message):
        parse_corpora([f"x={source.format(path)}"])


def test_a_file_with_a_question_mark_and_a_folder_named_like_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "what?text=a.jsonl", [{"text": "a"}])
    assert source_of("x", str(tmp_path / "what?text=a.jsonl")).options == {}
    monkeypatch.chdir(tmp_path)
    assert parse_corpora(["x=web?seed=3", "web"]) == {"x": "web?seed=3", "web": ""}
    (tmp_path / "web").mkdir()
    write_rows(tmp_path / "web" / "1.jsonl", [])
    with pytest.raises(InputError, match="web is a named corpus, and a file or folder here. Write ./web"):
        parse_corpora(["x=web"])
    assert list(parse_corpora(["x=./web", "web"])) == ["x-1", "web"]
