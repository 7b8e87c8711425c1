"""The processes that fill one run folder side by side: each holds a lock file in ``RUN/.claims`` while it is there.

The kernel drops the lock of a process that dies, so a dead process is no member.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from moecover.errors import InputError
from moecover.files.atomic import explained
from moecover.files.locks import claim, is_claimed

CLAIMS = ".claims"  # a folder of lock files within the run folder


class Members:
    """The membership of this process. `join` and `leave` while the run folder is locked.

    Args:
        run: the run folder.

    Attributes:
        folder: of lock files.
        marker: a file of this process there, by which another machine knows that it sees the folder; made by `join`.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / CLAIMS
        self.marker = self.folder / f"seen-{uuid.uuid4().hex}"
        self._run, self._mine = run, Path()
        self._give_back: Callable[[], None] | None = None

    def join(self, digest: str) -> None:
        """Become a member.

        Args:
            digest: of the cells and their fingerprints, which has to be the same for all members.

        Raises:
            InputError: members fill the folder with other cells.
            MoecoverError: the folder cannot be written.
        """
        with explained(f"writing {self.folder}"):
            if any(file.read_text() != digest for file in self._others()):
                raise InputError(
                    f"{self._run} is being filled by another process with another grid, or with other weights, texts, "
                    "versions or devices. Wait until it ends, or choose another output"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            number = 0
            while (give_back := claim(self._file(number))) is None:
                number += 1
            self._mine, self._give_back = self._file(number), give_back
            self._mine.write_text(digest)
            self.marker.touch()

    def others(self) -> int:
        """How many other processes fill the folder at the moment."""
        return len(self._others())

    def leave(self) -> bool:
        """Be a member no longer; the last one removes the lock files.

        Returns:
            Whether it was the last one.
        """
        self.close()
        if self._others():
            return False
        shutil.rmtree(self.folder, ignore_errors=True)
        return True

    def close(self) -> None:
        """Give the membership back, if there is one."""
        if self._give_back is not None:
            self.marker.unlink(missing_ok=True)
            self._give_back()
            self._give_back = None

    def _file(self, number: int) -> Path:
        return self.folder / f"member-{number}"

    def _others(self) -> list[Path]:
        return [file for file in sorted(self.folder.glob("member-*")) if file != self._mine and is_claimed(file)]
