"""A model over several devices: reads a device map as it is asked for and what is free, says what lies where.

Maps are accelerate's, and so are the hooks that carry the hidden states from one device to the next. Nothing is
offloaded: a model that the devices do not hold runs layer by layer, without a map.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, arg
from moecover.files.reading import RepeatedKey, read_json
from moecover.registry import unknown_name
from moecover.runtime.cost import Cost, gb
from moecover.runtime.devices import AUTOMATIC, available_memory, check_device, kind_of, release
from moecover.runtime.distributed import of_first
from moecover.runtime.running import layer_names
from moecover.runtime.streaming import skeleton
from moecover.runtime.world import ALONE, World

if TYPE_CHECKING:
    import torch

WAYS = ("auto", "balanced", "balanced_low_0", "sequential")  # of accelerate; the first is another name of the second
DeviceMap = str | Path | Mapping[str, str | int]


@dataclass(frozen=True)
class Placement:
    """What lies where.

    Attributes:
        devices: device by name of a module, for all of them together; see accelerate's `dispatch_model`.
        needed: bytes of every device that are taken, weights and work.
        limits: bytes of every device that may be taken.
    """

    devices: dict[str, str]
    needed: dict[str, int]
    limits: dict[str, int]

    def line(self, estimate: Cost) -> str:
        """The estimate in words."""
        each = ", ".join(f"{gb(size)} of {gb(self.limits[device])} on {device}" for device, size in self.needed.items())
        on = f"{len(self.needed)} device{'s' if len(self.needed) > 1 else ''}"
        return (
            f"running in memory on {on}: about {each}, {gb(estimate.read)} to read, {estimate.flops / 1e12:,.1f} TFLOP"
        )


def parsed_map(asked: DeviceMap) -> str | dict[str, str]:
    """A device map as it is asked for: one of `WAYS`, or devices by name of a module, checked as far as that needs no
    model.

    Raises:
        InputError: neither a way nor a file with a JSON object, a device that this machine does not have, or one that
            holds no weights while the model runs.
    """
    if asked in WAYS:
        return str(asked)
    what = arg("device_map", str(asked) if not isinstance(asked, Mapping) else "")
    if not isinstance(asked, (str, Path, Mapping)):
        raise InputError(f"{what} is neither {', '.join(WAYS)}, a file nor a mapping")
    if not isinstance(asked, Mapping):
        asked = map_in(Path(asked), what)
    if not isinstance(asked, Mapping) or not asked or not all(type(value) in (str, int) for value in asked.values()):
        raise InputError(f'{what} must be an object with devices by name of a module, such as {{"model": "cuda:0"}}')
    kind = kind_of(check_device("auto", "auto"))
    found = {name: _named(f"{kind}:{value}" if isinstance(value, int) else value) for name, value in asked.items()}
    apart = sorted({device for device in found.values() if device in ("cpu", "disk", "meta")})
    if apart and (len(set(found.values())) > 1 or apart != ["cpu"]):
        raise InputError(
            f"{what} puts parts on {apart[0]}, from where they would be fetched for every batch. Name devices that"
            " compute, or leave the map out: a model that does not fit runs layer by layer"
        )
    for device in set(found.values()):
        check_device("auto", device)
    return found


def map_in(path: Path, what: str) -> Any:
    """What a JSON file has as devices by name of a module, unchecked.

    Args:
        path: the file.
        what: the argument that names it, for messages.

    Raises:
        InputError: no such file, not JSON, or a module twice.
    """
    try:
        return read_json(path, unique=True)
    except RepeatedKey as error:
        raise InputError(f"{what}: {error}. Give every module one device") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"{what} is neither {', '.join(WAYS)} nor a JSON file with devices by name of a module"
        ) from error


def _named(device: str) -> str:
    """A device by its kind and number, one of a kind that has no numbers by its kind."""
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return kind
    if kind not in AUTOMATIC:
        return kind if number in ("", "0") else device
    return f"{kind}:{number or 0}"


def placed(
    structure: Structure,
    asked: str | dict[str, str],
    *,
    dtype: str,
    limit: int | None,
    working: int,
    here: World = ALONE,
) -> Placement:
    """What lies where.

    Args:
        structure: the checkpoint.
        asked: see `parsed_map`.
        dtype: torch dtype by name, ``auto`` for the checkpoint's.
        limit: bytes that may be used of every device; nine tenths of what is free by default.
        working: bytes that a pass takes on every device beside the weights.
        here: this process among others, one a machine, that all take the map of the first one.

    Raises:
        InputError: the weights are quantised, the devices do not hold the model, or a map leaves parts out, names
            others, cuts a decoder layer or parts tensors that are one.
    """
    if how := structure.quantised or structure.checkpoint.declared_quantisation:
        raise InputError(f"{structure.checkpoint.name} is quantised ({how}): {arg('device_map')} takes no such model")
    model: Any = skeleton(structure, dtype=dtype)
    model.tie_weights(missing_keys=set(model.state_dict()), recompute_mapping=False)
    devices = _all_devices() if isinstance(asked, str) else sorted(set(asked.values()))
    for device in devices:
        release(device)
    limits = {one: int(0.9 * available_memory(one)) if limit is None else limit for one in devices}
    room = {device: size - working for device, size in limits.items()}
    found = of_first(here, _inferred(model, asked, room) if isinstance(asked, str) else asked)
    tensors = dict(itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers()))
    modules = dict(model.named_modules(remove_duplicate=False))
    if unknown := [name for name in found if name not in modules and name not in tensors]:
        raise unknown_name(f"module in {arg('device_map')}", unknown[0], modules)
    lies = {name: _device_of(name, found, structure) for name in tensors}
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    for name, tensor in tensors.items():
        if lies[name] != lies[other := first[id(tensor)]]:
            raise InputError(
                f"{arg('device_map')} puts {other} on {lies[other]} and {name}, which is the same, on {lies[name]}:"
                " give them one device"
            )
    for layer in layer_names(model, structure):
        if len(parts := {device for name, device in lies.items() if name.startswith(f"{layer}.")}) > 1:
            raise InputError(f"{arg('device_map')} puts {layer} on {' and '.join(sorted(parts))}: give it one device")
    needed = dict.fromkeys(devices, 0)
    for name, parameter in model.named_parameters():
        needed[lies[name]] += parameter.numel() * parameter.element_size()
    needed = {device: size + working for device, size in needed.items() if size}
    for device, size in needed.items():
        if size > limits[device]:
            raise InputError(
                f"{structure.checkpoint.name} would take {gb(size)} of {device}, {gb(limits[device])} may be used."
                f" Leave {arg('device_map')} out: a model that does not fit runs layer by layer"
            )
    return Placement(dict(_parts(model, "", lies)), needed, limits)


def _parts(module: torch.nn.Module, name: str, lies: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The largest modules whose tensors all lie on one device, with the device; none lies in another."""
    prefix = f"{name}." if name else ""
    devices = {device for tensor, device in lies.items() if tensor.startswith(prefix)}
    if len(devices) == 1:
        yield name, devices.pop()
        return
    direct = (tensor for tensor in lies if tensor.startswith(prefix) and "." not in tensor.removeprefix(prefix))
    yield from ((tensor, lies[tensor]) for tensor in direct)
    for child, part in module.named_children() if devices else ():
        yield from _parts(part, f"{prefix}{child}", lies)


def _all_devices() -> list[str]:
    """All devices of the kind that ``auto`` takes."""
    import torch

    kind = check_device("auto", "auto")
    return (
        [f"{kind}:{number}" for number in range(getattr(torch, kind).device_count())] if kind in AUTOMATIC else [kind]
    )


def _inferred(model: torch.nn.Module, way: str, room: dict[str, int]) -> dict[str, str]:
    """The map that accelerate makes for devices with some room, decoder layers whole."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole: Any = list(getattr(model, "_no_split_modules", None) or [])
    names = list(room)
    memory: dict[int | str, int] = {number: max(0, room[name]) for number, name in enumerate(names)}
    if way != "sequential" and len(names) > 1:
        memory = get_balanced_memory(model, memory, whole, low_zero=way == "balanced_low_0")
        memory = {number: size for number, size in memory.items() if isinstance(number, int)}
    if len(names) == 1:
        return {"": names[0]}
    found = infer_auto_device_map(model, memory, no_split_module_classes=whole)
    if any(device == "disk" for device in found.values()):
        raise InputError(
            f"{arg('device_map', way)}: {', '.join(gb(max(0, size)) for size in room.values())} for weights on"
            f" {len(names)} devices do not hold the model. Leave {arg('device_map')} out: a model that does not fit"
            " runs layer by layer"
        )
    return {name: names[int(number)] for name, number in found.items()}


def _device_of(parameter: str, devices: Mapping[str, str], structure: Structure) -> str:
    """The device of a parameter: that of the longest name in the map that it is under."""
    parts = parameter.split(".")
    for end in range(len(parts), -1, -1):
        if (name := ".".join(parts[:end])) in devices:
            return devices[name]
    raise InputError(f"{arg('device_map')} names no device for {parameter} of {structure.checkpoint.name}")
