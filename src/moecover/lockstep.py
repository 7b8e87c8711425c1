"""Forward passes of several batches side by side, all of them stopped at the same module: for work layer by layer.

Every batch runs the model's own forward in a thread of its own; only one of them computes at a time. So masks, positions
and whatever else a family hands from layer to layer stay what they are in a plain pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class _Cancelled(BaseException):
    """Unwinds the pass of a batch that is not needed any further."""


def lockstep(
    model: torch.nn.Module, stops: Sequence[torch.nn.Module], inputs: Sequence[dict[str, torch.Tensor]]
) -> Iterator[list[torch.Tensor]]:
    """At every stop in turn, the first argument of that module's call, one a batch; the passes end at the last stop.

    What the caller changes in the model between two stops holds for all batches from there on.

    Args:
        model: a live model.
        stops: modules that every pass calls once, in this order.
        inputs: keyword arguments of the model, one dictionary a batch.
    """
    import torch

    local = threading.local()
    turns = [threading.Semaphore(0) for _ in inputs]
    done = threading.Semaphore(0)
    arrived: list[Any] = [None] * len(inputs)
    errors: list[BaseException] = []
    cancelled = False

    def stop(module: Any, args: tuple[Any, ...]) -> None:
        index = getattr(local, "index", None)
        if index is None:  # a call of the caller's own
            return
        arrived[index] = args[0]
        done.release()
        turns[index].acquire()
        if cancelled:
            raise _Cancelled

    def run(index: int) -> None:
        local.index = index
        turns[index].acquire()
        try:
            if not cancelled:
                with torch.inference_mode():
                    model(**inputs[index], use_cache=False)
        except _Cancelled:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            done.release()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(inputs))]
    hooks = [module.register_forward_pre_hook(stop) for module in stops]
    try:
        for thread in threads:
            thread.start()
        for _ in stops:
            for turn in turns:
                turn.release()
                done.acquire()
                if errors:
                    raise errors[0]
            yield list(arrived)
    finally:
        cancelled = True
        for turn in turns:
            turn.release()
        for thread in threads:
            thread.join()
        for hook in hooks:
            hook.remove()
