"""Uploads over the real client to a small HTTP server that plays the hub: what arrives, and what is refused when."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.utils import _http

import moecover
from moecover.errors import InputError, MoecoverError
from moecover.verification.job import verify
from tests.conftest import write_rows
from tests.support.command_line import run
from tests.support.fake_hub import TOKEN, Hub, served
from tests.support.folders import contents
from tests.support.gguf_files import plan_for, write_gguf

MADE_FOR_IT = {"README.md", "moecover.json"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that takes uploads, with a login in this process."""
    with served({}, new=tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # between the client's own attempts
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield server
    close_session()


@pytest.fixture
def half(pruned: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder that `prune` finished, of several shards."""
    return Path(shutil.copytree(pruned("qwen3_moe", shards=True), tmp_path / "half"))


def rest(folder: Path) -> dict[str, bytes]:
    return {name: text for name, text in contents(folder).items() if name not in MADE_FOR_IT}


def test_prune_uploads_at_its_end(
    hub: Hub, checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, source = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [*range(40)]}]), checkpoints("qwen3_moe")
    prune = ["prune", source, "--corpus", f"r={rows}", "--retain", 0.5, "-o", tmp_path / "half"]
    status, out, err = run(capsys, *prune, "--push-to-hub", "me/half-of-it", "--private")
    assert (status, f"{hub.url}/me/half-of-it: " in out) == (0, True), err
    there = tmp_path / "hub" / "me" / "half-of-it"
    assert rest(there) == rest(tmp_path / "half")
    assert hub.private == {"me/half-of-it"}
    assert 'name = "me/half-of-it"' in (there / "README.md").read_text()
    assert "your-name" not in (there / "README.md").read_text()
    for name in MADE_FOR_IT:
        assert str(tmp_path) not in (there / name).read_text()
        assert str(source.parent) not in (there / name).read_text()
    assert "--push-to-hub me/half-of-it" in json.loads((there / "moecover.json").read_text())["command"]
    assert verify(source, there, progress=False).equal  # as whoever downloads it sees it
    assert hub.posts[-1].endswith("/commit/main")
    assert [post for post in hub.posts if post.endswith("/commit/main")] == hub.posts[-1:]


def test_a_lost_connection_is_resumed(hub: Hub, half: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.broken = 99
    status, _, err = run(capsys, "upload", half, "me/half")
    assert status == 1
    assert err.splitlines()[-1].endswith(f"What arrived is not sent again: moecover upload {half} me/half")
    assert list(hub.repos["me/half"].iterdir()) == []  # nothing is shown before everything is there
    arrived = dict(hub.received)
    assert arrived
    hub.broken, before = 0, hub.puts
    status, out, err = run(capsys, "upload", half, "me/half", "--json")
    assert (status, json.loads(out)["repository"]) == (0, "me/half"), err
    assert rest(hub.repos["me/half"]) == rest(half)
    assert hub.puts - before == len(hub.received) - len(arrived)


def test_only_what_moecover_wrote_is_uploaded(hub: Hub, half: Path) -> None:
    (half / "notes.txt").write_text("mine")
    (half / ".half.lock").write_text("")
    (half / "README.md").write_text("---\nlicense: mit\n---\nMy own words on your-name/it.\n")
    made = moecover.upload(half, "me/half", progress=False)
    there = contents(hub.repos["me/half"])
    assert sorted(there) == sorted(made.files)
    assert not {"notes.txt", ".half.lock"} & there.keys()
    assert there["README.md"] == b"---\nlicense: mit\n---\nMy own words on me/half.\n"


def test_a_gguf_file_takes_its_card_along(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_gguf(tmp_path / "model.gguf", "qwen3moe")
    plan_for([[0, 1, 2], [3, 4, 5]], model=str(source)).save(tmp_path / "plan.json")
    prune = ["prune", source, "--plan", tmp_path / "plan.json", "-o", tmp_path / "half.gguf"]
    status, out, err = run(capsys, *prune, "--push-to-hub", "me/half-GGUF")
    assert status == 0, out + err
    there = contents(tmp_path / "hub" / "me" / "half-GGUF")
    assert there.keys() == {"half.gguf", "README.md"}
    assert there["half.gguf"] == (tmp_path / "half.gguf").read_bytes()
    assert b"llama-server --hf-repo me/half-GGUF --hf-file half.gguf" in there["README.md"]
    assert not [name for name, content in there.items() if str(tmp_path).encode() in content]
    (tmp_path / "half.md").unlink()
    for file, message in ((tmp_path / "half.gguf", "half.md, the model card of"), (source, "was not written by")):
        with pytest.raises(InputError, match=message):
            moecover.upload(file, "me/half-GGUF", progress=False)


BAD_NAMES = ("half", "me/half/it", "me/", "me/a--b", "-me/half", "me/half.", "me/h\u00e4lf", "me/" + "x" * 97)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_the_hub_does_not_take(hub: Hub, half: Path, name: str) -> None:
    with pytest.raises(InputError, match="give OWNER/NAME, of ASCII letters"):
        moecover.upload(half, name, progress=False)
    assert hub.posts == []


@pytest.mark.parametrize(
    "cause, message",
    [
        ("offline", "HF_HUB_OFFLINE is set"),
        ("no login", "not logged in to the hub. Run `hf auth login`"),
        ("token", "the hub does not accept the token. Run `hf auth login`"),
        ("read token", "the token of your login may only read"),
        ("readers/half", "your role in readers may only read. Ask for another one, or upload to me"),
        ("you/half", "you is neither your account nor an organisation of yours on the hub: me, readers"),
        ("me/public", "--private: me/public exists and is public"),
        ("hub is down", "me/half: the hub did not do it: "),
    ],
)
def test_what_cannot_be_uploaded_is_said_before_the_work(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cause: str,
    message: str,
) -> None:
    """Before the model is even looked for: there is none at this path."""
    if cause == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif cause == "no login":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    elif cause == "token":
        monkeypatch.setenv("HF_TOKEN", "wrong")
    elif cause == "read token":
        hub.role = "read"
    elif cause == "hub is down":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.repos["me/public"] = tmp_path
    repository = cause if "/" in cause else "me/half"
    end = ["-o", tmp_path / "out", "--push-to-hub", repository, "--private"]
    for verb in (["prune", tmp_path / "none", "--corpus", "web", "--keep", 4], ["shrink", tmp_path / "none"]):
        status, _, err = run(capsys, *verb, *end)
        assert (status, len(err.splitlines())) == (1 if cause == "hub is down" else 2, 1)
        assert message in err
    assert hub.posts == []


@pytest.mark.parametrize(
    "cause, message",
    [
        ("/commit/main", "the hub refuses to write (it is frozen). Run `hf auth login`"),
        ("/api/repos/create", "the hub refuses to write (it is frozen)"),
        ("/api/validate-yaml", "the hub refuses the head of the model card: Invalid metadata in README.md"),
        ("other weights", "me/half holds other weights, model-00009-of-00009.safetensors among them"),
        ("unfinished", "half holds no moecover.json: moecover did not write it, or did not finish"),
        ("changed", "half is not what moecover wrote: config.json changed or went. Prune again"),
        ("link", "half is not what moecover wrote: tokenizer.json changed or went"),
        ("no folder", "none is no folder. Give a folder or a .gguf file that"),
    ],
)
def test_what_is_refused_leaves_nothing_on_the_hub(
    hub: Hub, half: Path, tmp_path: Path, cause: str, message: str
) -> None:
    folder, there = half, tmp_path / "there"
    if cause.startswith("/"):
        status = 400 if cause.endswith("yaml") else 403
        hub.refusal[cause] = (status, "it is frozen")
    elif cause == "other weights":
        there.mkdir()
        (there / "model-00009-of-00009.safetensors").write_text("")
        hub.repos["me/half"] = there
    elif cause == "unfinished":
        (half / "moecover.json").unlink()
    elif cause == "changed":
        (half / "config.json").write_text((half / "config.json").read_text() + " ")
    elif cause == "link":
        (half / "tokenizer.json").rename(tmp_path / "secret")
        (half / "tokenizer.json").symlink_to(tmp_path / "secret")
    else:
        folder = tmp_path / "none"
    with pytest.raises(MoecoverError) as refused:
        moecover.upload(folder, "me/half", progress=False)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert rest(hub.repos["me/half"]).keys() <= {"model-00009-of-00009.safetensors"} if "me/half" in hub.repos else True


def test_the_end_line_says_how_to_publish(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [*range(40)]}]), tmp_path / "half"
    prune = ["prune", checkpoints("qwen3_moe"), "--corpus", f"r={rows}", "--keep", 4, "-o", out]
    assert run(capsys, *prune)[1].splitlines()[-1].endswith(f"hf upload OWNER/NAME {out}")
    assert "--private has no use here: give --push-to-hub" in run(capsys, *prune, "--private")[2]
