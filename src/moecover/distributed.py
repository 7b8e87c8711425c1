"""One profile by many processes: reads what torchrun tells each of them, shares out the batches, adds up their sums.

    torchrun --nnodes N --nproc-per-node M -m moecover profile ...

Every process takes every N x M-th batch, whole, so a batch gives the same numbers wherever it runs and only the order of
additions differs. Each has the model in memory or runs it layer by layer, as it fits; the first one writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from moecover.errors import InputError, MoecoverError

if TYPE_CHECKING:
    import torch

    from moecover.recording import Sums

TIMEOUT = timedelta(hours=12)  # between the first and the last process that is done; a dead one is noticed at once


@dataclass(frozen=True)
class World:
    """A process among its fellows.

    Attributes:
        rank: its number.
        size: how many there are.
        local_rank: its number on its machine.
        local_size: how many there are on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def mine(self, number: int) -> bool:
        """Whether a batch, counted over all corpora, is this process's."""
        return number % self.size == self.rank

    @property
    def gone(self) -> str:
        """What to say when a fellow is gone."""
        return f"rank {self.rank} of {self.size} ends because another process of the job is gone: its own lines say why. What was done is used when the same command runs again"  # fmt: skip


ALONE = World()


def world() -> World:
    """The process's place, from torchrun's environment; alone without it.

    Raises:
        InputError: the environment is not whole.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    try:
        return World(*(int(os.environ[name]) for name in names))
    except (KeyError, ValueError) as error:
        raise InputError(f"WORLD_SIZE is set but {error} is not a number in the environment. Start with torchrun") from error  # fmt: skip


@contextlib.contextmanager
def joined(here: World, device: str) -> Iterator[None]:
    """The process group of all of them, until the block ends; nothing for a process alone.

    Raises:
        MoecoverError: they do not find each other, or one of them is gone.
    """
    if here.size == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise MoecoverError(f"rank {here.rank} of {here.size} finds no fellows: {_first_line(error)}") from error
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


@contextlib.contextmanager
def _together(here: World) -> Iterator[None]:
    """Turn the failure of a collective operation into one line."""
    try:
        yield
    except RuntimeError as error:
        raise MoecoverError(f"{here.gone} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def check_same(here: World, inputs: Mapping[str, Any]) -> None:
    """Refuse processes that work on different things.

    Raises:
        InputError: names what differs.
        MoecoverError: a process is gone.
    """
    if here.size == 1:
        return
    import torch.distributed as dist

    everyone: list[Any] = [None] * here.size
    with _together(here):
        dist.all_gather_object(everyone, dict(inputs))
    for rank, other in enumerate(everyone):
        if differs := [name for name in inputs if other.get(name) != everyone[0].get(name)]:
            raise InputError(f"rank {rank} has another {differs[0]} than rank 0: all processes must read the same model and corpora")  # fmt: skip


def add_up(here: World, sums: Mapping[str, Sums], device: torch.device) -> None:
    """Have every process hold the sums of all of them.

    Raises:
        MoecoverError: a process is gone.
    """
    if here.size == 1:
        return
    import torch
    import torch.distributed as dist

    from moecover.profiles import MAXIMA

    for one in sums.values():
        state = one.state()
        for name, values in state.items():
            if name in ("scoring", "noted"):
                continue
            tensor = torch.from_numpy(values).to(device)
            operation = dist.ReduceOp.MAX if name.removeprefix("parts.") in MAXIMA else dist.ReduceOp.SUM
            with _together(here):
                dist.all_reduce(tensor, op=operation)
            state[name] = tensor.cpu().numpy()
        one.restore(state)


def wait_for_all(here: World) -> None:
    """Go on when all processes are here.

    Raises:
        MoecoverError: a process is gone.
    """
    if here.size > 1:
        import torch.distributed as dist

        with _together(here):
            dist.barrier()
