"""A hub of one repository, a model or a data set, over HTTP on this machine; and commands in processes that know where.

What it answers is what the real clients ask: facts of the repository, its tree, its files and ranges of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = f"main|v1|{COMMIT}"


class Hub(http.server.ThreadingHTTPServer):
    """Serves one folder as one repository.

    Attributes:
        sent: bytes of every file that were sent.
        asked: paths of all requests.
        gated: whether files and terms need a token.
    """

    def __init__(self, folder: Path, repo: str, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.repo, self.kind = folder, repo, kind
        self.sent: dict[str, int] = {}
        self.asked: list[str] = []
        self.gated = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> list[str]:
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())

    def entry(self, path: str) -> dict[str, object]:
        size, oid = (self.folder / path).stat().st_size, hashlib.sha1(path.encode()).hexdigest()
        return {"type": "file", "path": path, "rfilename": path, "size": size, "oid": oid}

    def tree(self, folder: str, *, whole: bool) -> list[dict[str, object]]:
        start = f"{folder}/" if folder else ""
        inside = [name for name in self.files() if name.startswith(start)]
        if whole:
            return [self.entry(name) for name in inside]
        here = [self.entry(name) for name in inside if "/" not in name[len(start) :]]
        below = dict.fromkeys(name[len(start) :].partition("/")[0] for name in inside if "/" in name[len(start) :])
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

    def do_GET(self) -> None:
        hub, path = self.server, unquote(self.path.partition("?")[0])
        hub.asked.append(f"{self.command} {path}")
        api = f"/api/{hub.kind}/{hub.repo}"
        prefix = "" if hub.kind == "models" else f"/{hub.kind}"
        if re.fullmatch(rf"{api}(/revision/({REVISIONS}))?", path):
            about = {"_id": "1", "id": hub.repo, "modelId": hub.repo, "sha": COMMIT, "private": False, "tags": []}
            about |= {"downloads": 0, "gated": "auto" if hub.gated else False}
            return self.as_json(about | {"siblings": [hub.entry(name) for name in hub.files()]})
        if path == f"{api}/auth-check":
            return self.refused() if self.is_refused() else self.as_json({})
        if found := re.fullmatch(rf"{api}/tree/({REVISIONS})/?(.*)", path):
            return self.as_json(hub.tree(found[2], whole="recursive=true" in self.path.lower()))
        found = re.fullmatch(rf"{prefix}/{hub.repo}/resolve/({REVISIONS})/(.+)", path)
        file = hub.folder / found[2] if found else None
        if file is None or not file.is_file():
            known = path.startswith((api, f"{prefix}/{hub.repo}/resolve"))
            missing = "RevisionNotFound" if known and not re.search(rf"/({REVISIONS})(/|$)", path) else "EntryNotFound"
            return self.reply(404, b"", X_Error_Code=missing if known else "RepoNotFound")
        if self.is_refused():
            return self.refused()
        return self.send_file(file)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Facts of the paths that are asked for."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(f"POST {self.path}")
        try:
            wanted = json.loads(body)["paths"]
        except ValueError:
            from urllib.parse import parse_qs

            wanted = parse_qs(body.decode())["paths"]
        self.as_json([self.server.entry(name) for name in self.server.files() if name in wanted])

    def is_refused(self) -> bool:
        return self.server.gated and "Bearer let-me-in" not in self.headers.get("Authorization", "")

    def refused(self) -> None:
        self.reply(403, b"", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")

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
def served(folder: Path, repo: str, kind: str = "models") -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    server = Hub(folder, repo, kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
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


def moecover(url: str, cache: Path, *commands: Sequence[object], **environment: str) -> list[Done]:
    """What each of these commands does, with the hub at a URL."""
    given = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    given |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **environment,
    }
    arguments = json.dumps([list(map(str, one)) for one in commands])
    command = [sys.executable, "-c", COMMANDS, arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=given, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return [(status, out, err) for status, out, err in map(json.loads, done.stdout.splitlines())]
