"""Tensor names: their layer, expert and kind, and the parameters that they are loaded into.

Reads names on disk and the library's own conversion mapping, which takes them to the parameters of the model class.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.source import Checkpoint
from moecover.errors import InputError

if TYPE_CHECKING:
    import torch

OTHER_PARTS = re.compile(r"(?:^|\.)\w*(?:vision|visual|audio)\w*\.")  # parts of a multimodal model
MTP = re.compile(r"(?:.*?\.)?(?:mtp|nextn)\w*(?=\.)")
MTP_NUMBER = re.compile(r"\.(?:layers\.)?(\d+)(?=\.)")
NUMBERED = re.compile(r"(?:.*?\.)?layers\.(\d+)(?=\.)")
NUMBER = re.compile(r"\.(\d+)\.")
EXPERT = re.compile(r"\.experts\.(\d+)\.")


def layer_number(name: str) -> int:
    """The decoder layer of a dotted name: the first number among its parts.

    Raises:
        InputError: it has none.
    """
    match = NUMBER.search(name)
    if match is None:
        raise InputError(f"{name} has experts but belongs to no numbered layer: not supported")
    return int(match[1])


def expert_number(name: str) -> int | None:
    """The expert in a tensor's name; None if it names none."""
    match = EXPERT.search(name)
    return int(match[1]) if match else None


def any_expert(name: str) -> str:
    """A tensor's name with a placeholder for its expert."""
    return EXPERT.sub(".experts.*.", name)


def kind_of(name: str) -> str:
    """A tensor's name with placeholders for its layer and its expert: the same for all layers and experts."""
    return any_expert(NUMBER.sub(".#.", name, count=1))


def suffix_of(kind: str) -> str:
    """The part of a kind of name (`kind_of`) behind its layer."""
    return kind.partition(".#.")[2]


def twin_of(name: str, suffixes: Container[str]) -> str | None:
    """The suffix of a kind of name with which another layer's name ends, whatever that layer is called; None if none.

    Args:
        name: of a tensor of a multi-token-prediction layer.
        suffixes: from `suffix_of`, of tensors of decoder layers.
    """
    parts = any_expert(name).split(".")
    return next((s for i in range(len(parts)) if (s := ".".join(parts[i:])) in suffixes), None)


def mtp_root(name: str, num_layers: int) -> str | None:
    """The name of the multi-token-prediction layer that a tensor belongs to by its name; None if to none.

    Args:
        name: the tensor.
        num_layers: number of decoder layers; numbered layers beyond these are for multi-token prediction.
    """
    beyond = NUMBERED.match(name)
    match = MTP.match(name) or (beyond if beyond and int(beyond[1]) >= num_layers else None)
    return match[0] if match else None


def mtp_number(name: str, num_layers: int) -> int:
    """Which of the multi-token-prediction layers a tensor belongs to by its name, from 0 on.

    Args:
        name: of a tensor that `mtp_root` gives a name for.
        num_layers: number of decoder layers.
    """
    root = MTP.match(name)
    if root and (inside := MTP_NUMBER.match(name, root.end())):
        return int(inside[1])
    beyond = NUMBERED.match(name)
    return max(0, int(beyond[1]) - num_layers) if beyond else 0


@dataclass(frozen=True)
class Destination:
    """What a tensor on disk is loaded into.

    Attributes:
        parameter: name of the parameter or buffer that it fills, the first if it fills several; a name in the same
            style if there is no such parameter.
        converter: the library's conversion; None if the tensor is only renamed.
        pattern: which of the converter's source patterns matches it.
    """

    parameter: str
    converter: Any
    pattern: str | None

    @property
    def fills_several(self) -> bool:
        """Whether it is split into several parameters."""
        return self.converter is not None and len(self.converter.target_patterns) > 1


@dataclass(frozen=True)
class Names:
    """The destinations of a checkpoint's tensors.

    Attributes:
        destinations: by name on disk.
        transforms: the library's conversion mapping.
    """

    destinations: dict[str, Destination]
    transforms: list[Any]


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key for dotted names in which numbers sort by value: the order in which experts are stacked."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def read_names(checkpoint: Checkpoint, model: torch.nn.Module) -> Names:
    """The destinations of a checkpoint's tensors in a model.

    Args:
        checkpoint: the files.
        model: a model of the checkpoint's class, on any device.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms: list[Any] = get_model_conversion_mapping(model)
    renamings = [m for m in transforms if isinstance(m, WeightRenaming)]
    converters = [m for m in transforms if isinstance(m, WeightConverter)]
    by_pattern = {pattern: m for m in converters for pattern in m.source_patterns}
    parameters, prefix = model.state_dict(), str(model.base_model_prefix)
    destinations = {}
    for key in sorted(checkpoint.tensors, key=natural):  # some renamings depend on the previous names
        name, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
        if name not in parameters and key in parameters:
            name, pattern = key, None
        destinations[key] = Destination(name, by_pattern[pattern] if pattern is not None else None, pattern)
    return Names(destinations, transforms)
