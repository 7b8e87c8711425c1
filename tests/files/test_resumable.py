"""Folders that are filled in several runs: the journal, what makes it invalid, damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moecover.errors import InputError, MoecoverError
from moecover.files.hashing import file_hash
from moecover.files.resumable import partial_folder, resumable_folder
from tests.support.folders import names_in


def fill(path: Path, names: str, *, inputs: dict[str, object] | None = None, fail: str = "") -> list[str]:
    """Make an output of small files; what was said, and the names of those that had to be made."""
    said: list[str] = []
    with resumable_folder(path, inputs or {"a": 1, "b": [2, "x"]}, say=said.append) as partial:
        for name in names:
            if name not in partial.finished:
                said.append(name)
                (partial.files / name).write_text(name * 10)
                partial.finish(partial.files / name, file_hash(partial.files / name))
            if name == fail:
                (partial.files / "half").write_text("x")
                raise MoecoverError("failed")
    return said


def test_finished_files_are_used_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(MoecoverError, match=r"^failed\. Progress is saved in .*/.out.partial; rerun the same"):
        fill(out, "abcd", fail="b")
    assert names_in(tmp_path) == [".out.partial"]
    assert names_in(tmp_path / ".out.partial" / "files") == ["a", "b", "half"]
    assert fill(out, "abcd") == ["c", "d"]
    assert names_in(tmp_path) == ["out"]
    assert names_in(out) == ["a", "b", "c", "d"]


def test_other_inputs_start_anew_and_say_what_differs(tmp_path: Path) -> None:
    for inputs in ({"a": 1, "b": [2, "y"]}, {"a": 1}, {"a": 1, "b": [2, "x"], "c": None, "d": 0}):
        with pytest.raises(MoecoverError):
            fill(tmp_path / "out", "ab", fail="b")
        said = fill(tmp_path / "out", "ab", inputs=inputs)
        differs = "d" if "d" in inputs else "b"
        folder = tmp_path / ".out.partial"
        assert said == [f"starting over: {folder} was made from other inputs, {differs} differs", "a", "b"]
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "files" / "a").write_text("b" * 10),
        lambda folder: (folder / "files" / "a").write_text("a"),
        lambda folder: (folder / "files" / "a").unlink(),
        lambda folder: edit_journal(folder, lambda j: j["finished"].update(a=None)),
        lambda folder: edit_journal(folder, lambda j: j["finished"]["a"].pop("xxh3_128")),
    ],
)
def test_a_finished_file_that_changed_is_written_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    with pytest.raises(MoecoverError):
        fill(tmp_path / "out", "abc", fail="b")
    damage(tmp_path / ".out.partial")
    file = tmp_path / ".out.partial" / "files" / "a"
    assert fill(tmp_path / "out", "abc") == [f"{file} has changed since: written again", "a", "c"]
    assert (tmp_path / "out" / "a").read_text() == "a" * 10


def edit_journal(folder: Path, edit: Callable[[dict], object]) -> None:
    journal = json.loads((folder / "journal.json").read_text())
    edit(journal)
    (folder / "journal.json").write_text(json.dumps(journal))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 2}', '{"schema": 1, "inputs": {}, "finished": []}'])
def test_a_damaged_journal_counts_as_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(MoecoverError):
        fill(tmp_path / "out", "abc", fail="b")
    (tmp_path / ".out.partial" / "journal.json").write_text(text)
    assert fill(tmp_path / "out", "abc") == ["a", "b", "c"]


def test_the_partial_folder_may_be_deleted_but_a_foreign_one_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(MoecoverError):
        fill(tmp_path / "out", "ab", fail="b")
    shutil.rmtree(tmp_path / ".out.partial")
    assert fill(tmp_path / "out", "ab") == ["a", "b"]
    foreign = partial_folder(tmp_path / "other")
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r".other.partial is in the way: it was not written by moecover. Rename it"):
        fill(tmp_path / "other", "a")
    (tmp_path / ".link.partial").symlink_to(foreign)
    with pytest.raises(InputError, match="is in the way"):
        fill(tmp_path / "link", "a")
    assert names_in(foreign) == ["thesis.tex"]
