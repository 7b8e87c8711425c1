"""The budgets of a grid: reads fractions, counts or shapes of a configuration, gives what a model keeps at each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moecover.checkpoints.topology import Topology, Width
from moecover.comparison.config import Config
from moecover.errors import InputError
from moecover.planning.curve import parse_shape, parse_share
from moecover.planning.keep import resolve_keep
from moecover.planning.shapes import Shape


@dataclass(frozen=True)
class Budget:
    """What a model keeps.

    Attributes:
        retain: share of the experts' bytes; of whole experts their fraction, as asked for.
        shape: experts per layer, and channels of each.
    """

    retain: float
    shape: Shape


def budgets(config: Config, topology: Topology, name: str, width: Width | str) -> list[Budget]:
    """What a model keeps at every budget.

    Args:
        config: the comparison.
        topology: of the model.
        name: of the model, for errors.
        width: the channels of its experts, or why their number cannot be changed.

    Raises:
        InputError: the model cannot have a shape, or two budgets keep the same.
    """
    try:
        found = _found(config, topology, width)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    shapes = [budget.shape for budget in found]
    if len(set(shapes)) < len(shapes):
        raise InputError(f"{name}: the budgets keep {_words(shapes)}: give every one once")
    return found


def _found(config: Config, topology: Topology, width: Width | str) -> list[Budget]:
    """The budgets in the order of the configuration."""
    experts = topology.num_experts
    if config.shapes is not None:
        return [_of_shape(text, topology, width) for text in config.shapes]
    if config.keep is not None:
        counts = [resolve_keep(topology, keep=keep, retain=None) for keep in config.keep]
        return [Budget(round(count / experts, 4), Shape(count)) for count in counts]
    return [Budget(retain, Shape(resolve_keep(topology, keep=None, retain=retain))) for retain in config.retain or ()]


def _of_shape(text: str, topology: Topology, width: Width | str) -> Budget:
    """The budget of an entry of ``shapes``: experts, experts x channels, or a percentage of whole experts."""
    experts = topology.num_experts
    if re.fullmatch(r"\d+", text):
        shape = Shape(resolve_keep(topology, keep=int(text), retain=None))
    elif text.endswith("%"):
        shape = Shape(resolve_keep(topology, keep=None, retain=parse_share(text, "shapes")))
    elif re.fullmatch(r"\d+x\d+", text):
        if isinstance(width, str):
            raise InputError(f"shape {text}: the width of the experts cannot be changed: {width}")
        parsed = parse_shape(text, topology, width.channels)
        assert isinstance(parsed, Shape)
        if (parsed.width or 0) % width.group:
            raise InputError(
                f"shape {text}: the weights lie in blocks of {width.group} channels, of which only whole ones can go. "
                f"Give a multiple of {width.group}"
            )
        share = parsed.keep * (parsed.width or width.channels) / (experts * width.channels)
        return Budget(round(share, 4), parsed)
    else:
        raise InputError(
            f"shape {text}: give experts (15), experts x channels of each (30x704), or a percentage of whole experts "
            "(25%)"
        )
    return Budget(round(shape.keep / experts, 4), shape)


def _words(shapes: Sequence[Shape]) -> str:
    if all(shape.width is None for shape in shapes):
        return f"{', '.join(str(shape.keep) for shape in shapes)} experts"
    return ", ".join(map(str, shapes))
