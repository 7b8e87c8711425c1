"""Hub models over the real client, against a small HTTP server that plays the hub; in processes that know where."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny-moe"


class Hub(http.server.ThreadingHTTPServer):
    """Serves one folder as one model repository; remembers the bytes of every file that were asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.sent: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = sorted(p.name for p in self.server.folder.iterdir())
        if re.fullmatch(rf"/api/models/{REPO}(/revision/(main|v1|{COMMIT}))?", path):
            siblings = [{"rfilename": f, "size": (self.server.folder / f).stat().st_size} for f in files]
            about = {
                "_id": "1",
                "id": REPO,
                "modelId": REPO,
                "sha": COMMIT,
                "siblings": siblings,
                "private": False,
                "tags": [],
                "downloads": 0,
            }
            return self.reply(200, json.dumps(about).encode(), Content_Type="application/json", X_Repo_Commit=COMMIT)
        if re.fullmatch(rf"/api/models/{REPO}/tree/(main|v1|{COMMIT})", path):
            tree = [
                {"type": "file", "path": f, "size": (self.server.folder / f).stat().st_size, "oid": f} for f in files
            ]
            return self.reply(200, json.dumps(tree).encode(), Content_Type="application/json", X_Repo_Commit=COMMIT)
        match = re.fullmatch(rf"/{REPO}/resolve/(main|v1|{COMMIT})/(.+)", path)
        file = self.server.folder / match[2] if match else None
        if file is None or not file.is_file():
            return self.reply(404, b"", X_Error_Code="EntryNotFound" if match else "RepoNotFound")
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status = 200
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        if self.command == "GET":
            self.server.sent[file.name] = self.server.sent.get(file.name, 0) + len(content)
        return self.reply(status, content, **headers)

    do_HEAD = do_GET


@pytest.fixture
def hub(checkpoints: Callable[..., Path], tmp_path: Path) -> Iterator[Hub]:
    import shutil

    folder = tmp_path / "repo"
    shutil.copytree(checkpoints("qwen3_moe", shards=True), folder)
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


# Runs one command after the other, as a process each would: they share nothing but what they have imported.
COMMANDS = """
import contextlib, io, json, sys
from moecover.cli.main import main
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""
Done = tuple[int, str, str]  # exit status, stdout, stderr


def moecover(hub: Hub, cache: Path, *commands: Sequence[object]) -> list[Done]:
    """What each of these commands does."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    given = json.dumps([list(map(str, arguments)) for arguments in commands])
    command = [sys.executable, "-c", COMMANDS, given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return [(status, out, err) for status, out, err in map(json.loads, done.stdout.splitlines())]


def test_inspect_fetches_headers_only(hub: Hub, tmp_path: Path) -> None:
    ((status, out, err),) = moecover(hub, tmp_path / "cache", ["inspect", REPO, "--json"])
    assert status == 0, err
    facts = json.loads(out)
    assert (facts["family"], facts["experts"], facts["moe_layers"]) == ("qwen3_moe", 8, [0, 2])
    on_disk = sum(p.stat().st_size for p in hub.folder.glob("*.safetensors"))
    assert facts["total_bytes"] < on_disk  # headers are not weights
    assert "pytorch_model.bin" not in hub.sent


def test_weights_that_the_configuration_names(hub: Hub, tmp_path: Path) -> None:
    """The same tensors from the headers over the network as from the downloaded files, and no others."""
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "own.safetensors.index.json").write_bytes((hub.folder / "model.safetensors.index.json").read_bytes())
    (hub.folder / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "own.safetensors.index.json"})
    )
    (hub.folder / "model.safetensors").write_bytes(b"never read")
    commands = [["inspect", source, "--json"] for source in (hub.folder, REPO)]
    first, second = moecover(hub, tmp_path / "cache", *commands)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    before, facts = json.loads(first[1]), json.loads(second[1])
    assert {**facts, "model": 0, "warnings": 0} == {**before, "model": 0, "warnings": 0}
    assert facts["shards"] == len(list(hub.folder.glob("model-*.safetensors")))


def test_prune_a_hub_model_at_a_revision(hub: Hub, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": list(range(40))}) + "\n")
    prune = ["prune", REPO, "--revision", "v1", "--corpus", f"r={rows}", "--retain", 0.5, "-o", tmp_path / "out"]
    verify = ["verify", REPO, tmp_path / "out", "--corpus", f"r={rows}"]
    for status, out, err in moecover(hub, tmp_path / "cache", prune, verify):
        assert status == 0, err + out
    manifest = json.loads((tmp_path / "out" / "moecover.json").read_text())
    assert manifest["source"]["name"] == REPO
    assert manifest["source"]["revision"] == COMMIT
    assert f"base_model: {REPO}" in (tmp_path / "out" / "README.md").read_text()
    assert "pytorch_model.bin" not in hub.sent


def test_a_model_that_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    absent, no_revision = ["inspect", "someone/absent"], ["inspect", REPO, "--revision", "no"]
    for (_, name, *_), done in zip(
        (absent, no_revision), moecover(hub, tmp_path / "cache", absent, no_revision), strict=True
    ):
        status, _, err = done
        assert status == 2
        assert f"no folder {name}, and the hub did not give {name}" in err
        assert len(err.strip().splitlines()) == 1


def test_a_refusal_comes_before_the_download(hub: Hub, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": list(range(40))}) + "\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("x")
    config = json.loads((hub.folder / "config.json").read_text())
    prune = ["prune", REPO, "--corpus", f"r={rows}"]
    below, taken = [*prune, "--keep", 1, "-o", tmp_path / "o"], [*prune, "--keep", 4, "-o", tmp_path / "taken"]
    found = moecover(hub, tmp_path / "cache", below, taken)
    (hub.folder / "config.json").write_text(json.dumps({**config, "n_group": 4}))
    found += moecover(hub, tmp_path / "another cache", [*prune, "--keep", 4, "-o", tmp_path / "o"])
    for (status, _, err), message in zip(found, ("top-k of 2", "taken exists", "groups for"), strict=True):
        assert status == 2
        assert message in err
    assert "tokenizer.json" not in hub.sent  # a whole download would have fetched it
