"""What servers require of the number of experts and of their channels."""

from __future__ import annotations

import pytest

from moecover.checkpoints.servers import unmet
from moecover.checkpoints.topology import Topology


def topology(family: str = "qwen3_moe", experts: int = 256) -> Topology:
    return Topology(family, (0, 1), experts, 8, 64, 2)


@pytest.mark.parametrize("keep", [8, 16, 64, 128, 192, 256, 320, 384, 448, 512, 576])
def test_counts_of_the_routing_kernel_of_deepseek_v4(keep: int) -> None:
    assert not [line for line in unmet(topology("deepseek_v4", 1024), keep, "vllm") if "DeepSeek-V4" in line]


@pytest.mark.parametrize("keep", [96, 144, 160, 224, 640, 1024])
def test_other_counts_fail_there(keep: int) -> None:
    (line,) = (line for line in unmet(topology("deepseek_v4", 1024), keep, "vllm") if "DeepSeek-V4" in line)
    assert line == (
        "vllm asks for a power of two up to 128, or 192, 256, 320, 384, 448, 512 or 576: "
        f"with {keep} experts the routing kernel of DeepSeek-V4 fails"
    )
    assert not [line for line in unmet(topology("qwen3_moe", 1024), keep, "vllm") if "DeepSeek-V4" in line]


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize(
    "experts, keep, sizes",
    [
        (256, 128, []),
        (256, 192, []),
        (256, 144, [32]),  # sixteen GPUs take 144, thirty-two do not; sixty-four need not be said
        (256, 160, [64]),
        (256, 136, [16]),
        (256, 132, [8]),
        (60, 40, []),  # sixty experts never ran on sixteen GPUs
        (60, 30, [8]),
    ],
)
def test_expert_parallelism_over_the_sizes_that_the_model_allowed(
    server: str, experts: int, keep: int, sizes: list[int]
) -> None:
    lines = [line for line in unmet(topology(experts=experts), keep, server) if "expert parallelism" in line]
    assert [int(line.partition("over ")[2].split()[0]) for line in lines] == sizes


@pytest.mark.parametrize(
    "server, width, multiples",
    [
        ("vllm", 1408, []),
        ("vllm", 704, [128]),
        ("vllm", 88, [128, 64]),
        ("llama.cpp", 704, [256]),
        ("llama.cpp", 88, [256, 32]),
    ],
)
def test_widths_that_kernels_and_quantisers_take(server: str, width: int, multiples: list[int]) -> None:
    whole, lines = unmet(topology(), 128, server), unmet(topology(), 128, server, width=width)
    assert lines[: len(whole)] == whole
    assert [line.split(": ")[0] for line in lines[len(whole) :]] == [
        f"{server} asks for a multiple of {multiple}" for multiple in multiples
    ]
