"""Variants: the ways to choose experts that a configuration asks for, without budget and seed, and their labels."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from moecover.comparison.config import UNMERGED, UNREPAIRED, MethodEntry
from moecover.comparison.reading import Request
from moecover.errors import InputError
from moecover.merging.methods import merge_of
from moecover.planning.methods import METHODS

SUPER_EXPERTS, CHANNELS = "protect_super_experts", "protect_channels"
OF_EVERY_METHOD = (SUPER_EXPERTS, CHANNELS)  # options of plans, none of a method's own


@dataclass(frozen=True)
class Variant:
    """One way to choose experts, and the merge and repair of those that stay: without budget and seed.

    Attributes:
        method: name in `METHODS`.
        saliency: its saliency, None for a method that takes none.
        options: the method's other options, and `OF_EVERY_METHOD`.
        seeds: one plan each; empty for a deterministic method.
        label: name in tables and figures.
        blind: it uses no statistics, no merge, no repair and no skipping rule, so it needs no calibration text.
        searches: it needs the live model and a sample of the inputs of its MoE layers.
        repair: of the experts that stay, see `repairing.solver.KINDS`, or ``none``.
        merge: of the others into these, see `MERGES`, or ``none``.
        top_k: experts per token; None for the model's own number.
        skip: tokens skip experts, see `evaluation.skipping`.
    """

    method: str
    saliency: str | None
    options: dict[str, object]
    seeds: tuple[int, ...]
    label: str
    blind: bool
    searches: bool
    repair: str = UNREPAIRED
    merge: str = UNMERGED
    top_k: int | None = None
    skip: bool = False

    def plan_options(self, seed: int | None) -> dict[str, object]:
        """The options of `plan_budgets`: those of the method with the saliency and a seed, where it takes them."""
        options = dict(self.options)
        if self.saliency is not None:
            options["saliency"] = self.saliency
        if seed is not None:
            options["seed"] = seed
        return options


def label_of(method: str, saliency: str | None, options: Mapping[str, object]) -> str:
    """The default label of a variant: ``TB-Coverage (contribution)``, ``REAP``, ``ExpertSparsity``, ``random``."""
    published = saliency is not None and saliency in METHODS[method].published
    inside = [saliency] if saliency and not published else []
    inside += [f"{k.replace('_', ' ')} {v}" if v is not True else k.replace("_", " ") for k, v in options.items()]
    name = METHODS.label(method, saliency)
    return f"{name} ({', '.join(inside)})" if inside else name


def variants(request: Request) -> list[Variant]:
    """The variants of a configuration, in its order.

    Raises:
        InputError: unknown method or saliency, an option that the method does not have, or two variants of one label.
    """
    found: list[Variant] = []
    for number, entry in enumerate(request.config.methods):
        try:
            found += _of_entry(request, entry)
        except InputError as error:
            raise request.error(error, "methods", number) from error
        slugs = [slug(v.label) for v in found]
        if repeated := [v.label for i, v in enumerate(found) if slugs[i] in slugs[:i]]:
            text = f"two methods are called {repeated[0]}. Give one of them another label"
            raise request.error(text, "methods", number)
    return found


def _of_entry(request: Request, entry: MethodEntry) -> list[Variant]:
    """The variants of one method: by saliency, merge and repair; without these also with fewer experts per token.

    Fewer are those of `Config.top_ks`, and those that a skipping rule leaves.
    """
    config, found = request.config, list[Variant]()
    method, given = METHODS[entry.method], dict[str, object](entry.model_extra or {})
    takes_saliency = method.has("saliency")
    if entry.saliency and not takes_saliency:
        raise InputError(f"method {entry.method} has no saliency")
    if entry.seeds and not method.seeded:
        raise InputError(f"method {entry.method} is deterministic: it has no seeds")
    shapes = config.shapes or ()
    if entry.protect_channels and not any(re.fullmatch(r"\d+x\d+", shape) for shape in shapes):
        raise InputError("protect_channels has no use here: no entry of `shapes` has channels (30x704)")
    saliencies: list[str | None] = [*(entry.saliency or config.saliencies)] if takes_saliency else [None]
    blind = method.blind and not entry.protect_super_experts
    seeds = tuple(entry.seeds or config.seeds) if method.seeded else ()
    for saliency in saliencies:
        method.complete(given | ({"saliency": saliency} if takes_saliency else {}))
        options = given | ({SUPER_EXPERTS: True} if entry.protect_super_experts else {})
        options |= {CHANNELS: entry.protect_channels} if entry.protect_channels else {}
        label = entry.label or label_of(entry.method, saliency, options)
        if entry.label and len(entry.saliency or [0]) > 1:
            label = f"{label} ({saliency})"
        changes = itertools.product(entry.merge or config.merges, entry.repair or config.repairs)
        fewer: list[tuple[int | None, bool]] = [(top_k, False) for top_k in config.top_ks]
        fewer += [(None, True)] if config.skip else []
        for (merge, repair), (top_k, skip) in [
            *((both, (None, False)) for both in changes),
            *(((UNMERGED, UNREPAIRED), one) for one in fewer),
        ]:
            more = [one.label] if (one := merge_of(merge)) is not None else []
            more += [repair] if repair != UNREPAIRED else []
            named = f", top-{top_k}" if top_k else ", skipping" if skip else ""
            found.append(
                Variant(
                    method=entry.method,
                    saliency=saliency,
                    options=options,
                    seeds=seeds,
                    label=" + ".join([label, *more]) + named,
                    blind=blind and not more and not skip,
                    searches=method.runs_experts,
                    repair=repair,
                    merge=merge,
                    top_k=top_k,
                    skip=skip,
                )
            )
    return found


def slug(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-").lower()
