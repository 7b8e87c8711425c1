"""The layout of a GGUF model's experts, derived from its keys and from the names and shapes of its tensors.

llama.cpp gives every architecture the same names: the experts of a layer are stacked along the slowest axis of
``blk.N.ffn_*_exps``, and of the router's tensors. So no table of architectures is needed; whatever else could
depend on the experts is refused by name.
"""

from __future__ import annotations

import re

from moecover.checkpoints.gguf_width import gguf_width
from moecover.checkpoints.header import TensorEntry
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.topology import ExpertLayout, ExpertTensor, ExpertTensors, Topology
from moecover.errors import InputError

# Architectures of llama.cpp with routed experts whose tensors, as its own tables name them, a test cuts.
ARCHITECTURES = (
    "afmoe",
    "arctic",
    "bailingmoe",
    "bailingmoe2",
    "dbrx",
    "deci",
    "deepseek",
    "deepseek2",
    "deepseek2-ocr",
    "dots1",
    "ernie4_5-moe",
    "exaone-moe",
    "gemma4",
    "glm-dsa",
    "glm4moe",
    "gpt-oss",
    "granitehybrid",
    "granitemoe",
    "grok",
    "hunyuan-moe",
    "jamba",
    "kimi-linear",
    "lfm2moe",
    "llada-moe",
    "llama",
    "llama-embed",
    "llama4",
    "mimo2",
    "minicpm",
    "minimax-m2",
    "mistral3",
    "mistral4",
    "nemotron_h_moe",
    "nomic-bert-moe",
    "olmoe",
    "phimoe",
    "qwen2moe",
    "qwen35moe",
    "qwen3moe",
    "qwen3next",
    "qwen3vlmoe",
    "rnd1",
    "smallthinker",
    "step35",
)
BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
EXPERTS = re.compile(r"ffn_(?:gate|up|down|gate_up)_exps\.(?:weight|bias|scale|input_scale)")
ROUTER = re.compile(r"ffn_gate_inp\.(?:weight|bias)|exp_probs_b(?:\.bias|\.weight)?")
OTHER_AXES = re.compile(r"ffn_\w+_shexp\.|ffn_norm_exps\.|ffn_gate_inp\.scale|(?:attn|ssm|indexer|nextn|vis)\w*\.")
SUSPECT = re.compile(r".*(?:exp|moe|rout|eid)")
DENSE = re.compile(r"ffn_(?:gate|up|down)\.(?:weight|bias|scale|input_scale)")
ONE_EXPERT = re.compile(r"ffn_(?:gate|up|down)\.\d+\.")
INTEGERS = ("I8", "I16", "I32", "I64")


def gguf_layout(checkpoint: Checkpoint) -> ExpertLayout:
    """Derive the layout of the experts.

    Raises:
        InputError: no routed experts, keys that are missing or do not fit, or a tensor that depends on the experts in
            a way that is not known.
    """
    assert checkpoint.gguf is not None
    experts = _number(checkpoint, "expert_count", default=0)
    if experts < 2:
        kind = checkpoint.gguf.first.values.get("general.type", "model")
        raise InputError(
            f"{checkpoint.name}: {checkpoint.config['model_type']!r} has no routed experts "
            f"(general.type {kind}, expert_count {experts})"
        )
    nextn = _number(checkpoint, "nextn_predict_layers", default=0)
    num_layers = _number(checkpoint, "block_count") - nextn
    blocks = _blocks(checkpoint)
    with_experts = sorted(n for n, names in blocks.items() if any(EXPERTS.fullmatch(name) for name in names))
    layers = tuple(number for number in with_experts if number < num_layers)
    if not layers:
        raise InputError(
            f"{checkpoint.name} has no tensors of routed experts (blk.N.ffn_*_exps) in its {num_layers} blocks"
        )
    tensors, shapes = dict[str, ExpertTensor](), dict[str, tuple[str, tuple[int, ...]]]()
    for number in blocks:
        _check_others(checkpoint, blocks[number], experts)
    for number in with_experts:
        layer = layers.index(number) if number in layers else len(layers) - 1
        found = _of_block(checkpoint, blocks[number], experts, number, layer)
        for name in found:
            shape, kind = checkpoint.tensors[name].shape, name.split(".", 2)[2]
            before, expected = shapes.setdefault(kind, (name, shape))
            if shape != expected:
                raise InputError(
                    f"{checkpoint.name}: {name} has the shape {list(shape)}, {before} has {list(expected)}. If it is a "
                    "split file, a part is of another model"
                )
        tensors |= found
    topology = _topology(checkpoint, layers, experts, num_layers)
    width = gguf_width(checkpoint, tensors, set(with_experts) <= set(layers))
    return ExpertLayout(topology, ExpertTensors(tensors, {}, True), {}, (), width)


def notes_on(checkpoint: Checkpoint, layout: ExpertLayout) -> tuple[str, ...]:
    """What the user should know before using a pruned file."""
    topology, notes = layout.topology, list(checkpoint.notes)
    if topology.family not in ARCHITECTURES:
        notes.append(
            f"architecture {topology.family!r} is not among those whose layout is tested: its experts were found by "
            "the names of the tensors. Run the result in llama.cpp before relying on it"
        )
    numbers = {int(name.split(".")[1]) for name in layout.tensors.experts}
    if beyond := sorted(numbers - set(topology.decoder_layers)):
        notes.append(
            f"{', '.join(f'blk.{n}' for n in beyond)} predicts further tokens with experts of its own: it stays, and "
            "keeps the expert ids of the last MoE layer, because llama.cpp reads one number of experts"
        )
    return tuple(notes)


def _number(checkpoint: Checkpoint, key: str, *, default: int | None = None) -> int:
    """An integer among the keys of the architecture.

    Raises:
        InputError: it is missing, no integer, or negative.
    """
    assert checkpoint.gguf is not None
    full = f"{checkpoint.config['model_type']}.{key}"
    value = checkpoint.gguf.first.number(full)
    if value is None and default is None:
        raise InputError(f"{checkpoint.name} has no {full}. Convert it again")
    found = value if value is not None else default or 0
    if found < 0:
        raise InputError(f"{checkpoint.name}: {full} is {found}. Convert it again")
    return found


def _blocks(checkpoint: Checkpoint) -> dict[int, dict[str, TensorEntry]]:
    """The tensors of every numbered block, by their names within it."""
    blocks: dict[int, dict[str, TensorEntry]] = {}
    for name, entry in checkpoint.tensors.items():
        if found := BLOCK.fullmatch(name):
            blocks.setdefault(int(found[1]), {})[found[2]] = entry
    return blocks


def _of_block(
    checkpoint: Checkpoint, names: dict[str, TensorEntry], experts: int, number: int, layer: int
) -> dict[str, ExpertTensor]:
    """The expert-dependent tensors of a block with experts, by name.

    Raises:
        InputError: one is missing, or does not have the experts along its slowest axis.
    """
    needed = (("ffn_gate_inp.weight",), ("ffn_down_exps.weight",), ("ffn_up_exps.weight", "ffn_gate_up_exps.weight"))
    for choice in needed:
        if not any(name in names for name in choice):
            raise InputError(f"{checkpoint.name}: blk.{number} has experts but no {choice[0]}. A part may be missing")
    found = {}
    for name, entry in names.items():
        routed = EXPERTS.fullmatch(name) is not None
        if not routed and not ROUTER.fullmatch(name):
            continue
        if entry.shape[0] != experts:
            raise InputError(
                f"{checkpoint.name}: {entry.name} has the shape {list(entry.shape)}, its slowest axis should be that "
                f"of the {experts} experts. It may be a part of another model"
            )
        found[entry.name] = ExpertTensor(layer, None, 0, routed)
    return found


def _check_others(checkpoint: Checkpoint, names: dict[str, TensorEntry], experts: int) -> None:
    """Refuse a block with a tensor that may depend on the experts and is not known to have their axis.

    Raises:
        InputError: names the tensor.
    """
    for name, entry in names.items():
        if EXPERTS.fullmatch(name) or ROUTER.fullmatch(name) or OTHER_AXES.match(name):
            continue
        if ONE_EXPERT.match(name):
            why = (
                "an early format with one tensor an expert, which llama.cpp no longer reads: convert the original again"
            )
        elif "_chexps." in name:
            why = "chunk experts are shared by neighbouring experts, whose ids cannot be renumbered"
        elif SUSPECT.match(name) or (name.startswith("ffn_") and _has_axis(name, entry, experts)):
            why = "it may depend on the experts in a way that is not known. Prune the original, then convert it"
        elif len(entry.shape) > 2 and entry.shape[0] == experts:
            why = f"it has an axis of {experts}, as many as there are experts. Prune the original, then convert it"
        else:
            continue
        raise InputError(f"{checkpoint.name}: {entry.name} of shape {list(entry.shape)} is not supported: {why}")


def _has_axis(name: str, entry: TensorEntry, experts: int) -> bool:
    return not DENSE.fullmatch(name) and (experts in entry.shape or entry.dtype in INTEGERS)


def _topology(checkpoint: Checkpoint, layers: tuple[int, ...], experts: int, num_layers: int) -> Topology:
    top_k = _number(checkpoint, "expert_used_count")
    if not 1 <= top_k <= experts:
        raise InputError(f"{checkpoint.name}: expert_used_count is {top_k}. Allowed: 1 to {experts}, the expert_count")
    groups = _number(checkpoint, "expert_group_count", default=1)
    top = _number(checkpoint, "expert_group_used_count", default=1)
    if groups <= 1:
        groups = top = 1
    if experts % groups or not 1 <= top <= groups:
        raise InputError(
            f"{checkpoint.name}: {groups} groups of {experts} experts and {top} groups per token do not fit together"
        )
    hidden = _number(checkpoint, "embedding_length")
    return Topology(str(checkpoint.config["model_type"]), layers, experts, top_k, hidden, num_layers, groups, top)
