"""One job by many processes: reads the environment set by torchrun, shares out the work, brings together the results.

    torchrun --nnodes N --nproc-per-node M -m moecover profile|evaluate|plan|generate ...

Each process takes every (N x M)-th batch (or layer) as a whole, so a batch gives the same numbers wherever it runs, and
of sums only the order of additions differs. Each holds the model in memory or runs it layer by layer, as it fits; rank
0 writes.

Processes wait for each other by polling torchrun's key-value store and only then start an operation of gloo or nccl:
those wait in C++, where no signal gets through. Meanwhile a thread sends heartbeats and looks for failures, so that all
processes learn of one during the pass, on other machines too. The first to fail says why.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from moecover.errors import InputError, MoecoverError
from moecover.runtime.world import World

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch.distributed import Store  # type: ignore[attr-defined]

T = TypeVar("T")
R = TypeVar("R")
TIMEOUT = timedelta(minutes=10)  # of one operation, which starts when all have arrived; and to reach the store
PULSE = 5.0  # seconds between two heartbeats
SILENCE = 300.0  # seconds without a heartbeat after which a process counts as lost
GRACE = 30.0  # seconds for the thread to end: the C++ runtime aborts a process that exits while it waits for the store
GONE = "another process of the job has failed: its own message or torchrun's report says which"
STOPPED = "stopped with the job: another process of it has failed, or torchrun was terminated"
_groups = itertools.count()  # process groups that were made, one for each job of this process
_lost: list[str] = []  # why the job cannot be finished, as the thread has found


@functools.cache
def store() -> Store:
    """The key-value store of torchrun, which all processes share."""
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    whole, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    return PrefixStore(f"moecover/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", whole)


def first_to_fail(here: World) -> bool:
    """Whether this process is the first to report why the job fails: one line is enough for all of them."""
    reachable = store.cache_info().currsize or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    half_imported = "torch._C" in sys.modules and "torch" not in sys.modules
    if here.size == 1 or not reachable or half_imported:
        return True
    try:
        return bool(store().add("failed", 1) == 1)
    except Exception:  # the store is gone, or torch is half imported: two lines are better than none
        return True


def _watch(here: World, over: threading.Event) -> None:
    """Send heartbeats and look for failures until it is ``over``; rank 0 watches the heartbeats of the others."""
    shared, seen = store(), dict[int, tuple[int, float]]()  # by rank: heartbeats, and when the last one was noticed
    while not over.is_set():
        try:
            shared.add(f"alive/{here.rank}", 1)
            if shared.check(["failed"]):
                _lost.append(GONE)
            for rank in range(1, here.size) if here.rank == 0 else ():
                beats, now = shared.add(f"alive/{rank}", 0), time.monotonic()
                if rank not in seen or seen[rank][0] != beats:
                    seen[rank] = beats, now
                elif now - seen[rank][1] > SILENCE:
                    _lost.append(f"rank {rank} has sent no heartbeat for {SILENCE:g} s")
        except RuntimeError:  # the store is gone, with the machine that held it
            _lost.append(GONE)
        if _lost:
            return
        over.wait(PULSE)


def _check_lost() -> None:
    if _lost:
        raise MoecoverError(_lost[0])


def checking(here: World, advance: Callable[[int], None]) -> Callable[[int], None]:
    """A function that reports progress, and raises MoecoverError when another process is lost."""
    if here.size == 1:
        return advance

    def checked(amount: int) -> None:
        _check_lost()
        advance(amount)

    return checked


@contextlib.contextmanager
def joined(here: World, device: str) -> Iterator[None]:
    """Join the process group of the job until the block ends; does nothing for a process alone, or in another block.

    Raises:
        MoecoverError: the processes do not find each other, or one of them is lost.
    """
    if here.size == 1:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    if dist.is_initialized():
        yield
        return

    from moecover.runtime.devices import has_own_memory, kind_of

    gpu = has_own_memory(device)
    if gpu:
        getattr(torch, kind_of(device)).set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it, other launchers may not
        torch.set_num_threads(max(1, torch.get_num_threads() // here.local_size))
    _lost.clear()
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(here, over), daemon=True)
    try:
        with _together():
            shared = store()
        watch.start()
        wait_for_all(here)
        with _together():
            kind = kind_of(device)
            own = f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}" if gpu else "gloo"
            backend, group = own, PrefixStore(f"group/{next(_groups)}", shared)
            dist.init_process_group(backend, store=group, rank=here.rank, world_size=here.size, timeout=TIMEOUT)
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
    """Turn the failure of a collective operation into one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        text = str(error).strip().split("\n")[0]
        closed = any(sign in text for sign in ("closed by peer", "reset by peer", "Broken pipe"))
        raise MoecoverError(GONE if closed else f"the processes cannot work together: {text}") from error


def wait_for_all(here: World) -> None:
    """Wait until all processes have arrived here.

    Raises:
        MoecoverError: a process is lost.
    """
    if here.size == 1:
        return
    with _together():
        everyone = -(-store().add("arrived", 1) // here.size) * here.size  # nobody reaches the next barrier before
        while store().add("arrived", 0) < everyone:
            _check_lost()
            time.sleep(0.02)


def check_same(here: World, inputs: Mapping[str, object]) -> None:
    """Refuse processes that work on different inputs.

    Args:
        here: this process.
        inputs: JSON values by name.

    Raises:
        InputError: an input differs; says which.
        MoecoverError: a process is lost.
    """
    if here.size == 1:
        return
    import torch.distributed as dist

    wait_for_all(here)
    everyone: list[dict[str, object]] = [{}] * here.size
    with _together():
        dist.all_gather_object(everyone, dict(inputs))
    for rank, other in enumerate(everyone):
        if differs := [name for name in inputs if other.get(name) != everyone[0].get(name)]:
            raise InputError(f"rank {rank} and rank 0 differ in {differs[0]}: all processes must do the same")


def add_up(
    here: World, arrays: Mapping[str, NDArray[Any]], device: torch.device, *, maxima: Collection[str] = ()
) -> dict[str, NDArray[Any]]:
    """Reduce arrays over all processes; every process gets the result.

    Args:
        here: this process.
        arrays: arrays by name, of the same names, shapes and dtypes in every process.
        device: where they are reduced.
        maxima: names of the arrays of which the elementwise maximum is taken instead of the sum.

    Raises:
        MoecoverError: a process is lost.
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


def shared_out(
    here: World, items: Sequence[T], work: Callable[[list[T]], Sequence[R]], *, together: int = 1
) -> list[R]:
    """Results of items that the processes share out, all of them, in order, in every process.

    Args:
        here: this process.
        items: the same in every process.
        work: gives the results of some items, one each, picklable.
        together: so many consecutive items are never in different processes.

    Raises:
        MoecoverError: a process is lost.
    """
    if here.size == 1:
        return list(work(list(items)))
    import torch.distributed as dist

    found = work([item for number, item in enumerate(items) if here.mine(number // together)])
    wait_for_all(here)
    everyone: list[list[R]] = [[]] * here.size
    with _together():
        dist.all_gather_object(everyone, list(found))
    left = [iter(results) for results in everyone]
    return [next(left[number // together % here.size]) for number in range(len(items))]


def total(here: World, values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, the same bits in each of them.

    It does not wait where signals get through: to be called often, by processes that are within minutes of each other.

    Raises:
        MoecoverError: a process is lost.
    """
    if here.size == 1:
        return values
    import torch.distributed as dist

    _check_lost()
    found = values.contiguous().clone()
    with _together():
        dist.all_reduce(found)
    return found


def of_first(here: World, value: T) -> T:
    """What the first process has, in every process; it must be picklable.

    Raises:
        MoecoverError: a process is lost.
    """
    if here.size == 1:
        return value
    import torch
    import torch.distributed as dist

    wait_for_all(here)
    found: list[T] = [value]
    with _together():
        dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    return found[0]
