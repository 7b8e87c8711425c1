"""The place of a process among those of a job: reads the environment set by torchrun."""

from __future__ import annotations

import os
from dataclasses import dataclass

from moecover.errors import InputError, arg


@dataclass(frozen=True)
class World:
    """The place of a process in the job.

    Attributes:
        rank: rank of the process.
        size: number of processes.
        local_rank: rank on its machine.
        local_size: number of processes on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def mine(self, number: int) -> bool:
        """Whether a batch, counted over all corpora, belongs to this process."""
        return number % self.size == self.rank


ALONE = World()


def world() -> World:
    """The place of this process, from the environment set by torchrun; alone without it.

    Raises:
        InputError: the environment is incomplete.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    for name in names:
        if not os.environ.get(name, "").isdecimal():
            raise InputError(f"WORLD_SIZE is set but {name} is not a number in the environment. Start with torchrun")
    return World(*(int(os.environ[name]) for name in names))


def check_alone(here: World, what: str) -> None:
    """Refuse what one process does alone where several share the work.

    Args:
        here: this process among others.
        what: that is done, or that it is done with.

    Raises:
        InputError: there are several processes.
    """
    if here.size > 1:
        raise InputError(f"{what} does not go together with several processes, torchrun started {here.size}: start one")


def own_device(here: World, device: str) -> str:
    """The device of this process, by name: each process of a machine has its own GPU.

    Raises:
        InputError: there are fewer GPUs than processes, or all of them are given the same GPU.
    """
    from moecover.runtime.devices import check_device, has_own_memory, kind_of

    device = check_device("auto", device)
    if here.size == 1 or not has_own_memory(device):
        return device
    kind = kind_of(device)
    if device != kind and here.local_size > 1:
        raise InputError(
            f"{arg('device', device)} would be the device of {here.local_size} processes: give {arg('device', kind)},"
            " each takes its own"
        )
    return check_device("auto", f"{kind}:{here.local_rank}") if device == kind else device
