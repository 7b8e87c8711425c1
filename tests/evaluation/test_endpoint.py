"""Evaluations through a server: equal to those of the folder, item by item; each of the usual failures is one line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from moecover.comparison.bootstrap import paired_bootstrap
from moecover.evaluation import completions
from moecover.evaluation.artifact import Evaluation
from tests.support.command_line import run
from tests.support.fake_completions import Completions, Json, serving
from tests.support.tasks import own_task

KEY = "do-not-tell"
POSITIONS = 300


@pytest.fixture(scope="module")
def folder(checkpoints: Callable[..., Path]) -> Path:
    return checkpoints("qwen2_moe", max_position_embeddings=POSITIONS)


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Completions]:
    with serving(folder) as server:
        yield server


@pytest.fixture
def server(shared: Completions, monkeypatch: pytest.MonkeyPatch) -> Completions:
    """The server in good health; waits are short, as there are none in the environment."""
    monkeypatch.setattr(completions, "FIRST_WAIT", 0.01)
    monkeypatch.delenv(completions.KEY, raising=False)
    shared.names, shared.failures, shared.after, shared.key, shared.max_length = ["tiny"], [], "0", "", None
    shared.change, shared.seen, shared.at_once = lambda answer: answer, [], 0
    return shared


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"The mill by the river turns {i} times a day.\n" for i in range(9)))
    return path


def test_scores_are_those_of_the_folder(
    server: Completions,
    folder: Path,
    data: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tasks that choose, tasks that generate, whole texts; the record names the server and no key."""
    include = own_task(data, "generate_until", "exact_match")
    path = include / "letters.yaml"
    path.write_text(f"{path.read_text()}generation_kwargs: {{until: ['.', 'n'], max_gen_toks: 20}}\n")
    given = ["--tasks", "arc_easy,letters", "--data-dir", data, "--include-path", include]
    given += ["--perplexity", f"mill={text}", "--length", "40", "-q"]
    status, _, err = run(capsys, "evaluate", folder, *given, "--dtype", "float32", "-o", tmp_path / "here")
    assert status == 0, err
    server.key = KEY
    monkeypatch.setenv(completions.KEY, KEY)
    more = ["--endpoint", server.url.removesuffix("/v1"), "--num-concurrent", "3", "-o", tmp_path / "there"]
    status, _, err = run(capsys, "evaluate", folder, *given, *more)
    assert status == 0, err
    here, there = Evaluation.load(tmp_path / "here"), Evaluation.load(tmp_path / "there")
    assert here.rows[0].tasks.keys() == {"arc_easy", "letters"}
    for task, metrics in here.items["full"].items():
        for metric, values in metrics.items():
            np.testing.assert_array_equal(there.items["full"][task][metric], values)
    main = [{t: one.items["full"][t][about["metric"]] for t, about in one.tasks.items()} for one in (here, there)]
    assert paired_bootstrap(*main, resamples=100).value == 0
    assert there.rows[0].tasks == here.rows[0].tasks
    assert there.tasks == here.tasks
    assert there.texts == here.texts
    np.testing.assert_allclose(there.windows["full"]["mill"], here.windows["full"]["mill"], rtol=1e-6)
    assert there.model["fingerprint"] == here.model["fingerprint"]
    assert there.model["endpoint"] == {
        "url": server.url,
        "served_name": "tiny",
        "protocol": "OpenAI completions",
        "server": "fake",
        "max_length": POSITIONS,
        "num_concurrent": 3,
    }
    assert server.at_once == 3
    assert KEY not in "".join(p.read_bytes().decode(errors="replace") for p in (tmp_path / "there").iterdir())
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def broken(answer: Json) -> Json:
    """As servers answer that know no `echo`."""
    return {**answer, "choices": [{**one, "logprobs": {"content": []}} for one in answer["choices"]]}


def other_tokens(answer: Json) -> Json:
    return {**answer, "usage": {"prompt_tokens": 7}}


@pytest.mark.parametrize(
    "health, more, status, said",
    [
        ({"names": ["a", "b"]}, [], 2, "serves 2 models (a, b). Say which: --served-name NAME"),
        ({}, ["--served-name", "big"], 2, "--served-name big: URL has no such model. It serves tiny"),
        ({"key": KEY}, [], 2, "status 401 (Unauthorized). Give the server's key as OPENAI_API_KEY"),
        ({"change": broken}, [], 2, "does not give the log-probabilities of a prompt's tokens"),
        ({"change": other_tokens}, [], 2, "makes 7 tokens of a text of which the model's folder makes"),
        ({}, ["--length", "300"], 2, "--length 300 is above the 299 tokens"),
        ({"max_length": 50}, ["--length", "50"], 2, "--length 50 is above the 49 tokens"),
        ({"failures": ["", "", 400]}, [], 2, "status 400 (not now): the server does not take such a request"),
        ({"failures": ["", "", 404]}, [], 2, "status 404 (not now). Give --endpoint http://HOST:PORT/v1"),
        ({"failures": ["", "", "<html>no"]}, [], 1, "answered something else than JSON: '<html>no'"),
        ({"failures": ["", "", "[1]"]}, [], 1, "answered [1], where a JSON object is expected"),
        ({"failures": ["", "", '{"choices": []}']}, [], 1, "an answer is not what the OpenAI completions API has"),
        ({"failures": ["", "", *["cut"] * 9]}, [], 1, "the connection failed"),
        ({"failures": ["", "", *[429] * 9]}, [], 1, "status 429 (not now), the last of 6 tries"),
        ({"failures": ["", "", *[503] * 9]}, [], 1, "status 503 (not now), the last of 6 tries"),
        ({"failures": ["", "", "slow"]}, ["--timeout", "1"], 1, "no answer within 1 seconds. Give a longer --timeout"),
        ({}, ["--plan", "p.json"], 2, "--endpoint serves one checkpoint. Write the plan's with prune"),
        ({}, ["--batch-size", "4"], 2, "--batch-size says how a model runs here"),
    ],
)
def test_failures_are_one_line(
    server: Completions,
    folder: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    health: Json,
    more: list[str],
    status: int,
    said: str,
) -> None:
    for name, value in health.items():
        setattr(server, name, list(value) if isinstance(value, list) else value)
    more = more if "--length" in more else ["--length", "40", *more]
    given = ["--perplexity", f"mill={text}", "--endpoint", server.url, "--num-concurrent", "1", *more]
    found, _, err = run(capsys, "evaluate", folder, *given, "-o", tmp_path / "e", "-q")
    assert (found, err.count("\n")) == (status, 1), err
    assert said.replace("URL", server.url) in err
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/v1",
        "ftp://here",
        "here:8000",
        "http://me:{KEY}@here",
        "http://me:p@{KEY}/s@here",
        "http://[::",
    ],
)
def test_addresses_that_are_none(url: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    given = ["--perplexity", "web-heldout", "--endpoint", url.replace("{KEY}", KEY), "-o", tmp_path / "e"]
    status, _, err = run(capsys, "evaluate", folder, *given, "-q")
    assert (status, err.count("\n")) == (2, 1)
    assert "http://HOST:PORT/v1" in err
    assert KEY not in err


def test_what_passes_is_tried_again_and_answers_are_kept(
    server: Completions, folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", folder, "--perplexity", f"mill={text}", "--length", "40", "--num-concurrent", "1"]
    command += ["--endpoint", server.url, "-o", tmp_path / "e", "-q"]
    server.failures = ["", "", "", 503, "cut", "", 400]  # two windows are answered
    assert run(capsys, *command)[0] == 2
    kept = tmp_path / ".e.answers.partial"
    kept.write_text(kept.read_text() + '["half of a li')
    server.seen, server.failures = [], ["", "", 429]
    assert run(capsys, *command)[0] == 0
    windows = Evaluation.load(tmp_path / "e").windows["full"]["mill"]
    assert len(server.seen) == 2 + 1 + len(windows) - 2  # what is asked first, the answer 429, and the rest
    assert not kept.exists()

    async def in_a_notebook() -> int:
        return run(capsys, *command[:-3], "-o", tmp_path / "f", "-q")[0]

    assert asyncio.run(in_a_notebook()) == 0
    np.testing.assert_array_equal(windows, Evaluation.load(tmp_path / "f").windows["full"]["mill"])


def test_a_server_without_log_probabilities_generates(
    server: Completions, folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.change = broken
    include = own_task(data, "generate_until", "exact_match")
    definition = (include / "letters.yaml").read_text()
    command = ["evaluate", folder, "--endpoint", server.url, "--include-path", include, "-q"]
    command += ["--overwrite", "-o", tmp_path / "e"]
    for new, status, said in ((8, 0, ""), (POSITIONS, 2, f"generates up to {POSITIONS} tokens")):
        (include / "letters.yaml").write_text(f"{definition}generation_kwargs: {{until: ['.'], max_gen_toks: {new}}}\n")
        found, _, err = run(capsys, *command, "--tasks", "letters")
        assert (found, said in err) == (status, True), err
    choosing = ["--tasks", "letters,arc_easy", "--data-dir", data]
    status, _, err = run(capsys, *command, *choosing)
    assert (status, err.count("\n")) == (2, 1)
    assert "--tasks arc_easy: " in err
    command.remove("-q")
    for name, noted in (("tiny", True), (folder.name, False)):
        server.names = [name]
        _, _, err = run(capsys, *command, *choosing)
        assert (f"note: the server serves {name} from /models/{name}, the folder is {folder}" in err) == noted, err
