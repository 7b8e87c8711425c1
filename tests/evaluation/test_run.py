"""Perplexity, closeness and tasks of plans: against naive references, the written checkpoint, and the harness's own command."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import Structure, read_structure
from moecover.cli import main as cli
from moecover.corpora.packing import Corpus, load_corpus, load_tokenizer
from moecover.corpora.windows import load_windows
from moecover.errors import InputError, MoecoverError
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.perplexity import score
from moecover.evaluation.run import evaluate
from moecover.evaluation.tasks import Tasks, resolve
from moecover.planning.artifact import LayerPlan, Plan
from moecover.planning.masking import masked, masked_layers
from moecover.pruning.writer import prune
from moecover.runtime import memory as fitting
from moecover.runtime.loading import load_model
from moecover.runtime.running import InMemory, unmasked
from moecover.runtime.streaming import Streamed, streamed
from tests.conftest import random_corpus
from tests.support import zoo


def random_plan(structure: Structure, keep: int, seed: int = 0) -> Plan:
    topology, chance = structure.topology, np.random.default_rng(seed)
    kept = [sorted(map(int, chance.choice(topology.num_experts, keep, replace=False))) for _ in topology.decoder_layers]
    layers = [LayerPlan(decoder_layer=d, kept=k) for d, k in zip(topology.decoder_layers, kept, strict=True)]
    return Plan(schema=1, keep=keep, layers=layers)


@pytest.fixture(scope="module")
def structure(tmp_path_factory: pytest.TempPathFactory) -> Structure:
    folder = tmp_path_factory.mktemp("evaluated") / "m"
    zoo.make_model("qwen2_moe").save_pretrained(folder, save_original_format=True)
    return read_structure(folder)


def texts() -> list[Corpus]:
    """Two, one with a window that is shorter."""
    one, two = random_corpus("a", sequences=5, length=20, vocab=128), random_corpus("b", sequences=3, length=17, vocab=128)  # fmt: skip
    two.mask[-1, 9:] = False
    return [one, two]


def test_score_is_what_a_loop_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(2, 7, 11, generator=generator) for _ in range(2))
    inputs = {"input_ids": torch.randint(0, 11, (2, 7), generator=generator), "attention_mask": torch.ones(2, 7).long()}
    inputs["attention_mask"][1, 4:] = 0
    expected = np.zeros((2, 4))
    for row in range(2):
        for position in range(6):
            if not (inputs["attention_mask"][row, position] and inputs["attention_mask"][row, position + 1]):
                continue
            p, q = (x[row, position].double().softmax(-1).tolist() for x in (other, logits))
            expected[row] += [
                -math.log(q[int(inputs["input_ids"][row, position + 1])]),
                1,
                sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
                p.index(max(p)) == q.index(max(q)),
            ]
    np.testing.assert_allclose(score(logits, inputs, other), expected, rtol=1e-5)
    np.testing.assert_allclose(score(logits, inputs), expected * [1, 1, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_plans_are_what_their_checkpoints_are(structure: Structure, tmp_path: Path, batch_size: int) -> None:
    """To the last bit, in memory and layer by layer, where all plans share one read."""
    plans = {"six": random_plan(structure, 6), "four": random_plan(structure, 4, 1)}
    model = load_model(structure)
    found = evaluate(structure, plans, model=model, texts=texts(), batch_size=batch_size)
    assert [(row.name, row.keep) for row in found.rows] == [("full", structure.topology.num_experts), ("six", 6), ("four", 4)]  # fmt: skip
    with streamed(structure) as stream:
        loads: list[str] = []
        load = stream.weights.load
        stream.weights.load = lambda prefix: (loads.append(prefix), load(prefix))[1]  # type: ignore[method-assign,func-returns-value]
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
    again = evaluate(structure, {"all": random_plan(structure, structure.topology.num_experts)}, model=model, texts=texts(), batch_size=batch_size)  # fmt: skip
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
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]  # fmt: skip
    assert found.tokens[found.mask].tolist() == ids
    assert found.record["tokenizer"]["entries"] == len(tokenizer)
    assert len(load_windows("t", tmp_path / "t.txt", structure=made, length=64, windows=2).tokens) == 2
    with pytest.raises(InputError, match="no text to predict"):
        load_windows("e", tmp_path / "empty.txt", structure=made)
    with pytest.raises(InputError, match="calibration text. Give web-heldout"):
        load_windows("web", structure=made)


ARC = [
    {"id": str(i), "question": f"Which is number {i}?", "choices": {"text": ["one", "two", f"the {i}th"], "label": ["A", "B", "C"]}, "answerKey": "ABC"[i % 3]}
    for i in range(7)
]  # fmt: skip
BLIMP = [{"uid": uid, "good": f"the cats {i} sleep", "bad": f"the cats {i} sleeps"} for uid in ("adjunct_island", "drop_argument") for i in range(3)]  # fmt: skip


def write_rows(folder: Path, **splits: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `tasks`)")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    for path, rows in (("arc_easy/test", ARC), ("arc_easy/validation", ARC[:2]), ("blimp/blimp", BLIMP)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{path}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tasks of an emulated plan are what the harness finds on the written checkpoint, document by document."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    made = read_structure(shipped_model())
    plan = random_plan(made, 30)
    plan.save(tmp_path / "half.json")
    command = ["evaluate", str(shipped_model()), "--plan", str(tmp_path / "half.json"), "--tasks", "arc_easy,blimp", "--data-dir", str(data), "--batch-size", "2", "-o", str(tmp_path / "e"), "-q"]  # fmt: skip
    assert cli.main(command) == 0
    assert "arc_easy acc" in capsys.readouterr().out
    found = Evaluation.load(tmp_path / "e")
    assert found.tasks["arc_easy"]["items"] == 7
    assert found.tasks["blimp"]["parts"] == 2
    written = prune(made, plan, tmp_path / "half")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "local.yaml").write_text(f"""include: {Path(TaskManager().task_index["arc_easy"].yaml_path)}
task: local_arc
dataset_path: json
dataset_name: null
training_split: null
dataset_kwargs: {{data_files: {{validation: {data}/arc_easy/validation.jsonl, test: {data}/arc_easy/test.jsonl}}}}
""")
    theirs = simple_evaluate(
        model="hf", model_args=f"pretrained={written},dtype=auto", tasks=["local_arc"], batch_size=2, device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path / "own")),
    )  # fmt: skip
    assert theirs is not None
    for metric in ("acc", "acc_norm"):
        ours = found.rows[1].tasks["arc_easy"][metric]
        assert ours.value == theirs["results"]["local_arc"][f"{metric},none"]
        assert ours.stderr == theirs["results"]["local_arc"][f"{metric}_stderr,none"]
        items = [float(one[metric]) for one in sorted(theirs["samples"]["local_arc"], key=lambda one: one["doc_id"])]
        assert found.items["half"]["arc_easy"][metric].tolist() == items


def test_tasks_with_parts_of_their_own_weights(data: Path) -> None:
    """mmlu: the harness weighs its parts by their sizes, which is the mean of all items."""
    rows = [{"subject": s, "question": f"Which is {i}?", "choices": ["one", "two", "red", f"{i}"], "answer": i % 4} for s, n in (("anatomy", 2), ("astronomy", 7)) for i in range(n)]  # fmt: skip
    write_rows(data / "mmlu", test=rows, dev=rows[:1])
    made = read_structure(shipped_model())
    tasks = resolve(["mmlu"], tokenizer=load_tokenizer(made.checkpoint.path), data_dir=data, batch_size=4)
    assert tasks.parts["mmlu"] == ["mmlu_anatomy", "mmlu_astronomy"]
    ((scores, items),) = tasks.score(InMemory(load_model(made), ()), [unmasked])
    assert len(items["mmlu"]["acc"]) == 9
    assert scores["mmlu"]["acc"].value == pytest.approx(items["mmlu"]["acc"].mean())
    assert scores["mmlu"]["acc"].stderr is not None
    assert tasks.record["mmlu"]["items"] == 9
    assert tasks.documents()["mmlu"][3].endswith("Which is 1?\nA. one\nB. two\nC. red\nD. 1\nAnswer: B")


def test_tasks_that_generate(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gsm8k: five examples before every question, and two ways to find the answer in what was generated."""
    from lm_eval.models.huggingface import HFLM

    rows = [{"question": f"What is {i} and 2?", "answer": f"It is easy.\n#### {i + 2}"} for i in range(8)]
    write_rows(data / "gsm8k", train=rows[:6], test=rows[6:])
    made = read_structure(shipped_model())
    tasks = resolve(["gsm8k"], tokenizer=load_tokenizer(made.checkpoint.path), data_dir=data, limit=1)
    ((scores, items),) = tasks.score(InMemory(load_model(made), ()), [unmasked])
    assert scores["gsm8k"].keys() == items["gsm8k"].keys() == {"exact_match,strict-match", "exact_match,flexible-extract"}  # fmt: skip
    assert tasks.record["gsm8k"] | {"items": 1, "num_fewshot": 5, "metric": "exact_match,strict-match"} == tasks.record["gsm8k"]  # fmt: skip
    (text,) = tasks.documents()["gsm8k"]
    assert text.count("Question: ") == 6
    assert text.endswith("Question: What is 6 and 2?\nAnswer: It is easy.\n#### 8")
    said = ["I think so.\n#### 8", "It may be 9"]  # the second one has no mark before its answer
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **kwargs: said[: len(requests)])
    tasks = resolve(["gsm8k"], tokenizer=load_tokenizer(made.checkpoint.path), data_dir=data)
    ((scores, items),) = tasks.score(InMemory(load_model(made), ()), [unmasked])
    assert items["gsm8k"]["exact_match,strict-match"].tolist() == [1, 0]
    assert items["gsm8k"]["exact_match,flexible-extract"].tolist() == [1, 1]
    assert scores["gsm8k"]["exact_match,strict-match"].value == 0.5


@pytest.mark.parametrize("arguments, message", [
    (["--tasks", "arc_eazy"], "Did you mean arc_easy?"),
    (["--tasks", "piqa"], "piqa/validation.jsonl is missing"),
    (["--perplexity", "web"], "Give web-heldout"),
    (["--perplexity", "x=nowhere.txt"], "nowhere.txt does not exist"),
    ([], "nothing to measure"),
    (["--perplexity", "web-heldout", "--windows", "0"], "--windows 0 is out of range"),
])  # fmt: skip
def test_refusals(arguments: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    command = ["evaluate", str(shipped_model()), "--data-dir", str(data), "-o", str(tmp_path / "e"), *arguments]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_a_plan_of_another_model(structure: Structure, tmp_path: Path) -> None:
    random_plan(structure, 4).save(tmp_path / "p.json")
    command = ["evaluate", str(shipped_model()), "--plan", str(tmp_path / "p.json"), "--perplexity", "web-heldout", "-o", str(tmp_path / "e")]  # fmt: skip
    assert cli.main(command) == 2


# ---------------------------------------------------------------------------------------------- overlap, and the model card
def test_calibration_text_in_the_test_text_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, random = read_structure(shipped_model()), np.random.default_rng(0)
    words = ["river", "stone", "a", "the", "of", "bright", "seven", "bridge", "under", "walks", "slow", "cloud"]
    for name in ("seen", "unseen"):
        (tmp_path / f"{name}.txt").write_text(" ".join(random.choice(words, 900)))
    record = load_corpus("mine", tmp_path / "seen.txt", structure=made, length=128).record
    plan = random_plan(made, 30).model_copy(update={"calibration": {"mine": [record]}})
    plan.save(tmp_path / "half.json")
    texts = [f"--perplexity={name}={tmp_path / name}.txt" for name in ("seen", "unseen")]
    assert cli.main(["evaluate", str(shipped_model()), "--plan", str(tmp_path / "half.json"), *texts, "--length", "128", "-o", str(tmp_path / "e")]) == 0  # fmt: skip
    err = capsys.readouterr().err
    found = Evaluation.load(tmp_path / "e").texts
    assert found["seen"]["overlap"]["half"] > 0.8  # but for what does not fill a block
    assert found["unseen"]["overlap"] == {}
    assert f"{found['seen']['overlap']['half']:.0%} of the text seen is in the calibration text of half too" in err
    assert "text unseen" not in err
    prune(made, plan, tmp_path / "half")
    assert cli.main(["evaluate", str(tmp_path / "half"), *texts[:1], "--length", "128", "-o", str(tmp_path / "e2")]) == 0  # fmt: skip
    assert f"is in the calibration text of {tmp_path / 'half'} too" in capsys.readouterr().err
    assert Evaluation.load(tmp_path / "e2").texts["seen"]["overlap"] == {"full": found["seen"]["overlap"]["half"]}


def test_the_card_takes_its_numbers_from_the_evaluation(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = read_structure(shipped_model())
    for seed in (0, 1):
        random_plan(made, 30, seed).save(tmp_path / f"p{seed}.json")
    common = ["evaluate", str(shipped_model()), "--perplexity", "web-heldout", "--windows", "2", "--length", "64", "-q"]
    assert cli.main([*common, "--plan", str(tmp_path / "p0.json"), "--tasks", "arc_easy", "--data-dir", str(data), "-o", str(tmp_path / "e")]) == 0  # fmt: skip
    cut = ["prune", str(shipped_model()), "--plan", str(tmp_path / "p0.json"), "-o", str(tmp_path / "cut"), "-q"]
    assert cli.main([*cut, "--evaluation", str(tmp_path / "e")]) == 0
    card = (tmp_path / "cut" / "README.md").read_text()
    full, half = Evaluation.load(tmp_path / "e").rows
    ours = half.perplexity["web-heldout"]
    assert f"| perplexity, web-heldout, 128 tokens in windows of 64 | {full.perplexity['web-heldout'].perplexity:.3f} | {ours.perplexity:.3f} |" in card  # fmt: skip
    assert f"| KL divergence from the original, web-heldout, nats per token | 0 | {ours.kl:.4f} |" in card
    cells = [f"{100 * s.value:.1f} ± {100 * (s.stderr or 0):.1f}" for s in (row.tasks["arc_easy"]["acc_norm"] for row in (full, half))]  # fmt: skip
    assert f"| arc_easy, acc_norm, 0-shot, 7 items | {cells[0]} | {cells[1]} |" in card
    assert cli.main(["verify", str(shipped_model()), str(tmp_path / "cut"), "-q"]) == 0
    capsys.readouterr()
    other = [*cut[:2], "--plan", str(tmp_path / "p1.json"), "-o", str(tmp_path / "other"), "-q"]
    assert cli.main([*other, "--evaluation", str(tmp_path / "e")]) == 2
    assert "holds no row of this plan" in capsys.readouterr().err
    assert cli.main([*common, "--windows", "3", "--plan", str(tmp_path / "p1.json"), "-o", str(tmp_path / "e3")]) == 0
    assert cli.main([*other, "--evaluation", str(tmp_path / "e"), "--evaluation", str(tmp_path / "e3")]) == 2
    assert "they do not compare" in capsys.readouterr().err
    assert cli.main(["prune", str(shipped_model()), "--corpus", "web", "--keep", "30", "-o", str(tmp_path / "other"), "--evaluation", str(tmp_path / "e")]) == 2  # fmt: skip
    assert "--evaluation goes with --plan" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------------------------ tasks layer by layer
LETTERS = """task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}/arc_easy/test.jsonl}}}}
test_split: test
fewshot_split: test
num_fewshot: 2
output_type: {kind}
doc_to_text: "{{{{question}}}}\n{{% for one in choices.text %}}{{{{choices.label[loop.index0]}}}}. {{{{one}}}}\n{{% endfor %}}Answer:"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: ["A", "B", "C"]
metric_list: [{{metric: {metric}}}]
"""


def own_task(data: Path, kind: str = "multiple_choice", metric: str = "acc") -> Path:
    """A folder with a task whose choices are one token each, of one context with two examples drawn by chance."""
    folder = data.parent / f"own-{kind}"
    folder.mkdir()
    (folder / "letters.yaml").write_text(LETTERS.format(data=data, kind=kind, metric=metric))
    return folder


def found_tasks(structure: Structure, names: list[str], data: Path, *, batch_size: int = 1, include_path: Path | None = None) -> Tasks:  # fmt: skip
    tokenizer = load_tokenizer(structure.checkpoint.path)
    return resolve(names, tokenizer=tokenizer, data_dir=data, include_path=include_path, batch_size=batch_size)


def counted(stream: Streamed, calls: list[str]) -> Streamed:
    load = stream.weights.load
    stream.weights.load = lambda prefix: (calls.append(prefix), load(prefix))[1]  # type: ignore[method-assign,func-returns-value]
    return stream


@pytest.mark.parametrize("family, batch_size, tied", [("qwen2_moe", 1, False), ("qwen2_moe", 3, True), ("mixtral", 2, False)])  # fmt: skip
def test_tasks_layer_by_layer(
    data: Path, checkpoints: Callable[..., Path], family: str, batch_size: int, tied: bool
) -> None:
    """To the last bit what the harness finds in memory, with one read of the weights for all plans and tasks."""
    structure = read_structure(checkpoints(family, tie_word_embeddings=True) if tied else checkpoints(family))
    plans = {"one": random_plan(structure, 4), "two": random_plan(structure, 5, 1)}
    names, given = ["arc_easy", "blimp", "letters"], {"batch_size": batch_size, "include_path": own_task(data)}
    in_memory = evaluate(
        structure, plans, model=load_model(structure), tasks=found_tasks(structure, names, data, **given)
    )  # type: ignore[arg-type]
    tasks, loads, answered = found_tasks(structure, names, data, **given), list[str](), list[int]()  # type: ignore[arg-type]
    with streamed(structure) as stream:
        variants = [unmasked, *(masked_layers(stream.module, structure, plan) for plan in plans.values())]
        scored = tasks.score(counted(stream, loads), variants, advance=answered.append)
    assert len(loads) == len(set(loads)) >= structure.topology.num_layers
    assert len(answered) == 3 * tasks.num_requests == 3 * (7 * 3 + 6 * 2 + 7 * 3)
    assert tasks.record == in_memory.tasks
    for row, (scores, items) in zip(in_memory.rows, scored, strict=True):
        assert scores == row.tasks
        for name in names:
            assert items[name].keys() == in_memory.items[row.name][name].keys()
            for metric, values in items[name].items():
                np.testing.assert_array_equal(values, in_memory.items[row.name][name][metric])
    # A part after the other gives the same, with a read of the weights for each.
    with streamed(structure, room=400) as stream:
        parts = list[str]()
        again = evaluate(structure, plans, model=counted(stream, parts), tasks=tasks)
    assert len(parts) > 3 * len(loads)
    assert again.rows == in_memory.rows


def test_answers_are_to_the_last_bit(data: Path, checkpoints: Callable[..., Path]) -> None:
    """Log-likelihoods too, from which the scores are: of texts longer than the model's positions, and of one context."""
    structure = read_structure(checkpoints("qwen2_moe", max_position_embeddings=32))
    from lm_eval.models.huggingface import HFLM

    from moecover.evaluation.streamed_tasks import Replay

    tasks = found_tasks(structure, ["arc_easy", "letters"], data, batch_size=2, include_path=own_task(data))
    assert tasks.longest > 32
    plan = random_plan(structure, 4)
    requests = [one for task in tasks.loaded["tasks"].values() for one in task.instances]
    model = load_model(structure)
    with masked(model, structure, plan):
        expected = HFLM(pretrained=model, tokenizer=tasks.tokenizer, batch_size=2, backend="causal").loglikelihood(requests)  # fmt: skip
    with streamed(structure) as stream:
        variants = [unmasked, masked_layers(stream.module, structure, plan)]
        replay = Replay(stream, variants, tokenizer=tasks.tokenizer, batch_size=2)
        replay.variant = 1
        assert replay.loglikelihood(requests) == expected
        replay.variant = 0
        assert replay.loglikelihood(requests) != expected
        with pytest.raises(MoecoverError, match="not deterministic"):
            replay.loglikelihood(requests[1:])


@pytest.mark.parametrize("kind, metric", [("generate_until", "exact_match"), ("loglikelihood_rolling", "word_perplexity")])  # fmt: skip
def test_tasks_that_do_not_run_layer_by_layer(data: Path, checkpoints: Callable[..., Path], kind: str, metric: str) -> None:  # fmt: skip
    structure = read_structure(checkpoints("mixtral"))
    tasks = found_tasks(structure, ["arc_easy", "letters"], data, include_path=own_task(data, kind, metric))
    loads: list[str] = []
    with (
        streamed(structure) as stream,
        pytest.raises(InputError, match="--tasks letters: .* needs the model in memory"),
    ):
        evaluate(structure, {}, model=counted(stream, loads), tasks=tasks)
    assert loads == []


def test_the_command_layer_by_layer(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = read_structure(shipped_model())
    random_plan(made, 30).save(tmp_path / "half.json")
    command = ["evaluate", str(shipped_model()), "--plan", str(tmp_path / "half.json"), "--tasks", "arc_easy,blimp", "--data-dir", str(data), "--perplexity", "web-heldout", "--windows", "2", "--length", "64"]  # fmt: skip
    assert cli.main([*command, "-o", str(tmp_path / "whole")]) == 0
    err = capsys.readouterr().err
    assert "scoring tasks: 66 requests in" in err
    assert not re.search(r"\d+%|it/s|Tokenizing", err)  # no bar but ours
    monkeypatch.setattr(fitting, "OVERHEAD", 0)
    bare = fitting.cost(made, tokens=256, batch_tokens=64, limit=0, head=True)
    limit = (bare.streamed + bare.whole) // 2
    assert cli.main([*command, "--memory-limit", str(limit), "-o", str(tmp_path / "parts")]) == 0
    err = capsys.readouterr().err
    assert "running layer by layer" in err
    assert "scoring tasks: 66 requests in" in err
    whole, parts = Evaluation.load(tmp_path / "whole"), Evaluation.load(tmp_path / "parts")
    assert (parts.rows, parts.tasks) == (whole.rows, whole.tasks)
