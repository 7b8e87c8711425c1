"""Layouts that were derived before: one file each in the user's cache folder, so that reading one again needs no torch.

A layout is only ever derived from the model class. The result is stored under a hash of everything that it depends on:
config.json, the name, type and shape of every tensor, the source of this package, and the installed transformers. How a
tensor depends on the experts follows from the kind of its name, and only this rule is written; a layout that the rules
do not reproduce exactly is not stored. A file that is damaged or does not fit the headers is ignored, as is a folder
that cannot be written.

``MOECOVER_CACHE`` moves the folder, or turns the cache off (``off``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from importlib import metadata, util
from pathlib import Path
from typing import Any, TypedDict

from moecover.checkpoints.config_edit import expert_count_keys, number_paths
from moecover.checkpoints.id_tables import IDS
from moecover.checkpoints.names import OTHER_PARTS, expert_number, kind_of, layer_number, mtp_root
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.tensor_checks import check_rows
from moecover.checkpoints.topology import ExpertLayout, ExpertTensor, ExpertTensors, IdTable, Topology, Width
from moecover.errors import MoecoverError
from moecover.files.atomic import canonical_json, write_text
from moecover.files.reading import parse_json

VARIABLE, OFF = "MOECOVER_CACHE", "off"
MAX_FILES, MAX_BYTES = 64, 500_000
PACKAGE = Path(__file__).parents[1]

Rule = tuple[int | None, bool, int]  # axis, routed and tail of an `ExpertTensor`


class Stored(TypedDict):
    """What is written of a layout."""

    topology: dict[str, object]
    parameters: dict[str, int]
    modules: list[str]
    rules: dict[str, Rule | None]
    mtp: list[str]
    mtp_rules: dict[str, Rule | None]
    width: dict[str, Any] | str
    tables: dict[str, tuple[int, str]]  # by name: layer and parameter of an `IdTable`


class _MisfitError(ValueError):
    """A stored layout does not fit the checkpoint."""


# -------------------------------------------------------------------------------------------------------------- place
def _folder() -> Path | None:
    """The folder of the files; None if the user wants none, or has no home folder."""
    if given := os.environ.get(VARIABLE):
        return None if given == OFF else Path(given) / "structures"
    base = os.environ.get("XDG_CACHE_HOME", "")  # by its specification only an absolute path counts
    with contextlib.suppress(RuntimeError):
        folder = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
        return folder / "moecover" / "structures"
    return None


def source_hash(package: Path = PACKAGE) -> str:
    """Hash of the Python files of a folder, this package's own by default."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def installed_version(package: str) -> str:
    """Version of an installed package and hash of its list of files, which has their hashes; it is not imported.

    Raises:
        ImportError: there is none, or another copy than the listed one would be imported (a checkout of its source).
    """
    found, spec, file = metadata.distribution(package), util.find_spec(package), f"{package}/__init__.py"
    record = found.read_text("RECORD") or ""
    if f"{file}," not in record or spec is None or spec.origin is None:
        raise ImportError(package)
    if not Path(os.fspath(found.locate_file(file))).samefile(spec.origin):  # type: ignore[call-overload]  # a path
        raise ImportError(package)
    return f"{found.version} {hashlib.sha256(record.encode()).hexdigest()}"


def place_of(checkpoint: Checkpoint) -> Path | None:
    """The file for a checkpoint's layout; None if nothing is to be cached.

    This is so if transformers is loaded: its user may have registered classes of their own.
    """
    folder = _folder()
    if folder is None or "transformers" in sys.modules:
        return None
    try:
        code = [source_hash(), installed_version("transformers"), metadata.version("torch")]
    except (ImportError, OSError):
        return None
    tensors = sorted((e.name, e.dtype, e.shape) for e in checkpoint.tensors.values())
    key = json.dumps([code, checkpoint.config, checkpoint.declared_quantisation, tensors])
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


# -------------------------------------------------------------------------------------------------------------- files
def recall(checkpoint: Checkpoint, place: Path) -> ExpertLayout | None:
    """Read the layout that is stored at a place; None if there is none that fits the checkpoint."""
    try:
        with place.open("rb") as file:
            mine, text = os.fstat(file.fileno()).st_uid == os.getuid(), file.read(MAX_BYTES)
        content = parse_json(text)
        if not mine or content["sha256"] != content_hash(place, content["structure"]):
            return None
        return _restored(checkpoint, content["structure"])
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def remember(checkpoint: Checkpoint, layout: ExpertLayout, place: Path) -> None:
    """Store a layout at a place if possible; the oldest files are deleted to make room."""
    try:
        stored = _stored(layout)
        again = _restored(checkpoint, json.loads(json.dumps(stored)))
        text = json.dumps({"sha256": content_hash(place, stored), "structure": stored}, indent=1)
        same_order = list(again.tensors.experts) == list(layout.tensors.experts)
        if again != layout or not same_order or len(text) >= MAX_BYTES:
            return
        write_text(place, text)
        for _, old in sorted(((f.stat().st_mtime_ns, f) for f in place.parent.iterdir()), reverse=True)[MAX_FILES:]:
            old.unlink(missing_ok=True)
    except (OSError, ValueError, MoecoverError):
        return


def content_hash(place: Path, stored: object) -> str:
    """Hash of what is stored at a place."""
    return hashlib.sha256(f"{place.stem} {canonical_json(stored)}".encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------- contents
def _rules(rows: Iterable[tuple[str, ExpertTensor | None]]) -> dict[str, Rule | None]:
    return {kind_of(name): (row.axis, row.routed, row.tail) if row else None for name, row in rows}


def _stored(layout: ExpertLayout) -> Stored:
    """What is written of a layout: a tensor's layer and expert follow from its name, the rest from its kind."""
    num_layers, tensors = layout.topology.num_layers, layout.tensors
    return {
        "topology": layout.topology.to_json(),
        "parameters": layout.parameters,
        "modules": list(layout.modules),
        "rules": _rules(tensors.experts.items()),
        "mtp": sorted({str(mtp_root(name, num_layers)) for name in tensors.mtp}),
        "mtp_rules": _rules(tensors.mtp.items()),
        "width": layout.width if isinstance(layout.width, str) else layout.width.to_json(),
        "tables": {name: (table.layer, table.parameter) for name, table in layout.tables.items()},
    }


def _restored(checkpoint: Checkpoint, stored: Stored) -> ExpertLayout:
    """The stored layout, after its parts were checked against the configuration, the headers and each other.

    Raises:
        ValueError: they do not fit; other errors of Python's if they have another form.
    """
    topology, modules = Topology.from_json(stored["topology"]), tuple(stored["modules"])
    parameters = stored["parameters"]
    numbers = [
        *topology.decoder_layers,
        *(v for k, v in stored["topology"].items() if k not in ("family", "decoder_layers")),
    ]
    _require(all(type(n) is int and n >= 0 for n in [*numbers, *parameters.values()]))
    _require(topology.family == checkpoint.config["model_type"])
    _require(set(expert_count_keys(checkpoint.config).values()) == {topology.num_experts})
    _require(0 < topology.top_k <= topology.num_experts)
    _require(topology.num_groups > 0 and topology.num_experts % topology.num_groups == 0)
    _require(tuple(layer_number(module) for module in modules) == topology.decoder_layers != ())
    _require(set(map(layer_number, parameters)) == set(topology.decoder_layers))
    _require(set(modules) <= {name.rpartition(".")[0] for name in parameters})
    tensors = _tensors(checkpoint, topology, modules, stored)
    tables = _tables(checkpoint, topology, stored)
    return ExpertLayout(topology, tensors, parameters, modules, _width(checkpoint, tensors, stored), tables)


def _tables(checkpoint: Checkpoint, topology: Topology, stored: Stored) -> dict[str, IdTable]:
    """The stored tables of experts by token id: in MoE layers, with a column for every expert of a token."""
    tables = {name: IdTable(layer, parameter) for name, (layer, parameter) in stored["tables"].items()}
    for name, table in tables.items():
        number = topology.decoder_layers[table.layer]
        _require(layer_number(name) == layer_number(table.parameter) == number and table.layer >= 0)
        _require(checkpoint.tensors[name].shape[1:] == (topology.top_k,) and checkpoint.tensors[name].dtype in IDS)
    return tables


def _width(checkpoint: Checkpoint, tensors: ExpertTensors, stored: Stored) -> Width | str:
    """The stored width, whose axes fit the shapes in the headers."""
    if isinstance(stored["width"], str):
        return stored["width"]
    width, numbers = Width.from_json(stored["width"]), number_paths(checkpoint.config)
    _require(all(numbers.get(key) == width.channels for key in width.keys) and width.keys != ())
    _require(all(numbers.get(key) == width.shared for key in width.shared_keys))
    for name, entry in checkpoint.tensors.items():
        routed = name in tensors.experts
        axis = (width.tensors if routed else width.shared_tensors).get(kind_of(name))
        if axis is not None:
            length = width.channels * (axis.parts if routed else width.shared)
            _require(0 <= axis.axis < len(entry.shape) and entry.shape[axis.axis] == length)
    return width


def _tensors(checkpoint: Checkpoint, topology: Topology, modules: tuple[str, ...], stored: Stored) -> ExpertTensors:
    """The row of every tensor that depends on the experts, by the rule of its kind."""
    rules, mtp_rules, roots = stored["rules"], stored["mtp_rules"], set(stored["mtp"])
    layer_of = {number: layer for layer, number in enumerate(topology.decoder_layers)}
    found, mtp = dict[str, ExpertTensor](), dict[str, ExpertTensor | None]()
    for name in checkpoint.tensors:
        kind = kind_of(name)
        if roots and mtp_root(name, topology.num_layers) in roots:
            rule = mtp_rules[kind]
            _require(rule is not None or expert_number(name) is None)
            mtp[name] = _row(checkpoint, topology, name, rule, len(layer_of) - 1) if rule else None
        elif kind in rules and (layer := layer_of.get(layer_number(name))) is not None:
            found[name] = _row(checkpoint, topology, name, rules[kind], layer)
        else:
            _require(expert_number(name) is None or OTHER_PARTS.search(name) is not None)
    for routed in (True, False):
        _require({row.layer for row in found.values() if row.routed == routed} == set(layer_of.values()))
    quantised = check_rows(checkpoint, found, modules, topology.num_experts)
    return ExpertTensors(found, {name: mtp[name] for name in sorted(mtp)}, quantised)


def _row(checkpoint: Checkpoint, topology: Topology, name: str, rule: Rule | None, layer: int) -> ExpertTensor:
    """The row of one tensor."""
    if rule is None:
        raise _MisfitError
    axis, routed, tail = rule
    expert = expert_number(name)
    _require(type(routed) is bool and type(tail) is int and tail >= 0 and (axis is None) == (expert is not None))
    if axis is not None:
        _require(type(axis) is int and axis >= 0)
        _require(checkpoint.tensors[name].shape[axis] == topology.num_experts + tail)
    return ExpertTensor(layer, expert, axis, routed, tail)


def _require(condition: bool) -> None:
    if not condition:
        raise _MisfitError
