"""Files and folders that appear only when they are complete."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moecover.errors import InputError, MoecoverError
from moecover.files.atomic import (
    canonical_json,
    check_output,
    explained,
    kept_file,
    new_file,
    new_folder,
    resolved,
    write_bytes,
    write_text,
)
from tests.support.folders import contents, names_in


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    with new_file(tmp_path / "deep" / "er" / "out") as file:
        file.write(b"content")
        assert not (tmp_path / "deep" / "er" / "out").exists()
    write_text(tmp_path / "deep" / "text", "ö")
    write_bytes(tmp_path / "deep" / "text2", b"x")
    assert contents(tmp_path) == {"deep/er/out": b"content", "deep/text": "ö".encode(), "deep/text2": b"x"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "old").write_text("old")
    for path in (tmp_path / "deep" / "er" / "out", tmp_path / "old"):
        with pytest.raises(error), new_file(path) as file:
            file.write(b"half")
            raise error
    assert contents(tmp_path) == {"old": b"old"}
    assert names_in(tmp_path) == ["old"]


def test_a_folder_where_a_file_is_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path} is a folder, a file is to be written there"), new_file(tmp_path):
        pass


def test_a_draft_is_kept_for_another_attempt(tmp_path: Path) -> None:
    out, draft = tmp_path / "deep" / "out", tmp_path / "drafts" / "draft"
    with pytest.raises(ValueError), kept_file(out, draft) as file:
        file.write(b"half")
        raise ValueError
    assert contents(tmp_path) == {"drafts/draft": b"half"}
    with kept_file(out, draft) as file:
        assert file.read() == b"half"
        file.write(b" and half")
    assert contents(tmp_path) == {"deep/out": b"half and half"}


def test_a_folder_replaces_another_when_it_is_complete(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(ValueError), new_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("half")
        raise ValueError
    assert contents(tmp_path) == {"out/old": b"old"}
    with new_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert contents(tmp_path) == {"out/new": b"new"}
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "number, remedy", [(errno.ENOSPC, "; free some space or choose another folder"), (errno.EACCES, "")]
)
def test_what_the_system_refuses_is_one_line(number: int, remedy: str) -> None:
    with pytest.raises(MoecoverError) as caught, explained("writing out", left="Nothing was lost"):
        raise OSError(number, os.strerror(number), "a", None, "b")
    assert str(caught.value) == f"writing out: a -> b: {os.strerror(number)}{remedy}. Nothing was lost"


def test_an_output_that_exists_is_refused_unless_it_is_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_output(out, overwrite=False, marker="mine")
    out.mkdir()
    check_output(out, overwrite=False, marker="mine")  # empty
    (out / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="out exists. Choose another output, or give overwrite") as caught:
        check_output(out, overwrite=False, marker="mine")
    assert caught.value.for_command_line.endswith("or give --overwrite")
    with pytest.raises(InputError, match=r"was not written by moecover \(it holds no mine\), so it is not overwritten"):
        check_output(out, overwrite=True, marker="mine")
    (out / "mine").write_text("x")
    check_output(out, overwrite=True, marker="mine")
    with pytest.raises(InputError, match="is a mount point"):
        check_output(Path("/"), overwrite=True, marker="mine")
    assert names_in(out) == ["mine", "thesis.tex"]


def test_equal_values_have_equal_texts() -> None:
    assert canonical_json({"b": [1, 2.0], "a": None}) == canonical_json({"a": None, "b": [1, 2.0]})
    assert canonical_json({"b": [1, 2.0], "a": None}) == '{"a":null,"b":[1,2.0]}'
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


@pytest.mark.parametrize("name", ["notes.txt", "1.jsonl.bak", "sub/1.jsonl", ".hidden", "x.jsonl"])
def test_a_file_of_the_user_s_in_an_output_is_named(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    for own in ("mine", "1.jsonl", "23.jsonl"):
        (out / own).write_text("x")
    names = ("mine", "[0-9].jsonl", "[0-9][0-9].jsonl")
    check_output(out, overwrite=True, marker="mine", names=names)
    (out / name).write_text("x")
    with pytest.raises(InputError, match=f"out/{name} was not written by moecover, and overwriting would remove it"):
        check_output(out, overwrite=True, marker="mine", names=names)


def test_an_output_that_leads_nowhere(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (loop, loop / "x", tmp_path / ("n" * 300), "a\0b", "~no-such-user-here/x"):
        with pytest.raises(InputError, match="cannot be an output"):
            resolved(path)
    (tmp_path / "link").symlink_to(tmp_path / "new")
    assert resolved(tmp_path / "link") == (tmp_path / "new").resolve()


def test_an_output_that_may_not_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(InputError, match=r"looking at the output .*out: .*Permission denied\. Choose another one"):
        check_output(tmp_path / "out", overwrite=True, marker="mine")
