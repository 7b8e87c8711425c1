"""Evaluations of plans: against their written checkpoints, the saved folder, overlaps, and the model card's numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import Structure, read_structure
from moecover.cli import main as cli
from moecover.corpora.packing import Corpus, load_corpus
from moecover.corpora.windows import load_windows
from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.run import evaluate
from moecover.pruning.writer import prune
from moecover.runtime.loading import load_model
from moecover.runtime.streaming import streamed
from tests.conftest import random_corpus
from tests.support import zoo
from tests.support.tasks import random_plan
from tests.support.thin import random_shape


@pytest.fixture(scope="module")
def structure(tmp_path_factory: pytest.TempPathFactory) -> Structure:
    folder = tmp_path_factory.mktemp("evaluated") / "m"
    zoo.make_model("qwen2_moe").save_pretrained(folder, save_original_format=True)
    return read_structure(folder)


def texts() -> list[Corpus]:
    """Two, one with a window that is shorter."""
    one = random_corpus("a", sequences=5, length=20, vocab=128)
    two = random_corpus("b", sequences=3, length=17, vocab=128)
    two.mask[-1, 9:] = False
    return [one, two]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_plans_are_what_their_checkpoints_are(structure: Structure, tmp_path: Path, batch_size: int) -> None:
    """To the last bit, in memory and layer by layer, where all plans share one read."""
    plans = {
        "six": random_plan(structure, 6),
        "four": random_plan(structure, 4, 1),
        "thin": random_shape(structure, 8, keep=6),
    }
    model = load_model(structure)
    found = evaluate(structure, plans, model=model, texts=texts(), batch_size=batch_size)
    whole = structure.topology.num_experts
    assert [(r.name, r.keep) for r in found.rows] == [("full", whole), ("six", 6), ("four", 4), ("thin", 6)]
    assert [r["keep"] for r in found.rows_shown()] == [whole, 6, 4, "6x8"]
    assert [r.plan["width"] for r in found.rows if r.plan and "width" in r.plan] == [8]
    with streamed(structure) as stream:
        loads: list[str] = []
        load = stream.weights.load

        def noted(prefix: str) -> None:
            loads.append(prefix)
            load(prefix)

        stream.weights.load = noted  # type: ignore[method-assign]
        by_layer = evaluate(structure, plans, model=stream, texts=texts()[:1], batch_size=batch_size)
        assert len(loads) == len(set(loads))
    for one, two in zip(by_layer.rows, found.rows, strict=True):
        assert one.perplexity["a"] == two.perplexity["a"]
    for name, plan in plans.items():
        written = read_structure(prune(structure, plan, tmp_path / name))
        alone = evaluate(written, {}, model=load_model(written), texts=texts(), batch_size=batch_size)
        for text in ("a", "b"):
            np.testing.assert_array_equal(alone.windows["full"][text], found.windows[name][text])
    # The model is itself again, and nothing is nearer to it than it is.
    again = evaluate(
        structure, {"all": random_plan(structure, whole)}, model=model, texts=texts(), batch_size=batch_size
    )
    assert again.rows[0] == found.rows[0]
    assert again.rows[1].perplexity["a"].kl == pytest.approx(0, abs=1e-6)
    assert again.rows[1].perplexity["a"].top1 == 1
    assert all(row.perplexity["a"].kl > 0 for row in found.rows[1:])


def test_the_folder(structure: Structure, tmp_path: Path) -> None:
    found = evaluate(structure, {"six": random_plan(structure, 6)}, model=load_model(structure), texts=texts())
    found.save(tmp_path / "e")
    read = Evaluation.load(tmp_path / "e")
    assert (read.rows, read.model, read.texts) == (found.rows, found.model, found.texts)
    np.testing.assert_array_equal(read.windows["six"]["b"], found.windows["six"]["b"])
    total = found.windows["six"]["b"].sum(axis=0)
    assert found.rows[1].perplexity["b"].perplexity == pytest.approx(math.exp(total[0] / total[1]))
    assert repr(read) == f"<Evaluation {structure.checkpoint.name}; 2 variants; texts: a, b>"
    assert [row["keep"] for row in read.rows_shown()] == [structure.topology.num_experts, 6]
    assert read.rows_shown()[1]["perplexity b"] == found.rows[1].perplexity["b"].perplexity
    (tmp_path / "e" / "windows.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="damaged"):
        Evaluation.load(tmp_path / "e")


def test_windows_are_the_text_in_order(tmp_path: Path) -> None:
    made = read_structure(shipped_model())
    text = "".join(f"Sentence number {i} of a text that is only here to be cut.\n" for i in range(60))
    (tmp_path / "t.txt").write_text(text)
    (tmp_path / "empty.txt").write_text("  ")
    found = load_windows("t", tmp_path / "t.txt", structure=made, length=64)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made.checkpoint.path)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *end]
    assert found.tokens[found.mask].tolist() == ids
    assert found.record["tokenizer"]["entries"] == len(tokenizer)
    assert len(load_windows("t", tmp_path / "t.txt", structure=made, length=64, windows=2).tokens) == 2
    with pytest.raises(InputError, match="no text to predict"):
        load_windows("e", tmp_path / "empty.txt", structure=made)
    with pytest.raises(InputError, match="is calibration text, not held-out text. Give web-heldout"):
        load_windows("web", structure=made)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "arc_eazy"], "Did you mean arc_easy?"),
        (["--tasks", "piqa"], "piqa/validation.jsonl is missing"),
        (["--perplexity", "web"], "Give web-heldout"),
        (["--perplexity", "x=nowhere.txt"], "nowhere.txt does not exist"),
        ([], "nothing to measure"),
        (["--perplexity", "web-heldout", "--windows", "0"], "--windows 0 is out of range"),
    ],
)
def test_refusals(
    arguments: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--data-dir", str(data)] if "--tasks" in arguments else []
    command = ["evaluate", str(shipped_model()), *where, "-o", str(tmp_path / "e"), *arguments]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_a_plan_of_another_model(structure: Structure, tmp_path: Path) -> None:
    random_plan(structure, 4).save(tmp_path / "p.json")
    command = ["evaluate", str(shipped_model()), "--plan", str(tmp_path / "p.json"), "--perplexity", "web-heldout"]
    assert cli.main([*command, "-o", str(tmp_path / "e")]) == 2


def test_calibration_text_in_the_test_text_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, random = read_structure(shipped_model()), np.random.default_rng(0)
    words = ["river", "stone", "a", "the", "of", "bright", "seven", "bridge", "under", "walks", "slow", "cloud"]
    for name in ("seen", "unseen"):
        (tmp_path / f"{name}.txt").write_text(" ".join(random.choice(words, 900)))
    record = load_corpus("mine", tmp_path / "seen.txt", structure=made, length=128).record
    plan = random_plan(made, 30).model_copy(update={"calibration": {"mine": [record]}})
    plan.save(tmp_path / "half.json")
    texts = [f"--perplexity={name}={tmp_path / name}.txt" for name in ("seen", "unseen")]
    command = ["evaluate", str(shipped_model()), "--plan", str(tmp_path / "half.json"), *texts, "--length", "128"]
    assert cli.main([*command, "-o", str(tmp_path / "e")]) == 0
    err = capsys.readouterr().err
    found = Evaluation.load(tmp_path / "e").texts
    assert found["seen"]["overlap"]["half"] > 0.8  # but for what does not fill a block
    assert found["unseen"]["overlap"] == {}
    assert f"{found['seen']['overlap']['half']:.0%} of the text seen is also in the calibration text of half" in err
    assert "text unseen" not in err
    prune(made, plan, tmp_path / "half")
    command = ["evaluate", str(tmp_path / "half"), *texts[:1], "--length", "128", "-o", str(tmp_path / "e2")]
    assert cli.main(command) == 0
    assert f"is also in the calibration text of {tmp_path / 'half'}" in capsys.readouterr().err
    assert Evaluation.load(tmp_path / "e2").texts["seen"]["overlap"] == {"full": found["seen"]["overlap"]["half"]}


def test_the_card_takes_its_numbers_from_the_evaluation(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = read_structure(shipped_model())
    for seed in (0, 1):
        random_plan(made, 30, seed).save(tmp_path / f"p{seed}.json")
    common = ["evaluate", str(shipped_model()), "--perplexity", "web-heldout", "--length", "64", "-q"]
    tasks = ["--windows", "2", "--tasks", "arc_easy", "--data-dir", str(data)]
    assert cli.main([*common, "--plan", str(tmp_path / "p0.json"), *tasks, "-o", str(tmp_path / "e")]) == 0
    cut = ["prune", str(shipped_model()), "--plan", str(tmp_path / "p0.json"), "-o", str(tmp_path / "cut"), "-q"]
    assert cli.main([*cut, "--evaluation", str(tmp_path / "e")]) == 0
    card = (tmp_path / "cut" / "README.md").read_text()
    full, half = Evaluation.load(tmp_path / "e").rows
    theirs, ours = full.perplexity["web-heldout"], half.perplexity["web-heldout"]
    cells = f"{theirs.perplexity:.3f} | {ours.perplexity:.3f}"
    assert f"| perplexity, web-heldout, 128 tokens in windows of 64 | {cells} |" in card
    assert f"| KL divergence from the original, web-heldout, nats per token | 0 | {ours.kl:.4f} |" in card
    scores = [row.tasks["arc_easy"]["acc_norm"] for row in (full, half)]
    cells = " | ".join(f"{100 * s.value:.1f} ± {100 * (s.stderr or 0):.1f}" for s in scores)
    assert f"| arc_easy, acc_norm, 0-shot, 7 items | {cells} |" in card
    assert cli.main(["verify", str(shipped_model()), str(tmp_path / "cut"), "-q"]) == 0
    capsys.readouterr()
    other = [*cut[:2], "--plan", str(tmp_path / "p1.json"), "-o", str(tmp_path / "other"), "-q"]
    assert cli.main([*other, "--evaluation", str(tmp_path / "e")]) == 2
    assert "holds no row of this plan" in capsys.readouterr().err
    assert cli.main([*common, "--windows", "3", "--plan", str(tmp_path / "p1.json"), "-o", str(tmp_path / "e3")]) == 0
    assert cli.main([*other, "--evaluation", str(tmp_path / "e"), "--evaluation", str(tmp_path / "e3")]) == 2
    assert "so they cannot be compared" in capsys.readouterr().err
    one_shot = ["prune", str(shipped_model()), "--corpus", "web", "--keep", "30", "-o", str(tmp_path / "other")]
    assert cli.main([*one_shot, "--evaluation", str(tmp_path / "e")]) == 2
    assert "--evaluation goes with --plan" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
