"""A folder, or some files, made in several runs: finished files are recorded, checked and used again.

Until the output OUT is complete, ``.OUT.partial`` lies beside it: ``files``, which is renamed to OUT at the end;
``journal.json``, which records what the files are made from and which of them are finished, with size and hash; and,
during the final renames, ``replaced``, the folder that was at OUT before. It may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypedDict, TypeGuard

from moecover.errors import InputError, MoecoverError
from moecover.files.atomic import PARTIAL, put_in_place, reason, sync
from moecover.files.hashing import HASH, file_hash
from moecover.files.reading import read_json

Inputs = dict[str, Any]  # JSON values by the name that a message gives them

FILES, JOURNAL, REPLACED = "files", "journal.json", "replaced"
NEW_JOURNAL = JOURNAL + ".new"


class Entry(TypedDict):
    """A finished file in the journal."""

    size: int
    xxh3_128: str  # `HASH`


def partial_folder(path: Path) -> Path:
    """The folder in which an output is made."""
    return path.with_name(f".{path.name}{PARTIAL}")


@dataclass
class Partial:
    """An output folder in the making.

    Attributes:
        folder: the hidden folder beside the output.
        inputs: what the files are made from.
        finished: size and hash of every finished file, by name.
    """

    folder: Path
    inputs: Inputs
    finished: dict[str, Entry]

    @property
    def files(self) -> Path:
        """The folder to fill."""
        return self.folder / FILES

    def finish(self, file: Path, digest: str) -> None:
        """Record that a file in `files` is complete and on disk."""
        self.finished[file.name] = {"size": file.stat().st_size, HASH: digest}
        new = self.folder / NEW_JOURNAL
        new.write_text(json.dumps({"schema": 1, "inputs": self.inputs, "finished": self.finished}, indent=1) + "\n")
        new.replace(self.folder / JOURNAL)

    def forget(self) -> None:
        """Record that no finished file can be used any more."""
        self.finished.clear()
        (self.folder / JOURNAL).unlink(missing_ok=True)


def _is_object(value: object) -> TypeGuard[dict[str, object]]:
    return isinstance(value, dict)


def _read_journal(folder: Path) -> tuple[dict[str, object], dict[str, object]]:
    """Inputs and finished files as recorded; both empty if nothing was recorded or the journal is damaged."""
    try:
        journal = read_json(folder / JOURNAL)
    except (FileNotFoundError, ValueError):
        return {}, {}
    if not _is_object(journal) or journal.get("schema") != 1:
        return {}, {}
    inputs, finished = journal.get("inputs"), journal.get("finished")
    return (inputs, finished) if _is_object(inputs) and _is_object(finished) else ({}, {})


def _intact(entry: object, file: Path) -> TypeGuard[Entry]:
    """Whether a file is as its entry in the journal says."""
    if not _is_object(entry):
        return False
    try:
        return bool(entry.get("size") == file.stat().st_size and entry.get(HASH) == file_hash(file))
    except OSError:  # missing, or the disk cannot read it
        return False


def _usable(folder: Path, inputs: Inputs, say: Callable[[str], None]) -> dict[str, Entry]:
    """The finished files that belong to these inputs and are as they were written."""
    before, recorded = _read_journal(folder)
    inputs = json.loads(json.dumps(inputs))
    if not recorded:
        return {}
    if differs := [name for name in {**inputs, **before} if inputs.get(name) != before.get(name)]:
        say(f"starting over: {folder} was made from other inputs, {differs[0]} differs")
        return {}
    good = {name: entry for name, entry in recorded.items() if _intact(entry, folder / FILES / name)}
    if bad := sorted(recorded.keys() - good.keys()):
        others = f" and {len(bad) - 1} other files have" if bad[1:] else " has"
        say(f"{folder / FILES / bad[0]}{others} changed since: written again")
    return good


def restore(path: Path) -> None:
    """Put back the folder that was at ``path`` if a kill came between the two renames of a replacement.

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


def _open(folder: Path, inputs: Inputs, say: Callable[[str], None]) -> Partial:
    """Create or clean the folder: nothing stays in it but the finished files of these inputs."""
    (folder / FILES).mkdir(parents=True, exist_ok=True)
    partial = Partial(folder, inputs, _usable(folder, inputs, say))
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
    """Remove what a later run cannot use; returns a sentence on what stays."""
    if (folder / REPLACED).exists() and not path.exists():
        (folder / REPLACED).rename(path)
    renamed = folder.exists() and not (folder / FILES).exists()
    if renamed or not _read_journal(folder)[1]:
        shutil.rmtree(folder, ignore_errors=True)
        return f"{path} is complete" if renamed else "Nothing was left behind"
    return f"Progress is saved in {folder}; rerun the same command to resume"


def _reraise(error: BaseException, folder: Path, path: Path) -> NoReturn:
    """Raise what ended a run, extended by what stays of it."""
    left = _leave(folder, path)
    if isinstance(error, OSError):
        raise MoecoverError(f"{reason(f'writing {path}', error)}. {left}") from error
    if isinstance(error, MoecoverError):
        raise error.extended(left) from error
    error.add_note(left)
    raise error


@contextlib.contextmanager
def resumable_folder(
    path: Path, inputs: Inputs, *, say: Callable[[str], None] = lambda line: None
) -> Iterator[Partial]:
    """Create a folder to fill, which takes the name ``path`` only when the block ends without an error.

    A folder that existed at ``path`` is replaced. If the block fails or is interrupted, finished files are kept for the
    next run with the same inputs, and the error says so; if there are none, nothing is kept. Use it while
    `locks.locked` holds.

    Args:
        path: the folder.
        inputs: what the files are made from, as JSON values, by the name that a message gives them.
        say: called with a line if something in the partial folder cannot be used.

    Raises:
        InputError: something else lies where the folder is to be made.
        MoecoverError: what was raised in the block, and any OSError, extended by what is kept.
    """
    folder = partial_folder(path)
    _check_ours(folder)
    try:
        partial = _open(folder, inputs, say)
        yield partial
        put_in_place(partial.files, path, replaced=folder / REPLACED)
    except BaseException as error:
        _reraise(error, folder, path)
    shutil.rmtree(folder, ignore_errors=True)


def returned(path: Path, names: Sequence[str]) -> None:
    """Take back the files that a killed run of `resumable_files` had renamed before it could rename all.

    Args:
        path: the output.
        names: of all its files.

    Raises:
        MoecoverError: one cannot be renamed.
    """
    files, (_, recorded) = partial_folder(path) / FILES, _read_journal(partial_folder(path))
    for name in names:
        file = path.with_name(name)
        if name in recorded and not (files / name).exists() and _intact(recorded[name], file):
            try:
                file.replace(files / name)
            except OSError as error:
                raise MoecoverError(reason(f"restoring {path}", error)) from error


@contextlib.contextmanager
def resumable_files(
    path: Path, names: Sequence[str], inputs: Inputs, *, say: Callable[[str], None] = lambda line: None
) -> Iterator[Partial]:
    """Create files that take their names beside each other only when the block ends without an error.

    What was at these names is replaced. What happens on an error is what `resumable_folder` does.

    Args:
        path: the output, one of the files: the one that is renamed last, so that the output is complete where it is.
        names: of all files, in the folder of ``path``.
        inputs: see `resumable_folder`.
        say: see `resumable_folder`.

    Raises:
        InputError: see `resumable_folder`.
        MoecoverError: see `resumable_folder`.
    """
    folder = partial_folder(path)
    _check_ours(folder)
    try:
        partial = _open(folder, inputs, say)
        yield partial
        for name in sorted(names, key=lambda name: name == path.name):
            sync(partial.files / name)
            (partial.files / name).replace(path.with_name(name))
        sync(path.parent)
    except BaseException as error:
        _reraise(error, folder, path)
    shutil.rmtree(folder, ignore_errors=True)
