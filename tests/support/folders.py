"""What a folder holds."""

from __future__ import annotations

from pathlib import Path


def names_in(folder: Path) -> list[str]:
    """Sorted names of the files and folders in a folder, hidden ones included."""
    return sorted(p.name for p in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """Contents of all files below a folder, by relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
