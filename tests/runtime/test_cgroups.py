"""Limits of control groups: of every level of the process's own path, of both versions, the idle file cache free."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecover.runtime import devices
from moecover.runtime.cgroups import free_in_cgroups

GB = 10**9
NONE_V1 = 9223372036854771712


def group(folder: Path, **files: object) -> None:
    """The files of a group; two underscores in a name stand for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def own(root: Path, *lines: str, mounts: tuple[str, ...] = ()) -> None:
    """Which groups the process is in, and where they are mounted."""
    group(root / "proc/self", cgroup="\n".join(lines))
    if mounts:
        group(root / "proc/self", mountinfo="\n".join(mounts))


def test_no_groups(tmp_path: Path) -> None:
    assert free_in_cgroups(tmp_path) is None
    own(tmp_path, "0::/")
    group(tmp_path / "sys/fs/cgroup", memory__max="max", memory__current=5 * GB)
    assert free_in_cgroups(tmp_path) is None


def test_a_container_full_of_file_cache(tmp_path: Path) -> None:
    """32 GB of which 29 are cache of files that are not in use."""
    own(tmp_path, "0::/")
    stat = f"anon {GB}\nfile {29 * GB}\ninactive_file {29 * GB}"
    group(tmp_path / "sys/fs/cgroup", memory__max=32 * GB, memory__current=31 * GB, memory__stat=stat)
    assert free_in_cgroups(tmp_path) == 30 * GB


def test_every_level_of_the_path_counts(tmp_path: Path) -> None:
    own(tmp_path, "0::/system.slice/job/step")
    top = tmp_path / "sys/fs/cgroup/system.slice"
    group(top / "job/step", memory__max="max", memory__current=1 * GB)
    group(top / "job", memory__max=16 * GB, memory__high="max", memory__current=2 * GB)
    group(top, memory__max=100 * GB, memory__current=3 * GB)
    assert free_in_cgroups(tmp_path) == 14 * GB
    group(top, memory__high=10 * GB)
    assert free_in_cgroups(tmp_path) == 7 * GB
    group(top, memory__high=1 * GB)
    assert free_in_cgroups(tmp_path) == 0


def test_version_1(tmp_path: Path) -> None:
    """A job of 16 GB in a step without a limit of its own."""
    own(tmp_path, "12:cpu,cpuacct:/x", "9:memory:/slurm/uid_1/job_2/step_0", "0::/elsewhere")
    top = tmp_path / "sys/fs/cgroup/memory/slurm/uid_1"
    group(top / "job_2/step_0", memory__limit_in_bytes=NONE_V1, memory__usage_in_bytes=GB)
    stat = f"inactive_file 7\ntotal_inactive_file {2 * GB}"
    group(top / "job_2", memory__limit_in_bytes=16 * GB, memory__usage_in_bytes=5 * GB, memory__stat=stat)
    group(top, memory__limit_in_bytes=NONE_V1, memory__usage_in_bytes=5 * GB)
    assert free_in_cgroups(tmp_path) == 13 * GB


@pytest.mark.parametrize("mounted", [True, False])
def test_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path, mounted: bool) -> None:
    """The path in /proc is the host's, the hierarchy that is mounted begins at the container's group."""
    line = "30 25 0:26 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory"
    own(tmp_path, "9:memory:/docker/abc/inner", mounts=(line,) if mounted else ())
    top = tmp_path / "sys/fs/cgroup/memory"
    group(top, memory__limit_in_bytes=8 * GB, memory__usage_in_bytes=GB)
    assert free_in_cgroups(tmp_path) == 7 * GB
    if mounted:
        group(top / "inner", memory__limit_in_bytes=4 * GB, memory__usage_in_bytes=GB)
        assert free_in_cgroups(tmp_path) == 3 * GB


def test_mounted_elsewhere(tmp_path: Path) -> None:
    own(tmp_path, "0::/a", mounts=("30 25 0:26 / /mnt/groups rw shared:4 - cgroup2 cgroup2 rw",))
    group(tmp_path / "mnt/groups/a", memory__max=3 * GB, memory__current=GB)
    assert free_in_cgroups(tmp_path) == 2 * GB


def test_what_is_free_is_within_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = devices.available_memory("cpu")
    monkeypatch.setattr(devices, "free_in_cgroups", lambda: 1234)
    assert devices.available_memory("cpu") == 1234 < bare
    monkeypatch.setattr(devices, "free_in_cgroups", lambda: None)
    assert devices.available_memory("cpu") > 1234
