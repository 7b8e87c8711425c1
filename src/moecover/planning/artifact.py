"""The artefact of planning: what a plan holds, and its file plan.json."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from moecover.checkpoints.topology import Topology
from moecover.corpora.sources import ALL_CORPORA
from moecover.errors import InputError
from moecover.files.atomic import canonical_json, write_text
from moecover.files.hashing import SEAL, sealed, unsealed
from moecover.files.reading import parse_json
from moecover.planning.channel_sets import packed, unpacked
from moecover.text import Cell, Shown

if TYPE_CHECKING:
    from numpy.typing import NDArray


class LayerPlan(BaseModel):
    """The kept experts of one MoE layer.

    Attributes:
        decoder_layer: index among all decoder layers, dense ones included.
        kept: ids of the kept experts, ascending; their positions are the new ids.
        channels: of each of these, the ids of the kept channels, ascending; empty where all stay. In the file a set of
            ids may be hexadecimal digits, see `channel_sets`.
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
    channels: list[Annotated[list[int], BeforeValidator(unpacked)]] = Field(default_factory=list)
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
        if self.channels and self.kept != sorted(self.kept):
            raise ValueError(f"decoder layer {self.decoder_layer}: `kept` must be ascending where `channels` is given")
        if any(sorted(set(ids)) != ids or ids[:1] < [0] for ids in self.channels):
            raise ValueError(
                f"decoder layer {self.decoder_layer}: `channels` must hold different ids, ascending from 0"
            )
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
        keep: experts kept in every layer; where counts are ``unequal``, their mean over the layers.
        unequal: layers keep different numbers: such a plan can be evaluated, and no checkpoint can be written by it.
        width: channels kept of each of them; None for all.
        top_k: experts that a token is sent to; None for the model's own number.
        layers: one entry for every MoE layer, in order.
        mtp: one for every multi-token-prediction layer, numbered on from the decoder layers, where the profile has
            statistics of these; without, they share the ids of the last MoE layer.
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
    unequal: bool = False
    width: int | None = None
    top_k: int | None = None
    layers: list[LayerPlan] = Field(min_length=1)
    mtp: list[LayerPlan] = Field(default_factory=list)
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
        if self.unequal and sum(len(layer.kept) for layer in self.layers) != self.keep * len(self.layers):
            raise ValueError("`keep` is not the mean of the layers' numbers of experts")
        for layer in (*self.layers, *self.mtp):
            if layer.saliency.keys() != first.saliency.keys():
                raise ValueError(f"decoder layer {layer.decoder_layer}: `saliency` is of other corpora than before")
            if {len(v) for v in layer.saliency.values()} != {len(v) for v in first.saliency.values()}:
                raise ValueError(f"decoder layer {layer.decoder_layer}: `saliency` has another length than before")
        return self

    def summary(self) -> str:
        """Method, number of experts and model."""
        model = f" of {self.model}" if self.model else ""
        return f"{self.method}, keep {shape_text(self)} in each of {len(self.layers)} MoE layers{model}"

    def rows_shown(self) -> list[dict[str, Cell]]:
        """One row per MoE layer: the kept ids, and how they came to stay."""
        return [
            {
                "decoder layer": row.decoder_layer,
                "kept": " ".join(map(str, row.kept)),
                **({} if self.width is None else {"channels of each": self.width}),
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
        """What plan.json holds, without the empty parts of a layer and of the plan that need not be there."""
        value = self.model_dump(by_alias=True)
        for name in ("weight_files", "found", "width", "top_k", "unequal", "mtp"):
            if not value[name]:
                del value[name]
        for name in ("layers", "mtp"):
            for row in value.get(name, ()):
                row["channels"] = [packed(ids) for ids in row["channels"]]
            if name in value:
                value[name] = [{k: v for k, v in row.items() if v not in (None, [], {})} for row in value[name]]
        return value

    def to_json(self) -> str:
        """The text of plan.json, sealed; the same plan gives the same bytes."""
        value = sealed(self.to_dict())
        lists: dict[str, Any] = {name: value.pop(name) for name in ("layers", "mtp") if name in value}
        text = json.dumps(value, indent=1)[: -len("\n}")]
        for name, layers in lists.items():
            rows = ",\n".join(f"  {json.dumps(layer, allow_nan=False)}" for layer in layers)
            text += f',\n "{name}": [\n{rows}\n ]'
        return f"{text}\n}}\n"

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
            value = unsealed(parse_json(text, finite=True, unique=True), required=False)
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
    def channels(self) -> list[list[list[int]]] | None:
        """Ids of the kept channels of every kept expert of every MoE layer; None where all stay."""
        return None if self.width is None else [layer.channels for layer in self.layers]

    @property
    def with_mtp(self) -> Plan:
        """The plan with the multi-token-prediction layers behind the others: what a checkpoint that keeps them has."""
        return self.model_copy(update={"layers": [*self.layers, *self.mtp], "mtp": []})

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


def shape_text(plan: Plan) -> str:
    """How many experts a plan keeps, and how many channels of each."""
    thin = "" if plan.width is None else f" of {plan.width} channels"
    mean = " on average" if plan.unequal else ""
    return f"{plan.keep} experts{mean}{thin}" + ("" if plan.top_k is None else f", top-{plan.top_k}")


def kept_sets(plan: Plan) -> list[list[object]]:
    """What a plan keeps, by MoE layer, and nothing of how it was chosen: it determines the checkpoint."""
    return [
        [row.decoder_layer, row.kept, *([[packed(ids) for ids in row.channels]] if row.channels else [])]
        for row in plan.layers
    ]


def kept_hash(plan: Plan) -> str:
    """Hash of the kept sets and the experts per token alone: plans that agree in them leave the same checkpoint."""
    value = kept_sets(plan) if plan.top_k is None else [kept_sets(plan), {"top_k": plan.top_k}]
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def with_top_k(plan: Plan, top_k: int | None) -> Plan:
    """The plan with a number of experts per token; None leaves it as it is."""
    return plan if top_k is None else plan.model_copy(update={"top_k": top_k})


def keep_all(topology: Topology) -> Plan:
    """The plan that removes nothing."""
    experts = list(range(topology.num_experts))
    layers = [LayerPlan(decoder_layer=d, kept=experts.copy()) for d in topology.decoder_layers]
    return Plan(schema=1, method="keep all", keep=len(experts), layers=layers)
