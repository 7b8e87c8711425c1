"""The routed part of a model: its shape, and which tensors depend on the experts. Dataclasses only."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moecover.files.atomic import canonical_json

WIDTH_STEP = 8  # channels: rows of 16-bit numbers then begin at multiples of 16 bytes, as grouped kernels need them


@dataclass(frozen=True)
class Topology:
    """Shape of the routed part of a model.

    Attributes:
        family: ``model_type`` of config.json.
        decoder_layers: decoder index of every MoE layer; its position is the MoE ``layer`` axis everywhere else.
        num_experts: routed experts per MoE layer (E).
        top_k: experts per token.
        hidden_size: width of the residual stream.
        num_layers: decoder layers, dense ones included.
        num_groups: groups of consecutive experts that the router chooses among first; 1 if it does not.
        top_groups: groups that a token may use.
    """

    family: str
    decoder_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    num_layers: int
    num_groups: int = 1
    top_groups: int = 1

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "decoder_layers": list(self.decoder_layers)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Topology:
        """The topology that `to_json` gave."""
        return cls(**{**value, "decoder_layers": tuple(value["decoder_layers"])})

    @property
    def fingerprint(self) -> str:
        """Hash of the topology alone."""
        return hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()


@dataclass(frozen=True)
class ExpertTensor:
    """How one tensor on disk depends on the experts of a layer.

    Attributes:
        layer: MoE layer.
        expert: the expert that the tensor belongs to; None if it holds all experts along ``axis``.
        axis: axis of the experts; None for the tensor of one expert.
        routed: whether it is part of the experts' own weights (else: of the router).
        tail: number of entries at the end of the axis that belong to no expert (a router's rows for shared experts).
    """

    layer: int
    expert: int | None
    axis: int | None
    routed: bool
    tail: int = 0


@dataclass(frozen=True)
class ExpertTensors:
    """The tensors of a checkpoint that depend on the experts.

    Attributes:
        experts: those of the model's MoE layers, by name.
        mtp: all tensors of the multi-token-prediction layers that have experts, by name, which the model class does not
            run; None for those that depend on no expert. Their ``layer`` is the last MoE layer, whose ids they share
            where a plan has none of their own.
        quantised: whether the experts' weights are stored in a packed or 8-bit type.
    """

    experts: dict[str, ExpertTensor]
    mtp: dict[str, ExpertTensor | None]
    quantised: bool


@dataclass(frozen=True)
class IdTable:
    """A tensor on disk whose values are ids of experts: those of every token id, ``[token id, slot]`` (hash routing).

    Its shape does not depend on the experts, so it has no row among `ExpertTensors`.

    Attributes:
        layer: MoE layer.
        parameter: name of the parameter or buffer of the live model that it fills.
    """

    layer: int
    parameter: str


@dataclass(frozen=True)
class ChannelAxis:
    """Where the channels of an expert lie in a tensor or parameter.

    Attributes:
        axis: the axis, the expert axis of a stacked tensor counted.
        parts: how many blocks of channels lie along it: 2 where gate and up projection are one tensor.
        interleaved: whether the parts alternate channel by channel instead of following each other.
        group: consecutive channels that share an entry, as in blocks of a quantised tensor.
    """

    axis: int
    parts: int = 1
    interleaved: bool = False
    group: int = 1


@dataclass(frozen=True)
class Width:
    """The channels of the routed experts, and what else config.json sizes by their number.

    A channel is a row of the gate and up projection and the column of the down projection that it feeds.

    Attributes:
        channels: of every expert (W).
        keys: paths of the keys in config.json that hold the number.
        tensors: channel axis of the experts' tensors on disk, by the kind of their name (`names.kind_of`).
        parameters: the same of the live model's parameters.
        shared_keys: paths of the keys in config.json by whose number of shared experts the width is multiplied.
        shared: that number (S); 0 where the shared expert is sized by itself.
        shared_tensors: channel axis, S W long, of the shared expert's tensors on disk, by kind.
        shared_parameters: the same of the live model's parameters.
    """

    channels: int
    keys: tuple[tuple[str, ...], ...]
    tensors: dict[str, ChannelAxis]
    parameters: dict[str, ChannelAxis]
    shared_keys: tuple[tuple[str, ...], ...] = ()
    shared: int = 0
    shared_tensors: dict[str, ChannelAxis] = field(default_factory=dict)
    shared_parameters: dict[str, ChannelAxis] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            **asdict(self),
            "keys": [list(k) for k in self.keys],
            "shared_keys": [list(k) for k in self.shared_keys],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Width:
        """The width that `to_json` gave."""
        axes = {
            name: {kind: ChannelAxis(**axis) for kind, axis in value[name].items()}
            for name in ("tensors", "parameters", "shared_tensors", "shared_parameters")
        }
        keys = {name: tuple(tuple(key) for key in value[name]) for name in ("keys", "shared_keys")}
        return cls(**{**value, **axes, **keys})

    @property
    def group(self) -> int:
        """Consecutive channels that stay or go together: 1 where weights are not stored in blocks."""
        return math.lcm(*(axis.group for axis in (*self.tensors.values(), *self.shared_tensors.values())))

    def shared_at(self, width: int) -> int:
        """The number of shared experts of some width that hold the channels of all, the rest being padding."""
        return -(-self.shared * self.channels // width)

    def padding(self, width: int) -> int:
        """Channels of zeros that the shared expert gets where experts have some width."""
        return self.shared_at(width) * width - self.shared * self.channels


@dataclass(frozen=True)
class ExpertLayout:
    """Where the experts are, in a checkpoint and in the live model: what is derived from the model class.

    Attributes:
        topology: shape of the routed part.
        tensors: the expert-dependent tensors on disk.
        parameters: expert axis of every expert-dependent parameter or buffer of the live model, by name.
        modules: dotted name of the experts module of every MoE layer.
        width: the channels of the experts; or, in words, why their number cannot be changed.
        tables: tensors on disk that hold ids of experts, by name.
    """

    topology: Topology
    tensors: ExpertTensors
    parameters: dict[str, int]
    modules: tuple[str, ...]
    width: Width | str = "not looked for"
    tables: dict[str, IdTable] = field(default_factory=dict)
