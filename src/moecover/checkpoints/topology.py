"""The routed part of a model: its shape, and which tensors depend on the experts. Dataclasses only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moecover.files.atomic import canonical_json


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
            run; None for those that depend on no expert. Their ``layer`` is the last MoE layer, whose plan they share.
        quantised: whether the experts' weights are stored in a packed or 8-bit type.
    """

    experts: dict[str, ExpertTensor]
    mtp: dict[str, ExpertTensor | None]
    quantised: bool


@dataclass(frozen=True)
class ExpertLayout:
    """Where the experts are, in a checkpoint and in the live model: what is derived from the model class.

    Attributes:
        topology: shape of the routed part.
        tensors: the expert-dependent tensors on disk.
        parameters: expert axis of every expert-dependent parameter or buffer of the live model, by name.
        modules: dotted name of the experts module of every MoE layer.
    """

    topology: Topology
    tensors: ExpertTensors
    parameters: dict[str, int]
    modules: tuple[str, ...]
