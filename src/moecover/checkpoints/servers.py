"""What servers ask of the number of kept experts: a table, from which `inspect` and `prune` warn.

Read in the servers' public sources in August 2026, not run here. A row that is not met costs speed or a way of running;
what would be wrong everywhere (fewer experts than top-k, unequal router groups) is refused before, by `resolve_keep`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moecover.checkpoints.topology import Topology


@dataclass(frozen=True)
class Limit:
    """One thing that a server asks.

    Attributes:
        server: its name.
        asks: what, in words.
        otherwise: what happens when it is not met.
        met: whether a count fits a topology.
    """

    server: str
    asks: str
    otherwise: str
    met: Callable[[Topology, int], bool]


def _power_of_two(topology: Topology, keep: int) -> bool:
    return keep & (keep - 1) == 0


LIMITS = (
    Limit("vllm", "a multiple of 4, at most 512", "FlashInfer's and TensorRT-LLM's routing kernels do not run, slower ones do", lambda t, k: k % 4 == 0 and k <= 512),
    Limit("vllm", "a multiple of 8", "expert parallelism over 8 GPUs is uneven, and its load balancer refuses", lambda t, k: k % 8 == 0),
    Limit("vllm", "a power of two, or a multiple of 64", "the fast top-k kernel does not run, a generic one does", lambda t, k: _power_of_two(t, k) or k % 64 == 0),
    Limit("sglang", "a multiple of 8", "expert parallelism over 8 GPUs fails (it asks for an even split)", lambda t, k: k % 8 == 0),
    Limit("sglang", "a power of two, at most 32 in a router group", "the fused gate does not run, a slower one does", lambda t, k: t.num_groups == 1 or (_power_of_two(t, k) and k // t.num_groups <= 32)),
    Limit("llama.cpp", "at most 512", "loading fails in releases before b10448 (1024 from there on)", lambda t, k: k <= 512),
    Limit("llama.cpp", "a power of two", "the fused top-k kernel for CUDA does not run, a slower one does (old builds fail)", lambda t, k: _power_of_two(t, k)),
)  # fmt: skip
SERVERS = tuple(dict.fromkeys(limit.server for limit in LIMITS))


def unmet(topology: Topology, keep: int, server: str | None = None) -> list[str]:
    """What a count of kept experts does not meet, a line each; of one server or of all."""
    return [
        f"{limit.server} asks for {limit.asks}: with {keep} experts {limit.otherwise}"
        for limit in LIMITS
        if server in (None, limit.server) and not limit.met(topology, keep)
    ]
