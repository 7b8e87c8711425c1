"""Forward passes that give small results: run in memory or in parts layer by layer, shared out among the processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from moecover.runtime.distributed import shared_out
from moecover.runtime.finite import watched
from moecover.runtime.layerwise import run_in_parts
from moecover.runtime.running import Result, Running, Within

if TYPE_CHECKING:
    from moecover.runtime.streaming import Streamed


def run_shared(
    model: Running,
    calls: Sequence[Callable[[], Result]],
    tokens: Sequence[int],
    *,
    within: Sequence[Within],
    together: int = 1,
) -> list[Result]:
    """Results of forward passes, in order, in every process that has the model open.

    Args:
        model: the model.
        calls: each runs the model once.
        tokens: number of tokens of every call.
        within: for every call, the context of a decoder layer, see `Running.run`.
        together: so many consecutive calls are run by the same process, one after the other.

    Raises:
        MoecoverError: a process is lost.
    """

    def work(numbers: Sequence[int]) -> list[Result]:
        some = [calls[n] for n in numbers]
        around = [within[n] for n in numbers]
        if model.by_layer:
            sizes = [tokens[n] for n in numbers]
            return run_in_parts(cast("Streamed", model), some, sizes, within=around, together=together)
        return model.run(some, within=around)

    with watched(model):
        return shared_out(model.world, range(len(calls)), work, together=together)
