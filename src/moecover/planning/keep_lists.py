"""Lists of kept or pruned experts as other tools write them: the table of their formats.

A format takes the value of a file apart, unchecked (`list_files` checks it), and makes the text of a file from what a
plan keeps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from moecover.checkpoints.topology import Topology
from moecover.errors import arg
from moecover.registry import unknown_name

Holds = Literal["kept", "pruned", "ranking", "mask"]
Entries = list[tuple[object, object]]  # layer and list as the file has them
LAYER_IN_NAME = re.compile(r"(?:^|\.)(\d{1,6})(?=\.|$)")


@dataclass(frozen=True)
class JsonLines:
    """The values of a file with a JSON value on every line."""

    values: list[object]


@dataclass(frozen=True)
class Sets:
    """What a plan keeps, as far as a list of experts can say it.

    Attributes:
        topology: of the model.
        modules: dotted name of the MoE block of every MoE layer.
        kept: ids of the kept experts of every MoE layer, ascending.
    """

    topology: Topology
    modules: tuple[str, ...]
    kept: list[list[int]]

    @property
    def pruned(self) -> list[list[int]]:
        """Ids of the other experts, ascending."""
        return [sorted(set(range(self.topology.num_experts)) - set(ids)) for ids in self.kept]

    def by_layer(self, lists: Sequence[object]) -> dict[str, object]:
        """A list for every MoE layer, by its decoder layer."""
        return {str(number): ids for number, ids in zip(self.topology.decoder_layers, lists, strict=True)}


@dataclass(frozen=True)
class Format:
    """A format of lists.

    Attributes:
        name: as it is asked for.
        holds: what the ids of a layer are.
        summary: what a file holds, and whose it is.
        fits: whether a file's value can be of this format.
        entries: the layers of such a value and what it has for each, unchecked; raises TypeError, KeyError,
            ValueError or AttributeError where it is of another form.
        text: the file of a plan.
        experts: key under which a file has its model's number of experts; none where it has not.
    """

    name: str
    holds: Holds
    summary: str
    fits: Callable[[object], bool]
    entries: Callable[[object], Entries]
    text: Callable[[Sets], str]
    experts: str | None = None


def _line(value: object) -> str:
    return json.dumps(value) + "\n"


def _lists(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(ids, list) for ids in value.values())


def _numbered(value: object) -> bool:
    return _lists(value) and isinstance(value, dict) and all(str(key).isdecimal() for key in value)


def _named(value: object) -> bool:
    return (
        _lists(value)
        and isinstance(value, dict)
        and all(LAYER_IN_NAME.search(str(key)) for key in value)
        and not (_numbered(value))
    )


def _items(value: object) -> Entries:
    if not isinstance(value, dict):
        raise TypeError
    return list(value.items())


def _by_module(value: object) -> Entries:
    return [(_layer_in(str(name)), ids) for name, ids in _items(value)]


def _layer_in(name: str) -> int:
    found = LAYER_IN_NAME.search(name)
    if found is None:
        raise ValueError(f"{name} names no numbered layer")
    return int(found[1])


def _rows(value: object) -> Entries:
    if not isinstance(value, list):
        raise TypeError
    return list(enumerate(value))


def _of_lines(value: object) -> Entries:
    lines = value.values if isinstance(value, JsonLines) else [value]
    return [entry for line in lines for entry in _items(line)]


def _by_pairs(value: object) -> Entries:
    """Lists by layer from ``[layer, expert]`` pairs."""
    content, found = dict(_items(value)), dict[object, list[object]]()
    if content.get("version") != 1:
        raise ValueError(f"version {str(content.get('version'))[:20]}, 1 is known")
    for _, pair in _rows(content["pruned_experts"]):
        layer, expert = (one for _, one in _rows(pair))
        found.setdefault(layer, []).append(expert)
    return list(found.items())


def _in_selection(value: object) -> Entries:
    content = dict(_items(value))
    entries = _items(content["layers"])
    if any(len(_rows(ids)) != content["retained_experts"] for _, ids in entries):
        raise ValueError("retained_experts is not the number of ids of every layer")
    return entries


def _ranking(sets: Sets) -> str:
    orders = ([*kept, *rest] for kept, rest in zip(sets.kept, sets.pruned, strict=True))
    return "".join(_line({str(n): order}) for n, order in zip(sets.topology.decoder_layers, orders, strict=True))


def _pairs(sets: Sets) -> str:
    layers = zip(sets.topology.decoder_layers, sets.pruned, strict=True)
    return _line({"version": 1, "pruned_experts": [[number, e] for number, ids in layers for e in ids]})


def _mask(sets: Sets) -> str:
    experts = range(sets.topology.num_experts)
    return _line([[float(e in ids) for e in experts] for ids in map(set, sets.kept)])


def _selection(sets: Sets) -> str:
    counts = {"source_experts": sets.topology.num_experts, "retained_experts": len(sets.kept[0])}
    return _line({**counts, "layers": sets.by_layer(sets.kept)})


FORMATS = {
    row.name: row
    for row in (
        Format(
            "kept",
            "kept",
            "`{layer: [kept ids]}`",
            _numbered,
            _items,
            lambda sets: _line(sets.by_layer(sets.kept)),
        ),
        Format(
            "pruned",
            "pruned",
            "`{decoder layer: [pruned ids]}`: pruned_experts.json of EvoESAP and AIMER",
            _numbered,
            _items,
            lambda sets: _line(sets.by_layer(sets.pruned)),
        ),
        Format(
            "hope",
            "pruned",
            "`{index among the MoE layers: [pruned ids]}`: the prune set of HOPE and of its baselines",
            _numbered,
            _items,
            lambda sets: _line({str(layer): ids for layer, ids in enumerate(sets.pruned)}),
        ),
        Format(
            "llm-compressor",
            "kept",
            "`{module name: [kept ids]}`: the report of llm-compressor's pruning; its keys are known at second hand "
            "only, so that every name with a layer's number in it is read",
            _named,
            _by_module,
            lambda sets: _line(dict(zip(sets.modules, sets.kept, strict=True))),
        ),
        Format(
            "vllm-ascend",
            "ranking",
            "JSON lines `{decoder layer: [all ids, best first]}`: `expert_list_file` of vllm-ascend; how many stay is "
            "said beside it",
            lambda value: isinstance(value, JsonLines),
            _of_lines,
            _ranking,
        ),
        Format(
            "vllm-profile",
            "pruned",
            '`{"version": 1, "pruned_experts": [[decoder layer, expert], ...]}`: the pruning profile proposed for vLLM',
            lambda value: isinstance(value, dict) and "pruned_experts" in value,
            _by_pairs,
            _pairs,
        ),
        Format(
            "easy-ep",
            "mask",
            "`[[1.0, 0.0, ...], ...]`, a row for every MoE layer, 1 for a kept expert: the mask of EASY-EP",
            lambda value: isinstance(value, list) and bool(value) and all(isinstance(row, list) for row in value),
            _rows,
            _mask,
        ),
        Format(
            "selection",
            "kept",
            '`{"source_experts": E, "retained_experts": K, "layers": {decoder layer: [kept ids]}}`',
            lambda value: isinstance(value, dict) and "retained_experts" in value and "layers" in value,
            _in_selection,
            _selection,
            experts="source_experts",
        ),
    )
}


def format_named(name: str, argument: str) -> Format:
    """A format by name.

    Args:
        name: of the format.
        argument: that gave it, for messages.

    Raises:
        InputError: there is none of that name.
    """
    if name not in FORMATS:
        raise unknown_name(f"format in {arg(argument)}", name, FORMATS)
    return FORMATS[name]
