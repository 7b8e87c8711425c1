"""What servers require of the number of kept experts and of their channels: tables; `inspect` and `prune` warn by them.

Taken from the servers' public sources in August 2026 (channels: November 2026), not run here. A requirement that is not
met costs speed, bytes or a mode of operation; what would fail everywhere (fewer experts than top-k, unequal router
groups) is refused earlier, by `planning.keep.resolve_keep`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moecover.checkpoints.server_needs import NEEDS
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


DEEPSEEK_V4_COUNTS = {*(2**power for power in range(8)), 192, 256, 320, 384, 448, 512, 576}
LLAMA_CPP = "llama.cpp"  # what runs GGUF files
PARALLEL = (16, 32, 64)  # GPUs beyond one machine of eight, where the source's number is a multiple of them


def _parallel(server: str, size: int, otherwise: str) -> Limit:
    """The requirement of expert parallelism over several machines; not said again where fewer GPUs fail already."""
    return Limit(
        server,
        f"a multiple of {size}",
        f"expert parallelism over {size} GPUs {otherwise}",
        lambda topology, keep: keep % size == 0 or topology.num_experts % size > 0 or keep % (size // 2) > 0,
    )


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
    *(_parallel("vllm", size, "is uneven, and its load balancer refuses") for size in PARALLEL),
    Limit(
        "vllm",
        "a power of two up to 128, or 192, 256, 320, 384, 448, 512 or 576",
        "the routing kernel of DeepSeek-V4 fails",
        lambda topology, keep: topology.family != "deepseek_v4" or keep in DEEPSEEK_V4_COUNTS,
    ),
    Limit(
        "sglang",
        "a multiple of 8",
        "expert parallelism over 8 GPUs fails (it asks for an even split)",
        lambda topology, keep: keep % 8 == 0,
    ),
    *(_parallel("sglang", size, "fails (it asks for an even split)") for size in PARALLEL),
    Limit(
        "sglang",
        "a power of two, at most 32 in a router group",
        "the fused gate does not run, a slower one does",
        lambda topology, keep: topology.num_groups == 1 or (_power_of_two(keep) and keep // topology.num_groups <= 32),
    ),
    Limit(
        LLAMA_CPP,
        "at most 512",
        "loading fails in releases before b10448 (1024 from there on)",
        lambda topology, keep: keep <= 512,
    ),
    Limit(
        LLAMA_CPP,
        "a power of two",
        "the fused top-k kernel for CUDA does not run, a slower one does (old builds fail)",
        lambda topology, keep: _power_of_two(keep),
    ),
)


@dataclass(frozen=True)
class WidthLimit:
    """One requirement of a server on the number of channels that experts keep.

    With tensor parallelism over n GPUs, which splits every expert, it holds for an n-th of the channels.

    Attributes:
        server: its name.
        multiple: of which number the channels should be a multiple.
        otherwise: what happens if they are not.
    """

    server: str
    multiple: int
    otherwise: str


WIDTH_LIMITS = (
    WidthLimit("vllm", 128, "the TensorRT-LLM kernels of Blackwell GPUs pad every expert with zeros to the next one"),
    WidthLimit("vllm", 64, "the Marlin kernels for 4 and 8 bits do not run, slower ones do"),
    WidthLimit(
        "sglang",
        128,
        "the TensorRT-LLM kernels of Blackwell GPUs pad every expert with zeros to the next one, and the fused kernel "
        "of AMD's aiter does not run",
    ),
    WidthLimit("sglang", 64, "the Marlin kernels for 4 and 8 bits do not run, slower ones do"),
    WidthLimit(LLAMA_CPP, 256, "K-quants give the down projections a larger type (Q5_0 for Q4_K, Q8_0 for Q6_K)"),
    WidthLimit(LLAMA_CPP, 32, "Q8_0 and Q4_0 leave the down projections in 16 bits"),
)
SERVERS = tuple(dict.fromkeys([*(limit.server for limit in LIMITS), *(need.server for need in NEEDS)]))


def unmet(topology: Topology, keep: int, server: str | None = None, *, width: int | None = None) -> list[str]:
    """The requirements that a number of kept experts, and of their channels, does not meet, one line each.

    Args:
        topology: shape of the routed part.
        keep: experts per layer that are kept.
        server: one of `SERVERS`; all by default.
        width: channels of each that are kept; None for all, of which nothing is asked.
    """
    found = [
        f"{limit.server} asks for {limit.asks}: with {keep} experts {limit.otherwise}"
        for limit in LIMITS
        if server in (None, limit.server) and not limit.met(topology, keep)
    ]
    return found if width is None else [*found, *unmet_width(width, server)]


def unmet_width(width: int, server: str | None = None) -> list[str]:
    """The requirements that a number of kept channels does not meet, one line each; see `unmet`."""
    return [
        f"{limit.server} asks for a multiple of {limit.multiple}: with {width} channels {limit.otherwise}"
        for limit in WIDTH_LIMITS
        if server in (None, limit.server) and width % limit.multiple
    ]
