"""One profile by many processes: reads what torchrun tells each of them, shares out the batches, adds up their sums.

    torchrun --nnodes N --nproc-per-node M -m moecover profile ...

Every process takes every N x M-th batch, whole, so a batch gives the same numbers wherever it runs and only the order of
additions differs. Each has the model in memory or runs it layer by layer, as it fits; the first one writes.

Processes wait for each other in torchrun's key-value store, looking at it again and again, and only then start an operation
of gloo or nccl: those wait in C++, where no signal gets through. A thread gives signs of life meanwhile and looks for
failures, so that the others learn of one during the pass, on other machines too. The first to fail says why.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from moecover.errors import InputError, MoecoverError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

TIMEOUT = timedelta(minutes=10)  # of one operation, which starts when all are there; and to reach the store
PULSE = 5.0  # seconds between two signs of life
SILENCE = 300.0  # seconds without one, after which a process counts as gone
GRACE = 30.0  # seconds for the thread to end: a process that exits while it waits for the store is aborted by the C++ runtime
GONE = "another process of the job is gone: its own line or torchrun's report says which"
STOPPED = "stopped with the job: another process of it is gone, or torchrun was ended"
_lost: list[str] = []  # why the job cannot be finished, as far as the thread has seen


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


ALONE = World()


def world() -> World:
    """The process's place, from torchrun's environment; alone without it.

    Raises:
        InputError: the environment is not whole.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    for name in names:
        if not os.environ.get(name, "").isdecimal():
            raise InputError(f"WORLD_SIZE is set but {name} is not a number in the environment. Start with torchrun")
    return World(*(int(os.environ[name]) for name in names))


def own_device(here: World, device: str) -> str:
    """The device of a process, by name: of several on a machine each has a GPU of its own.

    Raises:
        InputError: there are fewer GPUs than processes, or one GPU is asked for by all.
    """
    from moecover.runtime.loading import check_device

    device = check_device("auto", device)
    if here.size == 1 or not device.startswith("cuda"):
        return device
    if device != "cuda" and here.local_size > 1:
        raise InputError(f"--device {device} would be the device of {here.local_size} processes: give --device cuda, each takes its own")  # fmt: skip
    return check_device("auto", f"cuda:{here.local_rank}") if device == "cuda" else device


@functools.cache
def _store() -> Any:
    """What all processes can read and write: torchrun's key-value store."""
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    return PrefixStore(f"moecover/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def first_to_fail(here: World) -> bool:
    """Whether no other process has said yet why the job fails: one line is enough; the others learn of it here."""
    reachable = _store.cache_info().currsize or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    half_imported = "torch._C" in sys.modules and "torch" not in sys.modules
    if here.size == 1 or not reachable or half_imported:
        return True
    try:
        return bool(_store().add("failed", 1) == 1)
    except Exception:  # the store is gone, or torch is not whole: better two lines than none
        return True


def _watch(here: World, over: threading.Event) -> None:
    """Give signs of life and look for failures until it is ``over``; the first process looks for the others' signs."""
    store, seen = _store(), dict[int, tuple[int, float]]()
    while not over.is_set():
        try:
            store.add(f"alive/{here.rank}", 1)
            if store.check(["failed"]):
                _lost.append(GONE)
            for rank in range(1, here.size) if here.rank == 0 else ():
                signs, now = store.add(f"alive/{rank}", 0), time.monotonic()
                if rank not in seen or seen[rank][0] != signs:
                    seen[rank] = signs, now
                elif now - seen[rank][1] > SILENCE:
                    _lost.append(f"rank {rank} has given no sign of life for {SILENCE:g} s")
        except RuntimeError:  # the store is gone, and the machine that held it
            _lost.append(GONE)
        if _lost:
            return
        over.wait(PULSE)


def _heed() -> None:
    if _lost:
        raise MoecoverError(_lost[0])


def heeding(here: World, advance: Callable[[int], None]) -> Callable[[int], None]:
    """A function to report progress with, which raises MoecoverError when another process is gone."""
    if here.size == 1:
        return advance

    def heeded(amount: int) -> None:
        _heed()
        advance(amount)

    return heeded


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
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it, other launchers may not
        torch.set_num_threads(max(1, torch.get_num_threads() // here.local_size))
    _lost.clear()
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(here, over), daemon=True)
    try:
        with _together():
            store = _store()
        watch.start()
        wait_for_all(here)
        with _together():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpu else "gloo", store=PrefixStore("group", store),
                rank=here.rank, world_size=here.size, timeout=TIMEOUT,
            )  # fmt: skip
        yield
    finally:
        over.set()
        if watch.ident is not None:
            watch.join(GRACE)
        with contextlib.suppress(RuntimeError):
            if dist.is_initialized():
                dist.destroy_process_group()


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Turn the failure of an operation of all processes into one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        text = str(error).strip().split("\n")[0]
        closed = any(sign in text for sign in ("closed by peer", "reset by peer", "Broken pipe"))
        raise MoecoverError(GONE if closed else f"the processes cannot work together: {text}") from error


def wait_for_all(here: World) -> None:
    """Go on when all processes are here.

    Raises:
        MoecoverError: a process is gone.
    """
    if here.size == 1:
        return
    with _together():
        everyone = -(-_store().add("arrived", 1) // here.size) * here.size  # nobody is at the next meeting before this
        while _store().add("arrived", 0) < everyone:
            _heed()
            time.sleep(0.02)


def check_same(here: World, inputs: Mapping[str, Any]) -> None:
    """Refuse processes that work on different things.

    Raises:
        InputError: names what differs.
        MoecoverError: a process is gone.
    """
    if here.size == 1:
        return
    import torch.distributed as dist

    wait_for_all(here)
    everyone: list[Any] = [None] * here.size
    with _together():
        dist.all_gather_object(everyone, dict(inputs))
    for rank, other in enumerate(everyone):
        if differs := [name for name in inputs if other.get(name) != everyone[0].get(name)]:
            raise InputError(f"rank {rank} and rank 0 differ in {differs[0]}: all processes must do the same")


def add_up(
    here: World, arrays: Mapping[str, NDArray[Any]], device: torch.device, *, maxima: Collection[str] = ()
) -> dict[str, NDArray[Any]]:
    """Arrays of every process added up, of those named in ``maxima`` the largest; the same on all of them.

    Raises:
        MoecoverError: a process is gone.
    """
    if here.size == 1:
        return dict(arrays)
    import torch
    import torch.distributed as dist

    wait_for_all(here)
    found = {}
    for name, values in arrays.items():
        tensor = torch.from_numpy(values).to(device)
        with _together():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX if name in maxima else dist.ReduceOp.SUM)
        found[name] = tensor.cpu().numpy()
    return found
