"""Stage 3b, plan: reads a profile, writes which experts of every layer are kept, and why.

Pure arithmetic on the profile: no model and no forward pass, so one profile serves every method and every budget.
A new method is one decorated function from a profile, a count and options to a choice per layer. The same profile and
options give the same bytes.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moecover.errors import InputError
from moecover.files import write_text
from moecover.profiling import Profile
from moecover.registry import Registry
from moecover.saliency import SALIENCIES
from moecover.topology import Structure, Topology, resolve_keep

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEFAULT_METHOD, DEFAULT_SALIENCY, DEFAULT_PROTECT = "tb-coverage", "contribution", 0.5


class LayerPlan(BaseModel):
    """The kept experts of one MoE layer.

    Attributes:
        decoder_layer: index among all decoder layers, dense ones included.
        kept: ids of the kept experts, ascending; their positions are the new ids.
        protected: by corpus, the experts that it protected, in the order of its turns.
        filled: the other kept experts, best first.
        saliency: by corpus (``pooled`` for all as one), the saliency of every expert.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    decoder_layer: int
    kept: list[int] = Field(min_length=1)
    protected: dict[str, list[int]] = Field(default_factory=dict)
    filled: list[int] = Field(default_factory=list)
    saliency: dict[str, list[float]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _kept_is_a_set(self) -> LayerPlan:
        if len(set(self.kept)) < len(self.kept) or min(self.kept) < 0:
            raise ValueError(f"decoder layer {self.decoder_layer}: `kept` must hold different ids from 0 on")
        self.kept.sort()
        return self


class Plan(BaseModel):
    """Which experts remain. Written by `plan`, or by hand: only ``keep`` and ``layers`` are needed then.

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

    def to_json(self) -> str:
        """The text of plan.json; the same plan gives the same bytes."""
        value = self.model_dump(by_alias=True)
        layers = value.pop("layers")
        head = json.dumps(value, indent=1)[: -len("\n}")]
        rows = ",\n".join(f"  {json.dumps(layer, allow_nan=False)}" for layer in layers)
        return f'{head},\n "layers": [\n{rows}\n ]\n}}\n'

    def save(self, path: str | Path) -> Path:
        """Write plan.json; the file appears only when complete."""
        write_text(Path(path), self.to_json())
        return Path(path)

    @classmethod
    def from_json(cls, text: str, *, name: str = "the plan") -> Plan:
        """Parse a plan.

        Raises:
            InputError: not JSON, or not a plan; says where.
        """
        try:
            value = json.loads(text)
        except ValueError as error:
            raise InputError(f"{name} is not JSON: {error}") from error
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

    def mask(self, num_experts: int) -> NDArray[np.bool_]:
        """True where an expert is kept, ``[layer, expert]``."""
        mask = np.zeros((len(self.layers), num_experts), dtype=bool)
        for row, layer in zip(mask, self.layers, strict=True):
            row[layer.kept] = True
        return mask


def check_plan(plan: Plan, structure: Structure, *, other_weights: bool = False) -> None:
    """Refuse a plan that does not fit a model.

    Args:
        plan: by `plan` or by hand.
        structure: the checkpoint to be cut.
        other_weights: accept a plan that was made on other weights of the same shape (a fine-tuned sibling).

    Raises:
        InputError: other layers, ids out of range, unequal counts, fewer than top-k, or made for another model.
    """
    topology, name = structure.topology, structure.checkpoint.name
    if plan.topology_fingerprint not in (None, topology.fingerprint):
        raise InputError(f"the plan was made for another model ({plan.model}), not for {name}: their topologies differ. Make a profile and a plan of this one")  # fmt: skip
    layers = tuple(layer.decoder_layer for layer in plan.layers)
    if layers != topology.decoder_layers:
        raise InputError(f"the plan has decoder layers {_short(layers)}, {name} has its MoE layers at {_short(topology.decoder_layers)}")  # fmt: skip
    for layer in plan.layers:
        where = f"the plan's decoder layer {layer.decoder_layer}"
        if len(layer.kept) != plan.keep:
            raise InputError(f"{where} keeps {len(layer.kept)} experts, `keep` is {plan.keep}. Every layer must keep the same number: stock loaders and servers read one")  # fmt: skip
        if layer.kept[-1] >= topology.num_experts:
            raise InputError(f"{where} keeps expert {layer.kept[-1]}. Allowed: 0 to {topology.num_experts - 1}")
    resolve_keep(topology, keep=plan.keep, retain=None)
    if not other_weights and plan.model_fingerprint not in (None, structure.model_fingerprint):
        raise InputError(f"the plan was made for another model ({plan.model}) of the same shape as {name}: the routers differ. Make a plan of this one, or give --other-weights if it is a sibling of that model")  # fmt: skip


def _short(values: tuple[int, ...]) -> str:
    text = ", ".join(map(str, values))
    return text if len(text) < 60 else f"{text[:40]} ... ({len(values)} in all)"


# ------------------------------------------------------------------------------------------------------------ methods
Method = Callable[..., list[LayerPlan]]
METHODS: Registry[Callable[..., Any]] = Registry("method")


def ranked(utility: NDArray[Any]) -> NDArray[np.int64]:
    """Expert ids from the highest utility to the lowest, ties by the lower id; ``utility`` is ``[..., expert]``."""
    return np.argsort(-utility, axis=-1, kind="stable")


def _saliency_lists(saliency: Mapping[str, NDArray[Any]], layer: int) -> dict[str, list[float]]:
    return {corpus: values[layer].tolist() for corpus, values in saliency.items()}


def cover(utility: NDArray[np.float64], keep: int, protect: float) -> tuple[list[list[int]], list[int]]:
    """TB-Coverage in one layer.

    Every corpus's utilities are scaled to sum 1. Corpora take turns, in their order, each protecting its best expert
    that is not protected yet, until ``round(protect * keep)`` are; the rest is filled by the mean scaled utility.
    Ties go to the lower id. With C corpora each one's ``floor(P / C)`` best experts are kept.

    Args:
        utility: non-negative, ``[corpus, expert]``.
        keep: experts to keep.
        protect: share of ``keep`` that is protected, in [0, 1].

    Returns:
        The protected experts by corpus, in the order of the turns, and the filled ones, best first.
    """
    totals = utility.sum(axis=1, keepdims=True)
    scaled = np.divide(utility, totals, out=np.zeros_like(utility), where=totals > 0)
    orders = [iter(order.tolist()) for order in ranked(scaled)]
    protected: list[list[int]] = [[] for _ in orders]
    chosen: set[int] = set()
    turns = int(protect * keep + 0.5)
    for turn in range(turns):
        corpus = turn % len(orders)
        expert = next(e for e in orders[corpus] if e not in chosen)
        protected[corpus].append(expert)
        chosen.add(expert)
    rest = [e for e in ranked(scaled.mean(axis=0)).tolist() if e not in chosen]
    return protected, rest[: keep - turns]


@METHODS("tb-coverage", paper="arXiv 2607.01710")
def tb_coverage(
    profile: Profile, keep: int, *, saliency: str = DEFAULT_SALIENCY, protect: float = DEFAULT_PROTECT
) -> list[LayerPlan]:
    """Corpora take turns protecting their best experts, the mean utility fills the rest.

    Args:
        profile: statistics of every corpus.
        keep: experts to keep per layer.
        saliency: name in `SALIENCIES`, computed on every corpus by itself.
        protect: share of ``keep`` that is protected, in [0, 1].
    """
    utility = {corpus: SALIENCIES[saliency](s) for corpus, s in profile.statistics.items()}
    plans = []
    for layer, decoder_layer in enumerate(profile.topology.decoder_layers):
        protected, filled = cover(np.stack([u[layer] for u in utility.values()]), keep, protect)
        plans.append(
            LayerPlan(
                decoder_layer=decoder_layer,
                kept=sorted([*(e for row in protected for e in row), *filled]),
                protected=dict(zip(utility, protected, strict=True)),
                filled=filled,
                saliency=_saliency_lists(utility, layer),
            )
        )
    return plans


@METHODS("pooled", paper="arXiv 2510.13999 with --saliency reap")
def pooled(profile: Profile, keep: int, *, saliency: str = DEFAULT_SALIENCY) -> list[LayerPlan]:
    """The best of one saliency over all corpora taken as one text."""
    utility = {"pooled": SALIENCIES[saliency](profile.pooled())}
    best = ranked(utility["pooled"])[:, :keep].tolist()
    return [
        LayerPlan(decoder_layer=d, kept=sorted(best[i]), filled=best[i], saliency=_saliency_lists(utility, i))
        for i, d in enumerate(profile.topology.decoder_layers)
    ]


@METHODS("random", paper="baseline")
def random(profile: Profile, keep: int, *, seed: int = 0) -> list[LayerPlan]:
    """A seeded choice, other in every layer."""
    rng = np.random.default_rng(seed)
    return [
        LayerPlan(decoder_layer=d, kept=sorted(kept), filled=kept)
        for d in profile.topology.decoder_layers
        for kept in [rng.permutation(profile.topology.num_experts)[:keep].tolist()]
    ]


def check_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options with its defaults filled in.

    Raises:
        InputError: unknown method or saliency, an option that the method does not have, or one out of range.
    """
    parameters = inspect.signature(METHODS[method]).parameters
    known = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    if unknown := [name for name in options if name not in known]:
        raise InputError(f"--{unknown[0]} is no option of method {method}. It has: {', '.join(f'--{k}' for k in known) or 'none'}")  # fmt: skip
    complete = {**known, **options}
    if "saliency" in complete:
        SALIENCIES[complete["saliency"]]
    if "protect" in complete and not 0 <= complete["protect"] <= 1:
        raise InputError(f"--protect {complete['protect']} is out of range: a share of the kept experts, from 0 to 1")
    return complete


def plan(
    profile: Profile,
    *,
    method: str = DEFAULT_METHOD,
    keep: int | None = None,
    retain: float | None = None,
    **options: Any,
) -> Plan:
    """A plan from a profile.

    Args:
        profile: from `profile` or `Profile.load`.
        method: name in `METHODS`.
        keep: experts to keep per layer; give this or ``retain``.
        retain: fraction to keep, in (0, 1].
        **options: options of the method (``saliency``, ``protect``, ``seed``); the defaults are filled in.

    Raises:
        InputError: unknown method or saliency, an option that the method does not have, or a budget out of range.
    """
    complete = check_options(method, options)
    count = resolve_keep(profile.topology, keep=keep, retain=retain)
    return Plan(
        schema=1,
        method=method,
        options=complete,
        keep=count,
        layers=METHODS[method](profile, count, **complete),
        topology_fingerprint=profile.topology.fingerprint,
        model_fingerprint=profile.model["fingerprint"],
        profile_fingerprint=profile.fingerprint,
        model=profile.model["name"],
    )


def keep_all(topology: Topology) -> Plan:
    """The plan that removes nothing."""
    experts = list(range(topology.num_experts))
    layers = [LayerPlan(decoder_layer=d, kept=experts.copy()) for d in topology.decoder_layers]
    return Plan(schema=1, method="keep all", keep=len(experts), layers=layers)
