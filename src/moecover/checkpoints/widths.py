"""The width of a checkpoint's experts, derived from its model class: which key of config.json holds it, what it sizes.

As with the number of experts, no table of families is needed: the model class is built once more with the width
doubled, and every tensor whose shape changes has an axis of channels. What cannot be cut is a sentence that says why.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.config_edit import (
    SHARED_KEYS,
    Config,
    number_paths,
    with_expert_count,
)
from moecover.checkpoints.model_class import build_on_meta
from moecover.checkpoints.names import kind_of, read_names, suffix_of, twin_of
from moecover.checkpoints.packed_channels import NoWidthError, packed_shared, packed_tensors
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.topology import ChannelAxis, ExpertTensors, Width
from moecover.errors import InputError

if TYPE_CHECKING:
    import torch

WIDTH_KEY = re.compile(r"intermediate|ffn|expert.*(dim|size|width)|moe.*(dim|size|width)")
INTERLEAVE = "Interleave"
KNOWN_STEPS = {"MergeModulelist", "Concatenate", "Transpose", INTERLEAVE}  # of the library's conversion mapping
Path = tuple[str, ...]
Changes = dict[str, tuple[int, int]]  # by parameter: the axis that changed, and its length before


def derive_width(
    checkpoint: Checkpoint,
    config: Config,
    model: torch.nn.Module,
    axes: Mapping[str, int],
    modules: tuple[str, ...],
    tensors: ExpertTensors,
) -> Width | str:
    """The channels of the routed experts; or, in words, why their number cannot be changed.

    Args:
        checkpoint: the files.
        config: the raw config that ``model`` was built from.
        model: the model class, on ``meta``.
        axes: expert axis of every expert-dependent parameter, by name.
        modules: names of the experts modules.
        tensors: the expert-dependent tensors on disk.
    """
    try:
        path, changes = _sized_by(checkpoint, config, model, modules)
        channels = number_paths(config)[path]
        parameters = _parameters(model, axes, modules, changes, channels)
        beside = {name: change for name, change in changes.items() if name.rpartition(".")[0] not in modules}
        keys, shared, around = _shared(config, modules, beside, channels, path)
        _check_shared_alone(checkpoint, config, model, keys, shared, beside)
        live = _by_kind(parameters)
        if tensors.quantised:
            state, names = model.state_dict(), read_names(checkpoint, model).destinations
            on_disk = packed_tensors(checkpoint, tensors.experts, names, state, parameters, channels)
            around_on_disk = packed_shared(checkpoint, names, state, around, shared * channels)
        else:
            on_disk = _tensors(checkpoint, model, tensors, parameters, axes, channels)
            around_on_disk = _shared_tensors(checkpoint, model, around)
        on_disk |= _of_twins(tensors.mtp, on_disk)
        around_on_disk |= _of_twins(tensors.mtp, around_on_disk)
    except NoWidthError as reason:
        return str(reason)
    return Width(channels, (path,), on_disk, live, keys, shared, around_on_disk, _by_kind(around))


def _changes(one: torch.nn.Module, two: torch.nn.Module) -> Changes:
    """The parameters whose shape differs between two models.

    Raises:
        NoWidthError: one differs along several axes.
    """
    wide, found = dict(two.state_dict()), dict[str, tuple[int, int]]()
    for name, tensor in one.state_dict().items():
        changed = [i for i, (a, b) in enumerate(zip(tensor.shape, wide[name].shape, strict=True)) if a != b]
        if len(changed) > 1 or (changed and wide[name].shape[changed[0]] != 2 * tensor.shape[changed[0]]):
            raise NoWidthError(f"{name} depends on the width of the experts in an unsupported way")
        if changed:
            found[name] = changed[0], tensor.shape[changed[0]]
    return found


def _sized_by(
    checkpoint: Checkpoint, config: Config, model: torch.nn.Module, modules: tuple[str, ...]
) -> tuple[Path, Changes]:
    """The key of config.json that sizes the experts and nothing of their input, and what changes with it."""
    text: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]  # a class of the library's
    wide = [p for p in model.get_submodule(modules[0]).parameters() if p.dim() == 3]
    lengths = {int(size) for p in wide for size in p.shape[1:]} - {int(text.hidden_size)}
    lengths |= {size // 2 for size in lengths if size % 2 == 0} | {int(text.hidden_size)}
    for path, value in number_paths(config).items():
        if not WIDTH_KEY.search(path[-1]) or value not in lengths:
            continue
        try:
            changes = _changes(model, build_on_meta(with_expert_count(config, (path,), 2 * value), checkpoint.name))
        except (InputError, NoWidthError):
            continue
        if all(any(name.startswith(f"{module}.") for name in changes) for module in modules):
            return path, changes
    raise NoWidthError("no key of config.json sizes its experts alone")


def _parameters(
    model: torch.nn.Module,
    axes: Mapping[str, int],
    modules: tuple[str, ...],
    changes: Changes,
    channels: int,
) -> dict[str, ChannelAxis]:
    """The channel axis of the experts' parameters, by name."""
    found = {}
    for name, (axis, length) in changes.items():
        module, _, leaf = name.rpartition(".")
        if module not in modules:
            continue
        parts, experts = length // channels, model.get_submodule(module)
        if axes.get(name) != 0 or axis == 0 or length % channels or parts not in (1, 2):
            raise NoWidthError(f"{leaf} of its experts depends on their width in an unsupported way")
        apart = getattr(experts, "is_concatenated", None)
        if parts == 2 and apart is None:
            raise NoWidthError("its experts do not say how gate and up projection lie in one tensor")
        found[name] = ChannelAxis(axis, parts, interleaved=parts == 2 and not apart)
    return found


def _shared(
    config: Config, modules: tuple[str, ...], beside: Changes, channels: int, path: Path
) -> tuple[tuple[Path, ...], int, dict[str, ChannelAxis]]:
    """What the same key sizes beside the experts: keys of the number of shared experts, the number, their axes.

    Raises:
        NoWidthError: something that is no shared expert, or one whose number no key holds.
    """
    if not beside:
        return (), 0, {}
    blocks = tuple(f"{module.rpartition('.')[0]}." for module in modules)
    key = ".".join(path)
    for name in beside:
        if not name.startswith(blocks) or "shared" not in name:
            raise NoWidthError(f"config.json's {key} also sizes {name}")
    lengths = {length for _, length in beside.values()}
    counts = {p: n for p, n in number_paths(config).items() if p[-1] in SHARED_KEYS}
    if len(lengths) > 1 or len(set(counts.values())) != 1 or lengths != {n * channels for n in counts.values()}:
        raise NoWidthError(f"config.json's {key} also sizes its shared expert, and no other key can make up for it")
    axes = {name: ChannelAxis(axis) for name, (axis, _) in beside.items()}
    return tuple(counts), next(iter(counts.values())), axes


def _check_shared_alone(
    checkpoint: Checkpoint,
    config: Config,
    model: torch.nn.Module,
    keys: tuple[Path, ...],
    shared: int,
    beside: Changes,
) -> None:
    """Refuse a number of shared experts that sizes more than these experts (a router's rows, say)."""
    if not keys:
        return
    try:
        changes = _changes(model, build_on_meta(with_expert_count(config, keys, 2 * shared), checkpoint.name))
    except (InputError, NoWidthError) as error:
        raise NoWidthError("the number of its shared experts sizes more than these") from error
    if more := sorted(changes.keys() ^ beside.keys()):
        raise NoWidthError(f"the number of its shared experts also sizes {more[0]}")


def _by_kind(parameters: Mapping[str, ChannelAxis]) -> dict[str, ChannelAxis]:
    """Axes by the kind of the parameter's name."""
    found: dict[str, ChannelAxis] = {}
    for name, axis in parameters.items():
        if found.setdefault(kind_of(name), axis) != axis:
            raise NoWidthError(f"{name} differs from the same parameter in other layers")
    return found


def _tensors(
    checkpoint: Checkpoint,
    model: torch.nn.Module,
    tensors: ExpertTensors,
    parameters: Mapping[str, ChannelAxis],
    axes: Mapping[str, int],
    channels: int,
) -> dict[str, ChannelAxis]:
    """The channel axis of the experts' tensors on disk, by kind."""
    state, destinations = model.state_dict(), read_names(checkpoint, model).destinations
    found: dict[str, ChannelAxis] = {}
    for name, row in tensors.experts.items():
        target = destinations[name].parameter
        if not row.routed or target not in parameters:
            continue
        shape, live = checkpoint.tensors[name].shape, parameters[target]
        steps = _steps(destinations[name].converter)
        if unknown := steps - KNOWN_STEPS:
            raise NoWidthError(f"{name} is stored in another form than it is used in ({min(unknown)})")
        if row.axis not in (None, 0):
            raise NoWidthError(f"{name} does not have its experts first")
        first = 0 if row.axis is None else 1  # axes of one expert begin here
        own, of_target = shape[first:], tuple(state[target].shape)[1:]
        places = [i for i, size in enumerate(own) if size in (channels, live.parts * channels)]
        if (
            len(own) == len(of_target)
            and own[live.axis - 1] in (channels, live.parts * channels)
            and (len(places) > 1 or own == of_target)
        ):
            place = live.axis - 1
        elif len(places) == 1:
            place = places[0]
        else:
            raise NoWidthError(f"the channels of {name} cannot be told from its shape {list(shape)}")
        parts = own[place] // channels
        axis = ChannelAxis(first + place, parts, (live.interleaved != (INTERLEAVE in steps)) and parts == 2)
        if found.setdefault(kind_of(name), axis) != axis:
            raise NoWidthError(f"{name} is stored in another way than in other layers")
    if not found:
        raise NoWidthError("nothing in the files holds its experts' channels")
    return found


def _steps(converter: Any) -> set[str]:
    """Names of the operations by which the library turns tensors on disk into a parameter."""
    return {type(operation).__name__ for operation in converter.operations} if converter is not None else set()


def _shared_tensors(
    checkpoint: Checkpoint, model: torch.nn.Module, around: Mapping[str, ChannelAxis]
) -> dict[str, ChannelAxis]:
    """The channel axis of the shared expert's tensors on disk, by kind; they must be stored as they are used."""
    if not around:
        return {}
    state, found = model.state_dict(), dict[str, ChannelAxis]()
    for name, destination in read_names(checkpoint, model).destinations.items():
        if destination.parameter in around:
            if checkpoint.tensors[name].shape != tuple(state[destination.parameter].shape):
                raise NoWidthError(f"{name} of the shared expert is not stored as it is used")
            found[kind_of(name)] = around[destination.parameter]
    return found


def _of_twins(mtp: Iterable[str], found: Mapping[str, ChannelAxis]) -> dict[str, ChannelAxis]:
    """The channel axis of multi-token-prediction layers' tensors on disk, by kind: that of the same of other layers."""
    by_suffix = {suffix_of(kind): axis for kind, axis in found.items()}
    twins = {name: twin for name in mtp if (twin := twin_of(name, by_suffix)) is not None}
    return {kind_of(name): by_suffix[twin] for name, twin in twins.items()}
