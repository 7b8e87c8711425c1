"""A hub over HTTP on this machine, of models or of data sets; and processes that know where it is.

What it answers is what the real clients ask: facts of a repository, its tree, its files and ranges of them. A hub that
has a folder for new repositories takes uploads too, as the real one does: who the token is, a new repository, how each
file is sent, large ones by LFS, and a commit.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = "main|v1|[0-9a-f]{40}"
TOKEN = "let-me-in"
USER = "me"
LARGE = (".safetensors", ".gguf")  # what goes by LFS


class Hub(http.server.ThreadingHTTPServer):
    """Serves folders as repositories.

    Attributes:
        repos: folder by id.
        kind: ``models`` or ``datasets``.
        gated: ids whose files need `TOKEN`.
        sent: bytes of every file that were sent.
        new: where repositories are created; None for a hub that takes no uploads.
        private: ids of repositories that were created so.
        role: of the token, ``write`` or ``read``.
        received: LFS objects that arrived, by hash.
        puts: how many arrived.
        broken: connections that are lost in the middle of an LFS object, before one is not.
        refusal: status and message by the end of a path, for failures.
        posts: paths of what was posted, in order.
    """

    def __init__(self, repos: Mapping[str, Path], kind: str, new: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.kind, self.new = dict(repos), kind, new
        self.gated: set[str] = set()
        self.sent: dict[str, int] = {}
        self.private: set[str] = set()
        self.role = "write"
        self.received: dict[str, bytes] = {}
        self.puts = self.broken = 0
        self.refusal: dict[str, tuple[int, str]] = {}
        self.posts: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def folder(self) -> Path:
        (folder,) = self.repos.values()
        return folder


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def entry(folder: Path, path: str) -> dict[str, object]:
    size, oid = (folder / path).stat().st_size, hashlib.sha1(path.encode()).hexdigest()
    return {"type": "file", "path": path, "rfilename": path, "size": size, "oid": oid}


def tree(folder: Path, inside: str, *, whole: bool) -> list[dict[str, object]]:
    start = f"{inside}/" if inside else ""
    names = [name for name in files_of(folder) if name.startswith(start)]
    if whole:
        return [entry(folder, name) for name in names]
    here = [entry(folder, name) for name in names if "/" not in name[len(start) :]]
    below = dict.fromkeys(name[len(start) :].partition("/")[0] for name in names if "/" in name[len(start) :])
    return [*({"type": "directory", "path": start + name, "oid": COMMIT} for name in below), *here]


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

    def as_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json", X_Repo_Commit=COMMIT)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def is_known(self) -> bool:
        return f"Bearer {TOKEN}" in self.headers.get("Authorization", "")

    def refused(self, path: str) -> bool:
        """Whether a path is one that fails; then it has failed."""
        if not path.startswith("/lfs/") and not self.is_known:
            self.reply(401, b"{}", X_Error_Message="Invalid credentials")
            return True
        status, message = next((one for end, one in self.server.refusal.items() if path.endswith(end)), (0, ""))
        if status:
            body = {"error": message, "errors": [{"message": message}]}
            self.reply(status, json.dumps(body).encode(), X_Error_Message=message)
        return bool(status)

    def do_POST(self) -> None:
        """What an upload posts."""
        hub, path, body = self.server, unquote(self.path.partition("?")[0]), self.body()
        hub.posts.append(path)
        if self.refused(path):
            return None
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.as_json({"warnings": [], "errors": []})
        repo = re.fullmatch(
            r"(?:/api/models)?/(.+?)(?:\.git/info/lfs/objects/batch|/preupload/main|/commit/main)", path
        )
        if repo is None or repo[1] not in hub.repos:
            return self.reply(404, b"{}", X_Error_Code="RepoNotFound")
        if path.endswith("/preupload/main"):
            modes = {True: "lfs", False: "regular"}
            files = [file["path"] for file in json.loads(body)["files"]]
            found = [{"path": p, "uploadMode": modes[p.endswith(LARGE)], "shouldIgnore": False} for p in files]
            return self.as_json({"files": found})
        if path.endswith("/batch"):
            return self.as_json({"objects": [self.instructions(one) for one in json.loads(body)["objects"]]})
        return self.commit(hub.repos[repo[1]], [json.loads(line) for line in body.splitlines()], repo[1])

    def create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.server.repos:
            return self.reply(409, json.dumps({"url": f"{self.server.url}/{repo}"}).encode(), X_Error_Message="exists")
        if self.server.new is None or asked["organization"] != USER:
            return self.reply(403, b"{}", X_Error_Message="You don't have the rights to create a model there")
        self.server.repos[repo] = self.server.new / repo
        self.server.repos[repo].mkdir(parents=True)
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(repo)
        return self.as_json({"url": f"{self.server.url}/{repo}", "name": repo})

    def instructions(self, one: dict[str, Any]) -> dict[str, Any]:
        """What to do for an LFS object: nothing if it is there."""
        upload = {"actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
        return {"oid": one["oid"], "size": one["size"], **({} if one["oid"] in self.server.received else upload)}

    def do_PUT(self) -> None:
        """An LFS object."""
        if self.server.broken and self.server.received:  # after the first object
            self.server.broken -= 1
            self.rfile.read(10)
            self.close_connection = True
            return self.connection.close()
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.server.received[self.path.rpartition("/")[2]] = content
        self.server.puts += 1
        return self.reply(200, b"")

    def commit(self, folder: Path, lines: list[dict[str, Any]], repo: str) -> None:
        for line in lines:
            if line["key"] == "header":
                continue
            value, file = line["value"], folder / line["value"]["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            large = line["key"] == "lfsFile"
            file.write_bytes(self.server.received[value["oid"]] if large else base64.b64decode(value["content"]))
        self.as_json({"commitUrl": f"{self.server.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    def do_GET(self) -> None:
        hub, path = self.server, unquote(self.path.partition("?")[0])
        if path == "/api/whoami-v2":
            if self.refused(path):
                return None
            token = {"displayName": "t", "role": hub.role}
            orgs = [{"name": "readers", "roleInOrg": "read"}]
            return self.as_json({"type": "user", "name": USER, "orgs": orgs, "auth": {"accessToken": token}})
        kind = "" if hub.kind == "models" else f"{hub.kind}/"
        for repo, folder in hub.repos.items():
            if path.startswith((f"/api/{hub.kind}/{repo}/", f"/{kind}{repo}/")) or path == f"/api/{hub.kind}/{repo}":
                return self.answer(path.partition(repo)[2], repo, folder)
        return self.reply(404, b"", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def answer(self, path: str, repo: str, folder: Path) -> None:
        """Answer what is asked of a repository."""
        refused = repo in self.server.gated and f"Bearer {TOKEN}" not in self.headers.get("Authorization", "")
        if re.fullmatch(rf"(/revision/({REVISIONS}))?", path):
            about = {
                "_id": "1",
                "id": repo,
                "modelId": repo,
                "sha": COMMIT,
                "private": repo in self.server.private,
                "tags": [],
            }
            about |= {"downloads": 0, "gated": "auto" if repo in self.server.gated else False}
            return self.as_json(about | {"siblings": [entry(folder, name) for name in files_of(folder)]})
        if found := re.fullmatch(rf"/tree/({REVISIONS})/?(.*)", path):
            return self.as_json(tree(folder, found[2], whole="recursive=true" in self.path.lower()))
        if refused:
            return self.reply(403, b"", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
        if path == "/auth-check":
            return self.as_json({})
        found = re.fullmatch(rf"/resolve/({REVISIONS})/(.+)", path)
        if found and (folder / found[2]).is_file():
            return self.send_file(folder / found[2])
        return self.reply(404, b"", X_Error_Code="EntryNotFound" if found else "RevisionNotFound")

    def send_file(self, file: Path) -> None:
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        wanted, status = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")), 200
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        if self.command == "GET":
            self.server.sent[file.name] = self.server.sent.get(file.name, 0) + len(content)
        self.reply(status, content, **headers)


@contextlib.contextmanager
def served(repos: Mapping[str, Path], kind: str = "models", new: Path | None = None) -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    server = Hub(repos, kind, new)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def in_process(url: str, cache: Path, code: str, given: object, **environment: str) -> list[Any]:
    """What a program prints as lines of JSON, in a process that has the hub at a URL; it gets a value as JSON."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    variables |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **environment,
    }
    command = [sys.executable, "-c", code, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


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


def moecover(url: str, cache: Path, *commands: Sequence[object]) -> list[Done]:
    """What each of these commands does, with the hub at a URL."""
    given = [list(map(str, one)) for one in commands]
    return [(status, out, err) for status, out, err in in_process(url, cache, COMMANDS, given)]
