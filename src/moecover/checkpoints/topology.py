"""Shape of the routed part of a model: dataclasses only."""

from __future__ import annotations

import hashlib
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
        top_k: slots per token.
        hidden_size: width of the residual stream.
        num_layers: decoder layers, dense ones included.
        num_groups: groups of consecutive experts that the router chooses among first; 1 where it does not.
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
        return {**asdict(self), "decoder_layers": list(self.decoder_layers)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Topology:
        return cls(**{**value, "decoder_layers": tuple(value["decoder_layers"])})

    @property
    def fingerprint(self) -> str:
        """Hash of the topology alone."""
        return hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()
