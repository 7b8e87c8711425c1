"""Kinds of text: each piece in one, alike pieces together, rows that join what belongs together, folders as corpora."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moecover.checkpoints.shipped import shipped_model
from moecover.cli.main import main
from moecover.comparison.config import corpora_of
from moecover.corpora.arguments import each_file, parse_corpora
from moecover.corpora.kinds import PIECE, Piece, described, grouped, pieces_of, rows_of, split, tf_idf, write_kinds
from moecover.corpora.packing import Corpus, load_corpus, make_corpus
from moecover.corpora.sources import in_rows, set_folder, set_name
from moecover.errors import InputError

END = 0


def corpus_of(rows: list[list[int]]) -> Corpus:
    width = max(map(len, rows))
    tokens = np.array([row + [9] * (width - len(row)) for row in rows])
    return make_corpus(
        "self", tokens, np.array([[i < len(row) for i in range(width)] for row in rows]), {"source": "x"}
    )


def mixed(seed: int = 0, rows: int = 12) -> Corpus:
    """Documents of three kinds, each of tokens of its own: 10 to 29 most, 30 to 49 less, 50 to 69 seldom."""
    rng, made = np.random.default_rng(seed), []
    for row in range(rows):
        ids: list[int] = []
        while len(ids) < 500:
            kind = rng.choice(3, p=[0.6, 0.3, 0.1]) if row else len([i for i in ids if i == END]) % 3
            ids += [*(10 + 20 * kind + rng.integers(20, size=rng.integers(60, 300))).tolist(), END]
        made.append(ids[:500])
    return corpus_of(made)


def test_documents_are_cut_at_their_ends_into_pieces_alike_long() -> None:
    rows = [[5] * 400 + [END] + [6] * 30, [END, END, 7, 7]]
    found = pieces_of(corpus_of(rows), [END])
    assert [(p.ids.tolist(), p.document, p.place) for p in found[3:]] == [([6] * 30, 1, 0), ([7, 7], 2, 0)]
    assert [len(p.ids) for p in found[:3]] == [134, 134, 133]
    assert [(p.document, p.place) for p in found[:3]] == [(0, 0), (0, 1), (0, 2)]
    assert found[2].ids[-1] == END
    assert sum(len(p.ids) for p in pieces_of(mixed(), [END])) == 12 * 500  # none is lost
    assert max(len(p.ids) for p in pieces_of(mixed(), [END])) < 1.5 * PIECE


def test_weights_of_tokens_are_those_of_the_formula() -> None:
    rng = np.random.default_rng(1)
    pieces = [rng.integers(3, 12, size=n) for n in (7, 30, 1, 12)]
    table, tokens = tf_idf(pieces)
    assert tokens.tolist() == sorted(set(np.concatenate(pieces).tolist()))
    for row, piece in zip(table.toarray(), pieces, strict=True):
        counts = Counter(piece.tolist())
        expected = [
            (1 + math.log(counts[t])) * (1 + math.log(5 / (1 + sum(t in p for p in pieces)))) if counts[t] else 0.0
            for t in tokens.tolist()
        ]
        np.testing.assert_allclose(row, np.array(expected) / math.hypot(*expected), rtol=1e-12)


def test_pieces_are_described_by_the_leading_directions() -> None:
    """All directions keep every angle; fewer are those of the dense decomposition."""
    table, _ = tf_idf([np.random.default_rng(i).integers(0, 200, size=90) for i in range(40)])
    points = described(table, seed=3)
    left, values, _ = np.linalg.svd(table.toarray(), full_matrices=False)
    dense = left[:, :32] * values[:32]
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    np.testing.assert_allclose(points @ points.T, dense @ dense.T, atol=1e-9)
    np.testing.assert_array_equal(points, described(table, seed=3))
    few, _ = tf_idf([np.array([1, 2]), np.array([2, 3])])
    np.testing.assert_allclose(described(few, seed=0), few.toarray())


@pytest.mark.parametrize("seed", [0, 1])
def test_kinds_that_share_no_token_are_found_most_first(seed: int) -> None:
    corpus = mixed(seed)
    kinds, typical = split(corpus, [END], kinds=3, seed=seed)
    for number, (kind, ids) in enumerate(zip(kinds, typical, strict=True)):
        low = 10 + 20 * number
        for piece in kind:
            assert {int(i) for i in piece.ids if i != END} <= set(range(low, low + 20))
        assert set(ids) <= set(range(low, low + 20))
    sizes = [sum(len(p.ids) for p in kind) for kind in kinds]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == corpus.num_tokens
    again, _ = split(corpus, [END], kinds=3, seed=seed)
    assert [[p.place for p in kind] for kind in again] == [[p.place for p in kind] for kind in kinds]


def test_the_best_start_of_k_means_is_taken() -> None:
    """Four far groups, of which one start in some finds two in one."""
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(centre, 0.01, size=(25, 2)) for centre in ((0, 0), (0, 1), (5, 0), (5, 1))])
    for seed in range(8):
        labels = grouped(points, 4, seed=seed).reshape(4, 25)
        assert [len(set(row)) for row in labels.tolist()] == [1] * 4
        assert len(set(labels[:, 0].tolist())) == 4


def test_too_few_kinds_are_refused() -> None:
    alike = corpus_of([[5, 6, END] * 20])
    with pytest.raises(InputError, match="does not fall into 3 kinds: it has 20 pieces, too few or too similar"):
        split(alike, [END], kinds=3)
    with pytest.raises(InputError, match="has 2 pieces of about 128 tokens, too few for 8 kinds. Give fewer kinds"):
        split(corpus_of([[5, 6, END, 7]]), [END])


def test_rows_join_pieces_that_go_on_and_end_others() -> None:
    pieces = [
        Piece(np.array(ids), document, place)
        for ids, document, place in (([1, 2], 0, 0), ([3], 0, 1), ([4, END], 1, 0), ([5], 2, 0), ([6], 2, 2))
    ]
    joined = [1, 2, 3, END, 4, END, 5, END, 6, END]
    assert np.concatenate(rows_of(pieces, 5, END)).tolist() == joined
    assert [row.tolist() for row in rows_of(pieces, 4, END)] == [joined[:4], joined[4:8]]  # the rest is too short
    assert [row.tolist() for row in rows_of(pieces, 99, END)] == [joined]
    assert [row.tolist() for row in rows_of(pieces, 99, None)] == [[1, 2, 3, 4, END, 5, 6]]


def test_names_of_many_corpora() -> None:
    eight = [f"self-{n}" for n in range(1, 9)]
    assert in_rows(["wikitext2", *eight, "c4"]) == ["wikitext2", "self-1..8", "c4"]
    assert set_name(["wikitext2", "c4"]) == "wikitext2+c4"
    assert set_name(["a-1", "a-3", "b-4", "b-5", "-6"], ", ") == "a-1, a-3, b-4..5, -6"
    assert set_folder(eight) == "self-1..8"
    long = [f"corpus{c}" for c in "abcdefghijklmnopqrst"]
    assert len(set_folder(long)) < 60
    assert set_folder(long) != set_folder([*long[:-1], "corpusz"])


def test_a_folder_is_a_corpus_a_file(tmp_path: Path) -> None:
    for name in ("10.jsonl", "2.jsonl", "1.txt", "rest.jsonl.gz", "kinds.json", "notes.MD"):
        (tmp_path / name).write_text("")
    assert list(parse_corpora([f"x={tmp_path}", "c4"])) == ["x-1", "x-2", "x-10", "x-notes", "x-rest", "c4"]
    assert each_file("x", str(tmp_path))["x-2"] == str(tmp_path / "2.jsonl")
    assert corpora_of([f"x={tmp_path}", "c4"]) == ["x-1", "x-2", "x-10", "x-notes", "x-rest", "c4"]
    (tmp_path / "2.txt").write_text("")
    with pytest.raises(InputError, match="holds 2.jsonl and 2.txt, which would both be corpus x-2. Rename one"):
        parse_corpora([f"x={tmp_path}"])
    (tmp_path / "2.txt").unlink()
    with pytest.raises(InputError, match="corpus x-2 is given twice"):
        parse_corpora([f"x-2={tmp_path}/2.jsonl", f"x={tmp_path}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no corpus file. Allowed: .txt"):
        parse_corpora([f"x={tmp_path}/empty"])


def test_what_is_written_is_the_whole_corpus_in_rows(tmp_path: Path) -> None:
    corpus = mixed()
    kinds, _ = split(corpus, [END], kinds=3)
    facts = write_kinds(tmp_path / "k", corpus, kinds, [["a"], ["b"], []], length=50, ends=[END])
    assert sum(kind["share"] for kind in facts) == pytest.approx(1)
    record = json.loads((tmp_path / "k/kinds.json").read_text())
    assert (record["kinds"], record["corpus"], record["sha256"]) == (facts, "self", corpus.record["sha256"])
    for number, kind in enumerate(facts, 1):
        read = load_corpus("k", tmp_path / f"k/{number}.jsonl")
        assert (len(read.tokens), read.num_tokens) == (kind["rows"], kind["tokens"])
        assert read.tokens.shape[1] == 50
        assert kind["tokens"] <= sum(len(p.ids) for p in kinds[number - 1]) + 2 * len(kinds[number - 1])


def test_from_the_command_line_to_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(shipped_model("qwen2-moe-tiny"))
    texts = {
        "web": "The weather of the day is mild, and people walk along the river. ",
        "code": "def f(x):\n    return self.x[x] + 1\n",
    }
    rows = "".join(json.dumps({"text": text * 30}) + "\n" for text in texts.values() for _ in range(8))
    (tmp_path / "mixed.jsonl").write_text(rows)
    split_it = [
        "split",
        model,
        "--corpus",
        f"mixed={tmp_path}/mixed.jsonl",
        "--kinds",
        "2",
        "--length",
        "64",
        "-o",
        str(tmp_path / "my kinds"),
    ]
    assert main([*split_it, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["kinds"]
    assert [kind["file"] for kind in facts] == ["1.jsonl", "2.jsonl"]
    kinds = [" ".join(kind["words"]) for kind in facts]
    assert sum("return" in words or "def" in words for words in kinds) == 1
    assert main(split_it) == 2
    assert "exists. Choose another output, or give --overwrite" in capsys.readouterr().err
    assert main([*split_it, "--overwrite"]) == 0
    out = capsys.readouterr().out
    assert "mixed-2" in out
    (tmp_path / "my kinds" / "notes.txt").write_text("mine")
    assert main([*split_it, "--overwrite"]) == 2
    assert "my kinds/notes.txt was not written by moecover" in capsys.readouterr().err
    (tmp_path / "my kinds" / "notes.txt").unlink()
    following = shlex.split(out.split("next: moecover ")[1])
    following[-1] = str(tmp_path / "profile")
    assert main(following) == 0
    plan = ["plan", str(tmp_path / "profile"), "--retain", "0.5", "-o", str(tmp_path / "plan.json")]
    assert main(plan) == 0
    capsys.readouterr()
    assert list(json.loads((tmp_path / "plan.json").read_text())["layers"][0]["protected"]) == ["mixed-1", "mixed-2"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    "changed, message",
    [
        (["--kinds", "1"], "--kinds 1 is out of range: 2 or more"),
        (["--length", "1"], "--length 1 is out of range: 2 or more"),
        (["--seed", "-1"], "--seed -1 is out of range"),
        (["--corpus", "self=FOLDER"], "is a folder, which is split already"),
        (["--corpus", "nowhere"], "unknown corpus 'nowhere'"),
        (["-o", "FOLDER"], "was not written by moecover"),
    ],
)
def test_refusals(changed: list[str], message: str, tmp_path: Path, checkpoints: Callable[..., Path], capsys) -> None:
    (tmp_path / "f").mkdir()
    for name in ("1", "2"):
        (tmp_path / "f" / f"{name}.jsonl").write_text(json.dumps({"input_ids": [1, 2, 3]}) + "\n")
    changed = [text.replace("FOLDER", str(tmp_path / "f")) for text in changed]
    base = {"--corpus": f"self={tmp_path}/f/1.jsonl", "-o": str(tmp_path / "kinds")}
    given = itertools.chain(*{**base, changed[0]: changed[1]}.items())
    assert main(["split", str(checkpoints("qwen2_moe")), *given, "--overwrite"]) == 2
    assert message in capsys.readouterr().err
    shutil.rmtree(tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
