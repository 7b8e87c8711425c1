"""Upload as a job: reads a finished pruned model, gives the repository of the hub that holds it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from moecover.progress import Progress, resolve
from moecover.publishing.finished import finished
from moecover.publishing.hub import check_access, send
from moecover.text import Cell, Shown, size_text


@dataclass(frozen=True, repr=False)
class Uploaded(Shown):
    """A repository that holds a pruned model.

    Attributes:
        repository: ``owner/name``.
        url: its address.
        files: names of the files that were uploaded.
        num_bytes: of the weights and settings among them.
    """

    repository: str
    url: str
    files: tuple[str, ...]
    num_bytes: int

    def summary(self) -> str:
        """Address, number of files and their size."""
        return f"{self.url}: {len(self.files)} files, {size_text(self.num_bytes)}"

    def rows_shown(self) -> list[dict[str, Cell]]:
        """One row per file."""
        return [{"file": name} for name in self.files]


def upload(folder: str | Path, repository: str, *, private: bool = False, progress: bool | Progress = True) -> Uploaded:
    """Upload a pruned model to the hub, with the repository's id in the snippets of its card.

    The files appear there in one commit. After an interruption the same call goes on; unchanged files are not sent.
    The token is that of the hub's login. Paths of this machine are left out of the record (moecover.json).

    Args:
        folder: that `prune` or `shrink` finished; of a GGUF model the file, of a split one its first part.
        repository: ``owner/name``; created where it does not exist.
        private: create it so that nobody else sees it.
        progress: True draws the client's bars and says what is sent; False is silent.

    Raises:
        InputError: moecover did not finish it, a file of a folder changed since, no login, or no right to write.
        MoecoverError: the connection was lost, or the hub failed.
    """
    shown, path = resolve(progress), Path(folder)
    check_access(repository, private=private)
    with shown.spinner(f"checking {path}"):
        made = finished(path)
    contents = made.contents(repository)
    shown.say(f"uploading {path} to {repository}: {len(contents)} files, {size_text(made.num_bytes)}")
    again = shlex.join(["moecover", "upload", str(path), repository, *(["--private"] if private else [])])
    url = send(contents, repository, private=private, weights=made.weights, resume=again)
    return Uploaded(repository, url, tuple(contents), made.num_bytes)
