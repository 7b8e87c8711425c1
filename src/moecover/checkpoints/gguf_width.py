"""The channels of a GGUF model's experts: reads keys and shapes, gives their axes, or why all of them must stay."""

from __future__ import annotations

from collections.abc import Iterable

from moecover.checkpoints.names import kind_of
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.topology import ChannelAxis, Width
from moecover.gguf.types import BY_NAME

WAY_OUT = "prune the original that the file was made from, then convert and quantise"
WIDTH_KEY, DENSE_KEY, SHARED_KEY = (
    "expert_feed_forward_length",
    "feed_forward_length",
    "expert_shared_feed_forward_length",
)
# Channel axis by the name within a block, that of the experts counted.
AXES = {
    "ffn_gate_exps.weight": ChannelAxis(1),
    "ffn_up_exps.weight": ChannelAxis(1),
    "ffn_gate_up_exps.weight": ChannelAxis(1, parts=2),
    "ffn_down_exps.weight": ChannelAxis(2),
    "ffn_gate_exps.bias": ChannelAxis(1),
    "ffn_up_exps.bias": ChannelAxis(1),
    "ffn_gate_up_exps.bias": ChannelAxis(1, parts=2),
}
DOWN = "ffn_down_exps.weight"


def gguf_width(checkpoint: Checkpoint, experts: Iterable[str], all_are_layers: bool) -> Width | str:
    """The channels of the experts; or, in words, why their number cannot be changed.

    Args:
        checkpoint: the files.
        experts: names of the expert-dependent tensors.
        all_are_layers: whether no multi-token-prediction layer has experts.
    """
    assert checkpoint.gguf is not None
    names = [name for name in experts if _within(name) in AXES]
    downs = [checkpoint.tensors[name] for name in names if _within(name) == DOWN]
    channels, family = downs[0].shape[-1], str(checkpoint.config["model_type"])
    if not all_are_layers:
        return f"multi-token-prediction layers have experts of the same width: {WAY_OUT}"
    if any(checkpoint.tensors[n].shape[AXES[_within(n)].axis] != channels * AXES[_within(n)].parts for n in names):
        return f"gate, up and down projections differ in width: {WAY_OUT}"
    others = [_within(name) for name in checkpoint.tensors if name.startswith("blk.")]
    if any("_shexp." in name and "_inp_" not in name for name in others) and _number(checkpoint, SHARED_KEY) is None:
        return f"the shared expert is sized by the width of the routed ones: {WAY_OUT}"
    key = f"{family}.{WIDTH_KEY}"
    if _number(checkpoint, WIDTH_KEY) is None:
        if any(name.startswith(("ffn_up.", "ffn_down.", "ffn_gate.")) for name in others):
            return f"there is no {key}, and dense layers share the width: {WAY_OUT}"
        key = f"{family}.{DENSE_KEY}"
    if _number(checkpoint, key.removeprefix(f"{family}.")) != channels:
        return f"{key} is not the {channels} channels of the experts' tensors: {WAY_OUT}"
    group = max(BY_NAME[entry.dtype].block for entry in downs)  # each divides the larger ones
    axes = {kind_of(name): AXES[_within(name)] for name in names}
    axes |= {kind_of(entry.name): ChannelAxis(2, group=group) for entry in downs}
    return Width(channels, ((key,),), axes, {})


def _within(name: str) -> str:
    """The name of a tensor within its block."""
    return name.split(".", 2)[-1]


def _number(checkpoint: Checkpoint, key: str) -> int | None:
    """An integer among the keys of the architecture; None where it has none, or not one for all layers."""
    assert checkpoint.gguf is not None
    value = checkpoint.gguf.first.values.get(f"{checkpoint.config['model_type']}.{key}")
    return value if type(value) is int else None
