"""`evaluate --endpoint` against the real server of llama.cpp: answers as in memory, no log-probabilities of prompts."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moecover.evaluation.artifact import Evaluation
from tests.support.command_line import run
from tests.support.gguf_models import OPTIONS, convert, needs_llama
from tests.support.tasks import ARC, own_task, write_rows

pytestmark = needs_llama
START = 60  # seconds until the server answers
SERVE = """
import sys, time
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = sys.argv[1], ["127.0.0.1"], int(sys.argv[2])
params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = 1024, 2, 1, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
time.sleep(600)
"""


@contextlib.contextmanager
def serving(model: Path, log: Path) -> Iterator[str]:
    """The address of a server that runs until the block ends."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    url = f"http://127.0.0.1:{port}/v1"
    with log.open("w") as file:
        server = subprocess.Popen([sys.executable, "-c", SERVE, str(model), str(port)], stdout=file, stderr=file)
        try:
            for _ in range(START * 10):
                assert server.poll() is None, log.read_text()[-3000:]
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"{url}/models", timeout=5).close()
                    break
                time.sleep(0.1)
            yield url
        finally:
            server.kill()
            server.wait(60)


def test_answers_are_those_of_the_folder(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    folder = checkpoints("qwen2_moe", **OPTIONS["qwen2_moe"], max_position_embeddings=512)
    model, data = convert(folder, tmp_path / "model.gguf"), tmp_path / "data"
    write_rows(data / "arc_easy", test=ARC, validation=ARC[:2])
    include = own_task(data, "generate_until", "exact_match")
    path = include / "letters.yaml"
    path.write_text(f"{path.read_text()}generation_kwargs: {{until: ['.'], max_gen_toks: 8}}\n")
    given = ["evaluate", folder, "--tasks", "letters", "--include-path", include, "-q"]
    with serving(model, tmp_path / "log.txt") as url:
        for more in (["--dtype", "float32", "-o", tmp_path / "here"], ["--endpoint", url, "-o", tmp_path / "there"]):
            status, _, err = run(capsys, *given, *more)
            assert status == 0, err
        here, there = Evaluation.load(tmp_path / "here"), Evaluation.load(tmp_path / "there")
        assert there.rows[0].tasks == here.rows[0].tasks
        text = ["--perplexity", "web-heldout", "--endpoint", url, "-o", tmp_path / "text"]
        status, _, err = run(capsys, "evaluate", folder, "-q", *text)
        assert (status, err.count("\n")) == (2, 1)
        assert "does not give the log-probabilities of a prompt's tokens" in err
