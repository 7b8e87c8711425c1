"""Memory that the control groups of this process leave: reads /proc/self/cgroup and the groups' own files.

Limits hold at every level: of a container, of a job in it, of a step of the job. So every group from the process's own
up to the root counts, of version 1 (the hierarchy of the memory controller) and of version 2. The cache of files that
are not in use is given back on demand and counts as free.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

UNLIMITED = 1 << 60  # bytes; version 1 writes a number of this size where there is no limit
OWN, MOUNTS = "proc/self/cgroup", "proc/self/mountinfo"


def free_in_cgroups(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take; None where no group limits it.

    Args:
        root: of the file system, where the kernel's files are found.
    """
    found = [free for group, version in _groups(root) if (free := _free(group, version)) is not None]
    return min(found, default=None)


def _groups(root: Path) -> Iterator[tuple[Path, int]]:
    """The folders of all groups that the process is in, with their version."""
    mounts = list(_mounts(root))
    for line in _lines(root / OWN):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            version = 2
        elif "memory" in controllers.split(","):
            version = 1
        else:
            continue
        for top, mounted in ((top, mounted) for top, mounted, kind in mounts if kind == version):
            yield from ((folder, version) for folder in _levels(top, mounted, path))


def _levels(top: Path, mounted: str, path: str) -> Iterator[Path]:
    """The folders of a group and of those above it, as far as they are visible.

    Args:
        top: folder where the hierarchy is mounted.
        mounted: the group that is seen there, ``/`` unless this is a container.
        path: of the process's own group.
    """
    own, seen = PurePosixPath(path), PurePosixPath(mounted)
    inside = own.relative_to(seen) if own.is_relative_to(seen) else own.relative_to("/") if own.is_absolute() else own
    for level in (inside, *inside.parents):
        if ".." not in level.parts and (folder := top / level).is_dir():
            yield folder


def _mounts(root: Path) -> Iterator[tuple[Path, str, int]]:
    """Where hierarchies are mounted, which group is seen there, and their version; the usual places if none is said."""
    found = []
    for line in _lines(root / MOUNTS):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        version = {"cgroup": 1 if "memory" in kind[2].split(",") else 0, "cgroup2": 2}.get(kind[0], 0)
        if version:
            found.append((root / fields[4].lstrip("/"), fields[3], version))
    usual = root / "sys/fs/cgroup"
    yield from found or [(usual, "/", 2), (usual / "unified", "/", 2), (usual / "memory", "/", 1)]


def _free(group: Path, version: int) -> int | None:
    """Bytes that one group leaves; None where it has no limit."""
    limits = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
    known = [limit for name in limits if (limit := _number(group / name)) is not None and limit < UNLIMITED]
    used = _number(group / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
    if not known or used is None:
        return None
    cache = "inactive_file" if version == 2 else "total_inactive_file"
    idle = next((int(line.split()[1]) for line in _lines(group / "memory.stat") if line.startswith(f"{cache} ")), 0)
    return max(0, min(known) - max(0, used - idle))


def _number(file: Path) -> int | None:
    """The number in a file; None where there is none (``max``) or no such file."""
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdecimal() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
