"""The corpus of rare tokens: which ids it draws, and that it begins as the other corpora do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import read_structure
from moecover.corpora.packing import load_corpus, make_corpus
from moecover.corpora.rare_tokens import NAME, rare_tokens, vocabulary
from tests.conftest import random_corpus


def test_every_id_is_one_that_the_text_holds_least_of(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    size = structure.checkpoint.text_config["vocab_size"]
    tokens = np.concatenate([np.repeat(np.arange(5, size), 3), np.arange(5, 25)])  # 5 ids never, 20 four times
    text = make_corpus("a", tokens[None], np.ones((1, len(tokens)), dtype=bool), {})
    made = rare_tokens(structure, [text], blocks=8, length=40)
    assert (made.name, made.tokens.shape, made.mask.all()) == (NAME, (8, 40), True)
    allowed = set(vocabulary(structure).tolist())
    assert set(made.tokens.ravel().tolist()) <= allowed
    # A tenth of the vocabulary reaches into the ids that the text holds three times: all of those, none of the others.
    assert set(made.tokens.ravel().tolist()) <= allowed - set(range(5, 25))
    assert made.tokens.max() >= 25
    again = rare_tokens(structure, [text], blocks=8, length=40)
    assert np.array_equal(made.tokens, again.tokens)
    assert not np.array_equal(made.tokens, rare_tokens(structure, [text], blocks=8, length=40, seed=1).tokens)


def test_padding_does_not_count_and_rows_begin_as_the_others(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    size = structure.checkpoint.text_config["vocab_size"]
    tokens = np.stack([np.arange(size), np.arange(size)])
    mask = np.ones(tokens.shape, dtype=bool)
    mask[:, 7] = False  # id 7 is padding only, and the one that the text lacks
    masked = make_corpus("a", np.repeat(tokens, 20, axis=0), np.repeat(mask, 20, axis=0), {"bos": [3, 4]})
    rows = rare_tokens(structure, [masked, random_corpus("b")], blocks=4, length=30).tokens
    assert (rows[:, :2] == [3, 4]).all()
    assert 7 in rows


def test_special_tokens_are_no_text() -> None:
    structure = read_structure(shipped_model("qwen2-moe-tiny"))
    ids = vocabulary(structure)
    end = structure.checkpoint.text_config["eos_token_id"]
    assert end not in ids
    assert len(ids) == len(set(ids.tolist())) > 4000
    text = load_corpus("web", structure=structure, sequences=8, length=256)
    rare = rare_tokens(structure, [text], blocks=2, length=256)
    counts = np.bincount(text.tokens.ravel(), minlength=int(rare.tokens.max()) + 1)
    assert counts[rare.tokens].max() <= np.quantile(counts[ids[ids < len(counts)]], 0.5)
