"""`evaluate --endpoint` against real servers on this machine: vLLM scores what the folder scores here.

`make test-servers` installs vLLM's CPU build in an environment of its own; a server takes a minute to start.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from moecover.checkpoints.shipped import shipped_model
from moecover.evaluation.artifact import Evaluation
from tests.servers.test_vllm import PYTHON
from tests.support.command_line import run
from tests.support.tasks import ARC, own_task, write_rows

POSITIONS, START = 256, 300  # tokens of a request; seconds until a server answers
NATS = 1e-3  # of a window's summed log-likelihood: 1e-5 of a token's, as tests/servers/test_vllm.py finds

pytestmark = pytest.mark.servers


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def started(command: Sequence[object], port: int, log: Path, **environment: str) -> Iterator[str]:
    """The address of a server that runs until the block ends."""
    url = f"http://127.0.0.1:{port}/v1"
    with log.open("w") as file:
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
        server = subprocess.Popen([str(c) for c in command], stdout=file, stderr=file, env=variables)
        try:
            for _ in range(START):
                assert server.poll() is None, log.read_text()[-3000:]
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"{url}/models", timeout=5).close()
                    break
                time.sleep(1)
            yield url
        finally:
            server.terminate()
            server.wait(60)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM with the shipped model in float32."""
    assert PYTHON.exists(), f"no vLLM at {PYTHON}: run `make test-servers`"
    port = free_port()
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", shipped_model(), "--port", port]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", POSITIONS, "--enforce-eager"]
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    with started([*command, "--served-model-name", "tiny"], port, log, VLLM_CPU_KVCACHE_SPACE="1") as url:
        yield url


def test_vllm_scores_what_the_folder_scores(vllm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "data"
    write_rows(data / "arc_easy", test=ARC, validation=ARC[:2])
    include = own_task(data, "generate_until", "exact_match")
    path = include / "letters.yaml"
    path.write_text(f"{path.read_text()}generation_kwargs: {{until: ['.'], max_gen_toks: 20}}\n")
    given = ["--perplexity", "web-heldout", "--windows", 8, "--length", 200, "--tasks", "arc_easy,letters"]
    given += ["--data-dir", data, "--include-path", include, "-q"]
    for more in (["--dtype", "float32", "-o", tmp_path / "here"], ["--endpoint", vllm, "-o", tmp_path / "there"]):
        status, _, err = run(capsys, "evaluate", shipped_model(), *given, *more)
        assert status == 0, err
    here, there = Evaluation.load(tmp_path / "here"), Evaluation.load(tmp_path / "there")
    ours, theirs = (one.windows["full"]["web-heldout"] for one in (here, there))
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=NATS)
    assert there.rows[0].tasks == here.rows[0].tasks
    assert there.tasks == here.tasks
    assert there.model["endpoint"]["server"] == "vllm"
    assert there.model["endpoint"]["max_length"] == POSITIONS
