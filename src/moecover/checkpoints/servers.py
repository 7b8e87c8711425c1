"""What inference servers require of the number of kept experts: a table, from which `inspect` and `prune` warn.

Taken from the servers' public sources in August 2026, not run here. A requirement that is not met costs speed or a mode
of operation; what would fail everywhere (fewer experts than top-k, unequal router groups) is refused earlier, by
`planning.keep.resolve_keep`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moecover.checkpoints.topology import Topology


@dataclass(frozen=True)
class Limit:
    """One requirement of a server.

    Attributes:
        server: its name.
        asks: the requirement, in words.
        otherwise: what happens if it is not met.
        met: whether a number of experts meets it, for a topology.
    """

    server: str
    asks: str
    otherwise: str
    met: Callable[[Topology, int], bool]


def _power_of_two(keep: int) -> bool:
    return keep & (keep - 1) == 0


LIMITS = (
    Limit(
        "vllm",
        "a multiple of 4, at most 512",
        "FlashInfer's and TensorRT-LLM's routing kernels do not run, slower ones do",
        lambda topology, keep: keep % 4 == 0 and keep <= 512,
    ),
    Limit(
        "vllm",
        "a multiple of 8",
        "expert parallelism over 8 GPUs is uneven, and its load balancer refuses",
        lambda topology, keep: keep % 8 == 0,
    ),
    Limit(
        "vllm",
        "a power of two, or a multiple of 64",
        "the fast top-k kernel does not run, a generic one does",
        lambda topology, keep: _power_of_two(keep) or keep % 64 == 0,
    ),
    Limit(
        "sglang",
        "a multiple of 8",
        "expert parallelism over 8 GPUs fails (it asks for an even split)",
        lambda topology, keep: keep % 8 == 0,
    ),
    Limit(
        "sglang",
        "a power of two, at most 32 in a router group",
        "the fused gate does not run, a slower one does",
        lambda topology, keep: topology.num_groups == 1 or (_power_of_two(keep) and keep // topology.num_groups <= 32),
    ),
    Limit(
        "llama.cpp",
        "at most 512",
        "loading fails in releases before b10448 (1024 from there on)",
        lambda topology, keep: keep <= 512,
    ),
    Limit(
        "llama.cpp",
        "a power of two",
        "the fused top-k kernel for CUDA does not run, a slower one does (old builds fail)",
        lambda topology, keep: _power_of_two(keep),
    ),
)
SERVERS = tuple(dict.fromkeys(limit.server for limit in LIMITS))


def unmet(topology: Topology, keep: int, server: str | None = None) -> list[str]:
    """The requirements that a number of kept experts does not meet, one line each.

    Args:
        topology: shape of the routed part.
        keep: experts per layer that are kept.
        server: one of `SERVERS`; all by default.
    """
    return [
        f"{limit.server} asks for {limit.asks}: with {keep} experts {limit.otherwise}"
        for limit in LIMITS
        if server in (None, limit.server) and not limit.met(topology, keep)
    ]
