"""Tokenizers that begin every text with a BOS token: blocks, windows and rows begin with it, and records say so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.bos import prefix_of
from moecover.corpora.packing import load_corpus, load_unused
from moecover.corpora.tokenizer import load_tokenizer
from moecover.corpora.windows import load_windows
from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.task_usage import task_corpora
from moecover.profiling.artifact import Profile
from tests.support.command_line import run
from tests.support.tiny import TEXT, make_tokenizer

BOS = 1
TEXTS = [f"{i} {TEXT}" for i in range(60)]


@pytest.fixture(scope="module")
def begun(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Structure:
    """A model whose tokenizer begins every text with ``<s>``."""
    folder = tmp_path_factory.mktemp("begun") / "m"
    shutil.copytree(checkpoints("qwen2_moe"), folder)
    make_tokenizer(begins=True).save_pretrained(folder)
    return read_structure(folder)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def test_the_prefix() -> None:
    begins, plain = make_tokenizer(begins=True), make_tokenizer()
    assert [prefix_of(begins, bos) for bos in ("auto", "always", "never")] == [(BOS,), (BOS,), ()]
    assert [prefix_of(plain, bos) for bos in ("auto", "never")] == [(), ()]
    with pytest.raises(InputError, match="bos=always: the tokenizer has no BOS token"):
        prefix_of(plain, "always")
    plain.bos_token = "<end>"  # has one, but does not add it
    assert [prefix_of(plain, bos) for bos in ("auto", "always")] == [(), (0,)]
    with pytest.raises(InputError, match="bos=maybe is unknown. Allowed: auto, always, never"):
        prefix_of(plain, "maybe")


def test_every_block_begins_with_it_and_the_text_is_whole(begun: Structure, texts: Path) -> None:
    given = {"structure": begun, "length": 32}
    bare = load_corpus("t", texts, **given, bos="never")
    made = load_corpus("t", texts, **given, sequences=load_corpus("t", texts, **given).record["blocks_available"])
    assert (made.tokens[:, 0] == BOS).all()
    assert (made.tokens[:, 1:] != BOS).all()
    assert (bare.tokens != BOS).all()
    assert made.tokens.shape[1] == bare.tokens.shape[1] == 32
    tokenizer = load_tokenizer(begun.checkpoint.path)
    assert tokenizer is not None
    documents = tokenizer.decode(made.tokens[:, 1:].reshape(-1)).split("<end>")
    assert set(documents[:-1]) <= set(TEXTS)
    assert len(documents) > len(TEXTS) - 3
    assert made.record["bos"] == [BOS]
    assert "bos" not in bare.record


def test_blocks_that_were_left_begin_alike(begun: Structure, texts: Path) -> None:
    for bos, first in (("auto", True), ("never", False)):
        taken = load_corpus("t", texts, structure=begun, sequences=4, length=32, bos=bos)
        left = load_unused("t", texts, taken.record, structure=begun, blocks=8)
        assert (left.tokens[:, 0] == BOS).all() == first
        assert left.record.get("bos") == taken.record.get("bos")
        rows = {tuple(row) for row in taken.tokens.tolist()}
        assert not rows & {tuple(row) for row in left.tokens.tolist()}


def test_windows_begin_with_it_and_predict_the_first_token_of_the_text(begun: Structure, texts: Path) -> None:
    made = load_windows("t", texts, structure=begun, length=16, windows=10_000)
    bare = load_windows("t", texts, structure=begun, length=16, windows=10_000, bos="never")
    assert (made.tokens[:, 0] == BOS).all()
    np.testing.assert_array_equal(made.tokens[:, 1:][made.mask[:, 1:]], bare.tokens[bare.mask])
    assert made.record["bos"] == [BOS]
    text = bare.num_tokens
    for windows in (1, 2):  # as many tokens are predicted as there is text, also of a last window of one token
        cut = load_windows("t", texts, structure=begun, length=16, windows=windows)
        assert cut.num_tokens - len(cut.tokens) == 15 * windows
    assert made.num_tokens - len(made.tokens) == text
    with pytest.raises(InputError, match="length=1 leaves no room for text behind the 1 tokens"):
        load_windows("t", texts, structure=begun, length=1)


def test_a_last_window_of_one_token(begun: Structure, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("abcdefgh")  # with its end mark not a whole number of windows
    whole = load_windows("t", path, structure=begun, length=64)
    body = whole.num_tokens - 2
    made = load_windows("t", path, structure=begun, length=body + 1)
    assert made.mask.sum(1).tolist() == [body + 1, 2]


def test_rows_that_the_model_writes(begun: Structure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--sequences", 6, "--length", 12, "--batch-size", 4]
    rows = {}
    for bos in ("auto", "never"):
        path = tmp_path / f"{bos}.jsonl"
        assert run(capsys, "generate", begun.checkpoint.path, *sizes, "--bos", bos, "-o", path)[0] == 0
        rows[bos] = np.array([json.loads(line)["input_ids"] for line in path.read_text().splitlines()])
        assert rows[bos].shape == (6, 12)
    assert (rows["auto"][:, 0] == BOS).all()
    assert (rows["auto"][:, 1] != BOS).all()  # the drawn token is no special one
    assert (rows["never"][:, 0] != BOS).all()


def test_kinds_of_rows_that_begin_with_it_begin_with_it(
    begun: Structure, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for bos, first in (("auto", True), ("never", False)):
        command = ["split", begun.checkpoint.path, "--corpus", f"t={texts}", "--kinds", 2, "--length", 64, "--bos", bos]
        assert run(capsys, *command, "-o", tmp_path / bos)[0] == 0
        for kind in (1, 2):
            rows = [json.loads(x)["input_ids"] for x in (tmp_path / bos / f"{kind}.jsonl").read_text().splitlines()]
            assert all((row[0] == BOS) == first for row in rows)
            assert all(BOS not in row[1:] for row in rows)
            assert all(len(row) <= 64 for row in rows)


def test_task_texts_begin_as_the_harness_has_them(begun: Structure) -> None:
    (corpus,) = task_corpora({"t": ["one", "one two"]}, structure=begun)
    assert (corpus.tokens[:, 0] == BOS).all()


def test_the_commands_record_it(
    begun: Structure, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = begun.checkpoint.path
    for bos, expected in (("auto", [BOS]), ("never", None)):
        given = ["--corpus", f"t={texts}", "--sequences", 3, "--length", 32, "--bos", bos]
        assert run(capsys, "profile", model, *given, "-o", tmp_path / f"p-{bos}")[0] == 0
        assert Profile.load(tmp_path / f"p-{bos}").corpora["t"][0].get("bos") == expected
        given = ["--perplexity", f"t={texts}", "--windows", 3, "--length", 32, "--bos", bos]
        assert run(capsys, "evaluate", model, *given, "-o", tmp_path / f"e-{bos}")[0] == 0
        assert Evaluation.load(tmp_path / f"e-{bos}").texts["t"]["bos"] == (expected or [])
