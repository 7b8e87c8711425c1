"""What one shot of `prune` keeps: reads the arguments and the headers of a model, gives method, shape and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from moecover.checkpoints.magnitudes import check_magnitudes
from moecover.checkpoints.pieces import NOTHING
from moecover.errors import InputError, arg
from moecover.planning.fitting import channel_groups
from moecover.planning.methods import METHODS, default_method
from moecover.planning.shapes import resolve_shape
from moecover.pruning.request import Choice

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure


class ChoiceOptions(TypedDict, total=False):
    """Keyword arguments of one shot: how the experts are chosen from the corpora.

    Attributes:
        keep: experts kept per layer; give this or ``retain``.
        retain: fraction of the experts kept per layer, in (0, 1].
        multiple_of: round the count to the nearest multiple of this that the router allows.
        width: channels kept of each expert; give this or ``retain_width``, or neither for all.
        retain_width: fraction of the channels kept, in (0, 1].
        width_multiple_of: round the channels to the nearest multiple of this.
        method: name in `METHODS`; None for the default.
        method_options: of the method (``saliency``, ``protect``, ...), ``protect_super_experts``,
            ``protect_channels`` and ``channel_groups``.
        save_profile: folder for the profile, for other budgets.
        keep_inputs: calibration tokens that a search runs on; None for 8,192.
    """

    keep: int | None
    retain: float | None
    multiple_of: int | None
    width: int | None
    retain_width: float | None
    width_multiple_of: int | None
    method: str | None
    method_options: Mapping[str, Any]
    save_profile: str | Path | None
    keep_inputs: int | None


def width_of(headers: Structure, options: ChoiceOptions) -> int | None:
    """The channels of an expert, where a width is asked for.

    Raises:
        InputError: the checkpoint can keep all channels only; says why.
    """
    asked = {name: options.get(name) for name in ("width", "retain_width") if options.get(name) is not None}
    if asked and isinstance(headers.width, str):
        name, value = next(iter(asked.items()))
        raise InputError(f"{arg(name, value)}: {headers.checkpoint.name} can keep all channels only: {headers.width}")
    return None if isinstance(headers.width, str) else headers.width.channels


def choice_of(headers: Structure, options: ChoiceOptions, *, say: Callable[[str], None]) -> Choice:
    """How one shot chooses, once the router is known.

    Args:
        headers: of the model.
        options: what is asked for.
        say: is told that channels stay or go in blocks.

    Raises:
        InputError: a number of experts or channels that cannot be.
    """
    given = {**options.get("method_options", NOTHING)}
    group = channel_groups(headers, given.get("channel_groups", 1))
    if group > 1 and (options.get("width") is not None or options.get("retain_width") is not None):
        given["channel_groups"] = group
        say(f"note: channels stay or go in groups of {group}, as they are quantised")
    if METHODS[options.get("method") or default_method().name].reads_weights:
        check_magnitudes(headers)
    shape = resolve_shape(
        headers.topology,
        width_of(headers, options),
        keep=options.get("keep"),
        retain=options.get("retain"),
        multiple_of=options.get("multiple_of"),
        width=options.get("width"),
        retain_width=options.get("retain_width"),
        width_multiple_of=options.get("width_multiple_of"),
        channel_groups=given.get("channel_groups", 1),
    )
    if shape.width is None:
        given.pop("channel_groups", None)
    folder = options.get("save_profile")
    return Choice(
        options.get("method") or default_method().name,
        given,
        shape.keep,
        shape.width,
        None if folder is None else Path(folder),
        options.get("keep_inputs"),
    )
