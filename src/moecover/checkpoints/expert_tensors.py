"""What every tensor on disk has to do with the experts: reads names and headers, gives a row for each that depends on them.

The library's own conversion mapping leads from the names on disk to the parameters of the model class, whose expert axis
is known. A quantised checkpoint has names that lead to no parameter (packed weights, scales): inside the experts of a
layer they belong to the expert that their name gives, or have the experts along their first axis.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.checkpoints.names import read_names
from moecover.checkpoints.source import Checkpoint, TensorEntry
from moecover.errors import InputError

if TYPE_CHECKING:
    import torch

FLOAT_TYPES = {"F16", "BF16", "F32", "F64"}
OTHER_PARTS = re.compile(r"(?:^|\.)\w*(?:vision|visual|audio)\w*\.")
MTP = re.compile(r"(?:.*?\.)?(?:mtp|nextn)\w*(?=\.)")
NUMBERED = re.compile(r"(?:.*?\.)?layers\.(\d+)(?=\.)")
NUMBER = re.compile(r"\.(\d+)\.")
EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class ExpertTensor:
    """How one tensor on disk depends on the experts of a layer.

    Attributes:
        layer: MoE layer.
        expert: the one expert whose tensor this is; None when the tensor holds all experts along ``axis``.
        axis: axis of the experts; None for the tensor of one expert.
        routed: part of an expert's own weights (else: of the router).
        tail: how many places of the axis behind the experts belong to none (a router's rows for shared experts).
    """

    layer: int
    expert: int | None
    axis: int | None
    routed: bool
    tail: int = 0


@dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint that depend on the experts.

    Attributes:
        experts: by name, those of the model's MoE layers.
        mtp: by name, all of the multi-token-prediction layers that have experts, which the model class does not run;
            None for those that depend on no expert. Their ``layer`` is the last MoE layer, whose choice they share.
        quantised: whether an expert's weights are stored in a packed or 8-bit type.
    """

    experts: dict[str, ExpertTensor]
    mtp: dict[str, ExpertTensor | None]
    quantised: bool


def layer_number(name: str) -> int:
    """The first number among the parts of a dotted name: the decoder layer.

    Raises:
        InputError: there is none.
    """
    match = NUMBER.search(name)
    if match is None:
        raise InputError(f"{name} has experts but belongs to no numbered layer: not supported")
    return int(match[1])


def kind_of(name: str) -> str:
    """A tensor's name with its layer and its expert left open: the same for all layers and experts."""
    return EXPERT.sub(".experts.*.", NUMBER.sub(".#.", name, count=1))


def expert_number(name: str) -> int | None:
    """The expert whose tensor this is by its name; None where the name gives none."""
    match = EXPERT.search(name)
    return int(match[1]) if match else None


def classify(
    checkpoint: Checkpoint, model: torch.nn.Module, axes: dict[str, int], modules: tuple[str, ...], experts: int,
    num_layers: int, *, declared: bool = False,
) -> Tensors:  # fmt: skip
    """The expert-dependent tensors on disk; checks every tensor's shape against the parameter that it fills.

    Args:
        checkpoint: the files.
        model: the model class, on ``meta``.
        axes: expert axis of every expert-dependent parameter, by name.
        modules: names of the experts modules.
        experts: experts of a layer.
        num_layers: decoder layers.
        declared: the checkpoint says that it is quantised: packed types and several tensors an expert are no surprise.

    Raises:
        InputError: tensors that are missing, of another shape, or that belong to the experts in no known way.
    """
    parameters = dict(model.state_dict())
    destinations = read_names(checkpoint, model).destinations
    # What fills several parameters fills no one of them.
    targets = {key: key if (d := destinations[key]).fills_several else d.parameter for key in checkpoint.tensors}
    outside = {k: t for k, t in targets.items() if t not in parameters}
    mtp = _mtp_names(outside, num_layers)
    layer_of = {layer_number(module): layer for layer, module in enumerate(modules)}
    owners = {key.rpartition(".")[0] for key in axes}
    shared = Counter(targets.values())  # a parameter may be put together from several tensors
    found: dict[str, ExpertTensor] = {}
    for key, target in targets.items():
        entry, row = checkpoint.tensors[key], None
        if target in axes:
            routed = target.rpartition(".")[0] in modules
            one = expert_number(key)
            axis, expected = axes[target] if one is None else None, tuple(parameters[target].shape)
            part = axis is not None and shared[target] > 1 and entry.shape[axis] == experts
            if axis is not None and entry.shape != expected and not part:
                raise _wrong_shape(checkpoint, entry, expected)
            tail = 0 if axis is None else expected[axis] - experts
            row = ExpertTensor(layer_of[layer_number(target)], one, axis, routed, tail)
        elif key in outside and key not in mtp:
            row = _of_module(checkpoint, entry, target, owners, modules, experts)
        if row is not None:
            found[key] = row
    quantised = check_rows(checkpoint, found, modules, experts, declared=declared)
    _check_filled(checkpoint, targets, parameters, axes, modules if quantised and declared else ())
    return Tensors(found, _mtp_rows(checkpoint, mtp, found, len(modules) - 1, experts), quantised)


def _of_module(
    checkpoint: Checkpoint, entry: TensorEntry, target: str, owners: set[str], modules: tuple[str, ...], experts: int
) -> ExpertTensor | None:
    """The row of a tensor that fills no parameter but belongs to a layer's experts; None when it does not."""
    if ".experts." not in target:
        if target.rpartition(".")[0] in owners and math.prod(entry.shape) > 1:
            raise InputError(f"{checkpoint.name}: tensor {entry.name} belongs to the router in a way that is not known (a quantised router?): its experts cannot be cut apart. Use a checkpoint whose router is not quantised")  # fmt: skip
        return None
    if OTHER_PARTS.search(target):
        return None  # its experts are none of the decoder's
    module = f".{target.partition('.experts.')[0]}.experts"
    layer = next((i for i, name in enumerate(modules) if module.endswith(f".{name}") or name.endswith(module)), None)
    if layer is None:
        raise InputError(f"{checkpoint.name}: tensor {entry.name} belongs to experts that the model class does not have: not supported")  # fmt: skip
    if (one := expert_number(entry.name)) is not None:
        return ExpertTensor(layer, one, None, routed=True)
    if math.prod(entry.shape) == 1:
        return None  # one scale for all experts
    if entry.shape[0] != experts:
        raise InputError(f"{checkpoint.name}: tensor {entry.name} of shape {list(entry.shape)} belongs to the {experts} experts of a layer in a way that is not known")  # fmt: skip
    return ExpertTensor(layer, None, 0, routed=True)


def mtp_root(name: str, num_layers: int) -> str | None:
    """The multi-token-prediction layer that a tensor lies in by its name; None where it lies in none."""
    beyond = NUMBERED.match(name)
    match = MTP.match(name) or (beyond if beyond and int(beyond[1]) >= num_layers else None)
    return match[0] if match else None


def _mtp_names(outside: dict[str, str], num_layers: int) -> set[str]:
    """The tensors of those multi-token-prediction layers that have experts, among those that the model class lacks."""
    roots: dict[str, list[str]] = {}
    for key in outside:
        if root := mtp_root(key, num_layers):
            roots.setdefault(root, []).append(key)
    return {key for keys in roots.values() if any(".experts." in k for k in keys) for key in keys}


def _suffix(name: str) -> str:
    """The part of a name that is the same in every layer and for every expert."""
    return EXPERT.sub(".experts.*.", name).partition(f".{layer_number(name)}.")[2]


def _mtp_rows(
    checkpoint: Checkpoint, names: set[str], found: dict[str, ExpertTensor], layer: int, experts: int
) -> dict[str, ExpertTensor | None]:
    """How the tensors of multi-token-prediction layers depend on experts: as their twins in the other layers do."""
    twins = {_suffix(key): row for key, row in found.items()} if names else {}
    rows: dict[str, ExpertTensor | None] = {}
    for key in sorted(names):
        parts = EXPERT.sub(".experts.*.", key).split(".")
        twin = next((twins[s] for i in range(len(parts)) if (s := ".".join(parts[i:])) in twins), None)
        one, shape = expert_number(key), checkpoint.tensors[key].shape
        if one is not None:
            rows[key] = ExpertTensor(layer, one, None, routed=True)
        elif twin is not None and twin.axis is not None:
            rows[key] = ExpertTensor(layer, None, twin.axis, twin.routed)
        elif ".experts." in key and math.prod(shape) > 1:
            if shape[0] != experts:
                raise InputError(f"{checkpoint.name}: tensor {key} of shape {list(shape)} belongs to the experts of a multi-token-prediction layer in a way that is not known")  # fmt: skip
            rows[key] = ExpertTensor(layer, None, 0, routed=True)
        else:
            rows[key] = None
    return rows


# ------------------------------------------------------------------------------------------------------------- checks
def _wrong_shape(checkpoint: Checkpoint, entry: TensorEntry, expected: tuple[int, ...]) -> InputError:
    return InputError(f"{checkpoint.name}: tensor {entry.name} in {entry.shard} has shape {list(entry.shape)}, config.json asks for {list(expected)}")  # fmt: skip


def check_rows(
    checkpoint: Checkpoint, found: dict[str, ExpertTensor], modules: tuple[str, ...], experts: int, *, declared: bool
) -> bool:
    """Check the rows of the MoE layers against the headers; returns whether the experts are quantised.

    Raises:
        InputError: experts that the configuration does not have, that are missing or not alike, or a quantised router.
    """
    for key, row in found.items():
        if row.expert is not None and row.expert >= experts:
            raise InputError(f"{checkpoint.name}: tensor {key} is of expert {row.expert}, config.json has {experts}")
    quantised = any(t.routed and checkpoint.tensors[k].dtype not in FLOAT_TYPES for k, t in found.items())
    _check_router(checkpoint, found, quantised=quantised)
    if quantised and declared:
        _check_every_expert(checkpoint, found, modules, experts)
    else:
        _check_experts_alike(checkpoint, found)
    return quantised


def _check_router(checkpoint: Checkpoint, found: dict[str, ExpertTensor], *, quantised: bool) -> None:
    """A router's tensors are plain numbers, whatever the experts are stored in."""
    for key, row in found.items():
        dtype = checkpoint.tensors[key].dtype
        if not row.routed and dtype not in FLOAT_TYPES:
            what = "quantised" if quantised or not dtype.startswith("I") else f"a table of {dtype}"
            raise InputError(f"{checkpoint.name}: the router is {what} ({key} of {dtype}), so its experts cannot be cut apart. Use a checkpoint whose router is not")  # fmt: skip


def _check_every_expert(
    checkpoint: Checkpoint, found: dict[str, ExpertTensor], modules: tuple[str, ...], experts: int
) -> None:
    """Every layer of a quantised checkpoint holds all experts (which may be stored in different ways)."""
    there: list[set[int | None]] = [set() for _ in modules]
    for row in found.values():
        if row.routed:
            there[row.layer].add(row.expert)
    for module, ids in zip(modules, there, strict=True):
        if None not in ids and (missing := set(range(experts)) - ids):
            raise InputError(f"{checkpoint.name}: nothing in the files belongs to expert {min(missing)} of {module}")


def _check_experts_alike(checkpoint: Checkpoint, found: dict[str, ExpertTensor]) -> None:
    """Every expert of every layer has the same tensors with the same shapes and types."""
    kinds: dict[str, TensorEntry] = {}
    for key, row in found.items():
        if row.expert is None:
            continue
        entry = checkpoint.tensors[key]
        first = kinds.setdefault(kind_of(key), entry)
        if (entry.shape, entry.dtype) != (first.shape, first.dtype):
            raise InputError(f"{checkpoint.name}: tensor {key} in {entry.shard} has shape {list(entry.shape)} of {entry.dtype}, {first.name} has {list(first.shape)} of {first.dtype}")  # fmt: skip


def _check_filled(
    checkpoint: Checkpoint, targets: dict[str, str], parameters: dict[str, torch.Tensor], axes: dict[str, int],
    quantised: tuple[str, ...],
) -> None:  # fmt: skip
    """Every parameter gets as many numbers as it has, but for what is stored packed (``quantised`` experts modules)."""
    sources: dict[str, list[TensorEntry]] = {}
    for key, target in targets.items():
        sources.setdefault(target, []).append(checkpoint.tensors[key])
    for key, parameter in parameters.items():
        if key.rpartition(".")[0] in quantised:
            continue
        entries = sources.get(key, [])
        if not entries and key in axes:
            raise InputError(f"{checkpoint.name}: nothing in the files fills {key} of shape {list(parameter.shape)}")
        if any(entry.dtype not in FLOAT_TYPES for entry in entries):
            continue  # packed
        held = sum(math.prod(entry.shape) for entry in entries)
        if entries and held != parameter.numel():
            if len(entries) == 1:
                raise _wrong_shape(checkpoint, entries[0], tuple(parameter.shape))
            raise InputError(f"{checkpoint.name}: {key} needs {parameter.numel()} numbers of shape {list(parameter.shape)}, the files hold {held}")  # fmt: skip
