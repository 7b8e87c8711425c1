"""The artefact of planning: what a plan holds, its file plan.json, and whether it fits a model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moecover.checkpoints.structure import Structure
from moecover.checkpoints.topology import Topology
from moecover.corpora.sources import ALL_CORPORA
from moecover.errors import InputError, arg
from moecover.files.atomic import canonical_json, write_text
from moecover.files.hashing import SEAL, sealed, unsealed
from moecover.files.reading import parse_json
from moecover.planning.keep import resolve_keep
from moecover.text import Cell, Shown

if TYPE_CHECKING:
    from numpy.typing import NDArray


class LayerPlan(BaseModel):
    """The kept experts of one MoE layer.

    Attributes:
        decoder_layer: index among all decoder layers, dense ones included.
        kept: ids of the kept experts, ascending; their positions are the new ids.
        required: experts kept whatever the method says (super experts).
        protected: by corpus, the experts that it protected, in the order of its turns.
        filled: the other kept experts, best first.
        saliency: by corpus (`ALL_CORPORA` for all of them together), the saliency of every expert.
        search: kind of a subset search: ``exhaustive``, ``greedy`` or ``greedy with exchanges``.
        loss: reconstruction loss of that subset, see `expert_sparsity` and `worst_corpus`.
        tokens: calibration tokens that the search ran on.
        unused: experts that no token of the calibration text was routed to.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    decoder_layer: int
    kept: list[int] = Field(min_length=1)
    required: list[int] = Field(default_factory=list)
    protected: dict[str, list[int]] = Field(default_factory=dict)
    filled: list[int] = Field(default_factory=list)
    saliency: dict[str, list[float]] = Field(default_factory=dict)
    search: str | None = None
    loss: float | None = None
    tokens: int | None = None
    unused: list[int] = Field(default_factory=list)

    @model_validator(mode="after")
    def _kept_is_a_set(self) -> LayerPlan:
        if len(set(self.kept)) < len(self.kept) or min(self.kept) < 0:
            raise ValueError(f"decoder layer {self.decoder_layer}: `kept` must hold different ids from 0 on")
        self.kept.sort()
        named = {*self.required, *self.filled, *(e for experts in self.protected.values() for e in experts)}
        if spare := named - set(self.kept):
            raise ValueError(f"decoder layer {self.decoder_layer}: expert {min(spare)} is not in `kept`")
        lengths = {len(values) for values in self.saliency.values()}
        if len(lengths) > 1 or (lengths and max(self.kept) >= min(lengths)):
            raise ValueError(f"decoder layer {self.decoder_layer}: `saliency` does not have one number for each expert")
        return self


class Plan(Shown, BaseModel):
    """Which experts remain. Made by `plan`, or written by hand: then only ``keep`` and ``layers`` are needed.

    Attributes:
        schema_version: 1 (``schema`` in the file).
        method: name of the method.
        options: its options, the saliency among them.
        keep: experts kept in every layer.
        layers: one entry for every MoE layer, in order.
        topology_fingerprint: of the model that the plan was made for; None in a plan by hand.
        model_fingerprint: the same with the routers' weights.
        profile_fingerprint: of the profile that it was made from.
        model: name of that model.
        calibration: by corpus, the records of the calibration text; empty if the choice does not depend on it.
        weight_files: stamps of the weight files that were profiled, see `checkpoints.stamps`.
        found: how ``keep`` was found, if it was searched for, see `evaluation.budget_search`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    schema_version: Literal[1] = Field(1, alias="schema")
    method: str = "by hand"
    options: dict[str, Any] = Field(default_factory=dict)
    keep: int
    layers: list[LayerPlan] = Field(min_length=1)
    topology_fingerprint: str | None = None
    model_fingerprint: str | None = None
    profile_fingerprint: str | None = None
    model: str | None = None
    calibration: dict[str, list[dict[str, Any]]] = Field(default_factory=dict)
    weight_files: dict[str, list[int]] = Field(default_factory=dict)
    found: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _layers_agree(self) -> Plan:
        first = self.layers[0]
        for layer in self.layers:
            if layer.saliency.keys() != first.saliency.keys():
                raise ValueError(f"decoder layer {layer.decoder_layer}: `saliency` is of other corpora than before")
            if {len(v) for v in layer.saliency.values()} != {len(v) for v in first.saliency.values()}:
                raise ValueError(f"decoder layer {layer.decoder_layer}: `saliency` has another length than before")
        return self

    def summary(self) -> str:
        """Method, number of experts and model."""
        model = f" of {self.model}" if self.model else ""
        return f"{self.method}, keep {self.keep} experts in each of {len(self.layers)} MoE layers{model}"

    def rows_shown(self) -> list[dict[str, Cell]]:
        """One row per MoE layer: the kept ids, and how they came to stay."""
        return [
            {
                "decoder layer": row.decoder_layer,
                "kept": " ".join(map(str, row.kept)),
                "protected": sum(map(len, row.protected.values())),
                "filled": len(row.filled),
                "required": len(row.required),
                "search": row.search,
                "loss": row.loss,
            }
            for row in self.layers
        ]

    def __str__(self) -> str:
        return repr(self)

    def to_dict(self) -> dict[str, Any]:
        """What plan.json holds, without the empty parts of a layer and without empty ``weight_files`` and ``found``."""
        value = self.model_dump(by_alias=True)
        for name in ("weight_files", "found"):
            if not value[name]:
                del value[name]
        value["layers"] = [{k: v for k, v in row.items() if v not in (None, [], {})} for row in value["layers"]]
        return value

    def to_json(self) -> str:
        """The text of plan.json, sealed; the same plan gives the same bytes."""
        value = sealed(self.to_dict())
        layers: list[object] = value.pop("layers")  # type: ignore[assignment]
        head = json.dumps(value, indent=1)[: -len("\n}")]
        rows = ",\n".join(f"  {json.dumps(layer, allow_nan=False)}" for layer in layers)
        return f'{head},\n "layers": [\n{rows}\n ]\n}}\n'

    def save(self, path: str | Path) -> Path:
        """Write plan.json; the file appears only when it is complete."""
        write_text(Path(path), self.to_json())
        return Path(path)

    @classmethod
    def from_json(cls, text: str, *, name: str = "the plan") -> Plan:
        """Parse a plan.

        Raises:
            InputError: not JSON, or not a plan; says where.
        """
        try:
            value = unsealed(parse_json(text, finite=True), required=False)
        except ValueError as error:
            raise InputError(f"{name} cannot be used: {error}{_remedy(text)}") from error
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{name} is no valid plan: {where + ': ' if where else ''}{first['msg']}") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read plan.json; see `from_json`."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no plan {path}. Make one with `moecover plan`")
        return cls.from_json(path.read_text(encoding="utf-8", errors="replace"), name=str(path))

    @property
    def kept(self) -> list[list[int]]:
        """Ids of the kept experts of every MoE layer, ascending."""
        return [layer.kept for layer in self.layers]

    @property
    def by_corpus(self) -> bool:
        """Whether it holds the saliencies of each corpus by itself, in every layer."""
        return all(layer.saliency and ALL_CORPORA not in layer.saliency for layer in self.layers)

    def mask(self, num_experts: int) -> NDArray[np.bool_]:
        """True where an expert is kept, ``[layer, expert]``."""
        mask = np.zeros((len(self.layers), num_experts), dtype=bool)
        for row, layer in zip(mask, self.layers, strict=True):
            row[layer.kept] = True
        return mask


def _remedy(text: str) -> str:
    return f". Make it again; one changed on purpose must not have the entry `{SEAL}`" if f'"{SEAL}"' in text else ""


def kept_hash(plan: Plan) -> str:
    """Hash of the kept sets alone: plans that keep the same experts leave the same checkpoint."""
    kept = [[layer.decoder_layer, layer.kept] for layer in plan.layers]
    return hashlib.sha256(canonical_json(kept).encode()).hexdigest()


def check_plan(plan: Plan, structure: Structure, *, other_weights: bool = False) -> None:
    """Refuse a plan that does not fit a model.

    A quantised checkpoint is checked by its topology alone: its plan comes from the original that it was made from.

    Args:
        plan: by `plan` or by hand.
        structure: the checkpoint to be pruned.
        other_weights: accept a plan that was made on other weights of the same shape (a fine-tuned sibling).

    Raises:
        InputError: other layers, ids out of range, unequal counts, fewer than top-k, or made for another model.
    """
    topology, name = structure.topology, structure.checkpoint.name
    if plan.topology_fingerprint not in (None, topology.fingerprint):
        raise InputError(
            f"the plan was made for another model ({plan.model}), not for {name}: their topologies differ. Make a "
            "profile and a plan of this one"
        )
    layers = tuple(layer.decoder_layer for layer in plan.layers)
    if layers != topology.decoder_layers:
        raise InputError(
            f"the plan has decoder layers {_short(layers)}, {name} has its MoE layers at "
            f"{_short(topology.decoder_layers)}"
        )
    for layer in plan.layers:
        _check_layer(layer, plan.keep, topology)
    resolve_keep(topology, keep=plan.keep, retain=None)
    if (
        structure.quantised is None
        and not other_weights
        and plan.model_fingerprint not in (None, structure.model_fingerprint)
    ):
        raise InputError(
            f"the plan was made for another model ({plan.model}) of the same shape as {name}: the routers differ. Make "
            f"a plan of this one, or give {arg('other_weights')} if it is a sibling of that model"
        )


def _check_layer(layer: LayerPlan, keep: int, topology: Topology) -> None:
    """Refuse a layer that keeps another number of experts, or ones that do not exist."""
    where = f"the plan's decoder layer {layer.decoder_layer}"
    if len(layer.kept) != keep:
        raise InputError(
            f"{where} keeps {len(layer.kept)} experts, `keep` is {keep}. Every layer must keep the same number: stock "
            "loaders and servers read one"
        )
    if layer.kept[-1] >= topology.num_experts:
        raise InputError(f"{where} keeps expert {layer.kept[-1]}. Allowed: 0 to {topology.num_experts - 1}")
    if wrong := [corpus for corpus, values in layer.saliency.items() if len(values) != topology.num_experts]:
        raise InputError(
            f"{where} has {len(layer.saliency[wrong[0]])} values of {wrong[0]}, the model has {topology.num_experts} "
            "experts. Make the plan again"
        )
    size = topology.num_experts // topology.num_groups
    counts = np.bincount([e // size for e in layer.kept], minlength=topology.num_groups)
    if counts.min() < counts.max():
        raise InputError(
            f"{where} keeps {', '.join(map(str, counts))} experts of the router's groups. Every group must keep the "
            "same number"
        )


def _short(values: tuple[int, ...]) -> str:
    text = ", ".join(map(str, values))
    return text if len(text) < 60 else f"{text[:40]} ... ({len(values)} in all)"


def keep_all(topology: Topology) -> Plan:
    """The plan that removes nothing."""
    experts = list(range(topology.num_experts))
    layers = [LayerPlan(decoder_layer=d, kept=experts.copy()) for d in topology.decoder_layers]
    return Plan(schema=1, method="keep all", keep=len(experts), layers=layers)
