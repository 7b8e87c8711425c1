"""A folder that is filled over several runs, if need be: what is finished is noted, checked and used again.

Beside the output OUT lies ``.OUT.partial`` until OUT is complete: ``files``, which takes the name OUT at the end;
``journal.json``, which says what the files are made from and which of them are finished, with size and hash; for the
moment of the change, ``replaced``, the folder that stood at OUT before. It may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecover.errors import InputError, MoecoverError
from moecover.files.atomic import PARTIAL, put_in_place, reason
from moecover.files.copying import HASH, file_hash

FILES, JOURNAL, REPLACED = "files", "journal.json", "replaced"
NEW_JOURNAL = JOURNAL + ".new"


def partial_folder(path: Path) -> Path:
    """Where an output is made."""
    return path.with_name(f".{path.name}{PARTIAL}")


@dataclass
class Partial:
    """An output folder in the making.

    Attributes:
        folder: see the module.
        inputs: what the files are made from, by the name that a message gives it.
        finished: size and hash of every finished file, by name.
    """

    folder: Path
    inputs: dict[str, Any]
    finished: dict[str, dict[str, Any]]

    @property
    def files(self) -> Path:
        """The folder to fill."""
        return self.folder / FILES

    def finish(self, file: Path, digest: str) -> None:
        """Note that a file in `files` is complete and on the disk."""
        self.finished[file.name] = {"size": file.stat().st_size, HASH: digest}
        new = self.folder / NEW_JOURNAL
        new.write_text(json.dumps({"schema": 1, "inputs": self.inputs, "finished": self.finished}, indent=1) + "\n")
        new.replace(self.folder / JOURNAL)

    def forget(self) -> None:
        """Note that no finished file is of use any more."""
        self.finished.clear()
        (self.folder / JOURNAL).unlink(missing_ok=True)


def _read_journal(folder: Path) -> dict[str, Any]:
    """Inputs and finished files as they were noted; both empty when nothing was, or the journal is damaged."""
    nothing: dict[str, Any] = {"schema": 1, "inputs": {}, "finished": {}}
    try:
        journal = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return nothing
    if not isinstance(journal, dict) or journal.get("schema") != 1:
        return nothing
    return journal if all(isinstance(journal.get(key), dict) for key in nothing if key != "schema") else nothing


def _as_noted(file: Path, entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    try:
        return bool(entry.get("size") == file.stat().st_size and entry.get(HASH) == file_hash(file))
    except OSError:  # gone, or the disk cannot read it
        return False


def _still_good(folder: Path, inputs: dict[str, Any], say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """The finished files that belong to these inputs and are as they were written."""
    journal = _read_journal(folder)
    noted, before = journal["finished"], journal["inputs"]
    inputs = json.loads(json.dumps(inputs))
    if not noted:
        return {}
    if differs := [name for name in {**inputs, **before} if inputs.get(name) != before.get(name)]:
        say(f"starting anew: {folder} was made from other inputs, {differs[0]} differs")
        return {}
    good = {name: entry for name, entry in noted.items() if _as_noted(folder / FILES / name, entry)}
    if bad := sorted(noted.keys() - good.keys()):
        say(f"{folder / FILES / bad[0]} is not as it was written{f', nor are {len(bad) - 1} others' if bad[1:] else ''}: written again")  # fmt: skip
    return good


def restore(path: Path) -> None:
    """Put back the folder that stood at ``path`` when a kill came between the two renames of a replacement.

    Raises:
        MoecoverError: it cannot be renamed.
    """
    replaced = partial_folder(path) / REPLACED
    if replaced.exists() and not path.exists():
        try:
            replaced.rename(path)
        except OSError as error:
            raise MoecoverError(reason(f"restoring {path}", error)) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _open(folder: Path, inputs: dict[str, Any], say: Callable[[str], None]) -> Partial:
    """The folder with nothing in it but the finished files of these inputs."""
    (folder / FILES).mkdir(parents=True, exist_ok=True)
    partial = Partial(folder, inputs, _still_good(folder, inputs, say))
    if not partial.finished:
        (folder / JOURNAL).unlink(missing_ok=True)
    for entry in [*partial.files.iterdir(), folder / NEW_JOURNAL, folder / REPLACED]:
        if entry.name not in partial.finished:
            _remove(entry)
    return partial


def _check_ours(folder: Path) -> None:
    ours = {FILES, JOURNAL, NEW_JOURNAL, REPLACED}
    if folder.is_symlink() or (
        folder.exists() and not (folder.is_dir() and ours.issuperset(p.name for p in folder.iterdir()))
    ):
        raise InputError(f"{folder} is in the way: it was not written by moecover. Rename it or choose another output")


def _leave(folder: Path, path: Path) -> str:
    """Remove what is of no use to a later run; says what stays."""
    if (folder / REPLACED).exists() and not path.exists():
        (folder / REPLACED).rename(path)
    renamed = folder.exists() and not (folder / FILES).exists()
    if renamed or not _read_journal(folder)["finished"]:
        shutil.rmtree(folder, ignore_errors=True)
        return f"{path} is complete" if renamed else "Nothing was left behind"
    return f"What was finished is kept in {folder} and is used when the same command runs again"


@contextlib.contextmanager
def resumable_folder(
    path: Path, inputs: dict[str, Any], *, say: Callable[[str], None] = lambda line: None
) -> Iterator[Partial]:
    """A folder to fill, which takes the name ``path`` only when the block ends without an error.

    What stood at ``path`` before is replaced. When the block fails or is interrupted, what was finished stays for the next
    run with the same inputs, and the error says so; when nothing was, nothing stays. To be used within `files.locked`.

    Args:
        path: the folder.
        inputs: what the files are made from, as JSON values, by the name that a message gives it.
        say: called with a line when something that lies there cannot be used.

    Raises:
        InputError: something else lies where the folder is to be made.
        MoecoverError: what was raised in the block, and any OSError, with the words on what stays.
    """
    folder = partial_folder(path)
    _check_ours(folder)
    try:
        partial = _open(folder, inputs, say)
        yield partial
        put_in_place(partial.files, path, replaced=folder / REPLACED)
    except BaseException as error:
        left = _leave(folder, path)
        if isinstance(error, OSError):
            raise MoecoverError(f"{reason(f'writing {path}', error)}. {left}") from error
        if isinstance(error, MoecoverError):
            raise type(error)(f"{error}. {left}") from error
        error.add_note(left)
        raise
    shutil.rmtree(folder, ignore_errors=True)
