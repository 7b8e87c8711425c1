"""How names on disk lead to parameters: reads the library's own conversion mapping, gives a row for every tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.source import Checkpoint

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Destination:
    """Where a tensor on disk goes.

    Attributes:
        parameter: name of the parameter or buffer that it fills, the first where it fills several; a name of its own
            kind where there is none.
        converter: what the library does with it; None where it is only renamed.
        pattern: which of the converter's sources it is.
    """

    parameter: str
    converter: Any
    pattern: str | None

    @property
    def fills_several(self) -> bool:
        """Whether it is cut up for several parameters."""
        return self.converter is not None and len(self.converter.target_patterns) > 1


@dataclass(frozen=True)
class Names:
    """The destination of every tensor on disk, by name, and the mapping that says so."""

    destinations: dict[str, Destination]
    transforms: list[Any]


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key of dotted names in which numbers count as numbers: the order in which experts are stacked."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def read_names(checkpoint: Checkpoint, model: torch.nn.Module) -> Names:
    """The destinations of a checkpoint's tensors in a model of its class.

    Args:
        checkpoint: the files.
        model: of the class of the checkpoint, on any device.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms: list[Any] = get_model_conversion_mapping(model)
    renamings = [m for m in transforms if isinstance(m, WeightRenaming)]
    converters = [m for m in transforms if isinstance(m, WeightConverter)]
    by_pattern = {pattern: m for m in converters for pattern in m.source_patterns}
    parameters, prefix = model.state_dict(), str(model.base_model_prefix)
    destinations = {}
    for key in sorted(checkpoint.tensors, key=natural):  # some renamings look at the names before
        name, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
        if name not in parameters and key in parameters:
            name, pattern = key, None
        destinations[key] = Destination(name, by_pattern[pattern] if pattern is not None else None, pattern)
    return Names(destinations, transforms)
