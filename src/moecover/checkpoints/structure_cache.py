"""Structures that were read before: a file for each in the user's cache folder, so that reading one again needs no torch.

The model class stays the only way to a structure. What it said is kept under a hash of everything that it depends on:
config.json, the name, type and shape of every tensor, the source of this package, and the installed transformers. A
tensor's row follows from its kind, which is all that is written; where a structure is not given back exactly by what would
be written, nothing is. What is damaged or does not fit the headers counts as not there, and a folder that cannot be
written as none.

``MOECOVER_CACHE`` moves the folder, or turns all this off (``off``).
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
from typing import Any

from moecover.checkpoints.config_edit import expert_count_keys
from moecover.checkpoints.expert_tensors import (
    OTHER_PARTS,
    ExpertTensor,
    Tensors,
    check_rows,
    expert_number,
    kind_of,
    layer_number,
    mtp_root,
)
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.structure import Structure, assembled, declared
from moecover.checkpoints.topology import Topology
from moecover.errors import MoecoverError
from moecover.files.atomic import canonical_json, write_text

VARIABLE, OFF = "MOECOVER_CACHE", "off"
MOST_FILES, MOST_BYTES = 64, 500_000


class _Unfit(ValueError):
    """What a file says does not fit the checkpoint."""


# -------------------------------------------------------------------------------------------------------------- place
def _folder() -> Path | None:
    """The folder of the files; None where the user wants none, or has no home."""
    if given := os.environ.get(VARIABLE):
        return None if given == OFF else Path(given) / "structures"
    base = os.environ.get("XDG_CACHE_HOME", "")  # by its specification only an absolute path counts
    with contextlib.suppress(RuntimeError):
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "moecover" / "structures"  # noqa: PTH117
    return None


def _sources() -> str:
    """Hash of this package's own code."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _installed(package: str) -> str:
    """Version of an installed package and hash of its list of files with their hashes; it is not imported.

    Raises:
        ImportError: there is none, or what would be imported is not what that list says (a checkout of its source).
    """
    found, spec, file = metadata.distribution(package), util.find_spec(package), f"{package}/__init__.py"
    record = found.read_text("RECORD") or ""
    if f"{file}," not in record or spec is None or not Path(found.locate_file(file)).samefile(spec.origin or ""):  # type: ignore[arg-type]
        raise ImportError(package)
    return f"{found.version} {hashlib.sha256(record.encode()).hexdigest()}"


def place_of(checkpoint: Checkpoint) -> Path | None:
    """The file that holds a checkpoint's structure, or will; None where nothing is to be remembered.

    Nothing is while transformers is loaded: whoever did that may have given it classes of their own.
    """
    folder = _folder()
    if folder is None or "transformers" in sys.modules:
        return None
    try:
        code = [_sources(), _installed("transformers"), metadata.version("torch")]
    except (ImportError, OSError):
        return None
    tensors = sorted((e.name, e.dtype, e.shape) for e in checkpoint.tensors.values())
    about = json.dumps([code, checkpoint.config, declared(checkpoint), tensors])
    return folder / f"{hashlib.sha256(about.encode()).hexdigest()}.json"


# -------------------------------------------------------------------------------------------------------------- files
def recall(checkpoint: Checkpoint, place: Path) -> Structure | None:
    """The structure that was remembered at a place; None where there is none that fits the checkpoint."""
    try:
        with place.open("rb") as file:
            mine, text = os.fstat(file.fileno()).st_uid == os.getuid(), file.read(MOST_BYTES)
        about = json.loads(text)
        if not mine or about["sha256"] != _digest(place, about["structure"]):
            return None
        return _restored(checkpoint, about["structure"])
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def remember(structure: Structure, place: Path) -> None:
    """Keep a structure at a place; nothing happens where that cannot be done. The oldest files make room."""
    try:
        told = _told(structure)
        again = _restored(structure.checkpoint, json.loads(json.dumps(told)))
        text = json.dumps({"sha256": _digest(place, told), "structure": told}, indent=1)
        if again != structure or list(again.tensors) != list(structure.tensors) or len(text) >= MOST_BYTES:
            return
        write_text(place, text)
        for _, old in sorted(((f.stat().st_mtime_ns, f) for f in place.parent.iterdir()), reverse=True)[MOST_FILES:]:
            old.unlink(missing_ok=True)
    except (OSError, ValueError, MoecoverError):
        return


def _digest(place: Path, told: Any) -> str:
    return hashlib.sha256(f"{place.stem} {canonical_json(told)}".encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------- contents
def _rules(rows: Iterable[tuple[str, ExpertTensor | None]]) -> dict[str, list[Any] | None]:
    return {kind_of(name): [row.axis, row.routed, row.tail] if row else None for name, row in rows}


def _told(structure: Structure) -> dict[str, Any]:
    """What is written of a structure: layer and expert of a tensor are left to its name, the rest to its kind."""
    num_layers = structure.topology.num_layers
    return {
        "topology": structure.topology.to_json(),
        "parameters": structure.parameters,
        "modules": list(structure.experts_modules),
        "rules": _rules(structure.tensors.items()),
        "mtp": sorted({str(mtp_root(name, num_layers)) for name in structure.mtp}),
        "mtp_rules": _rules(structure.mtp.items()),
    }


def _restored(checkpoint: Checkpoint, told: dict[str, Any]) -> Structure:
    """The structure that was told, its parts held against the configuration, the headers and each other.

    Raises:
        ValueError: they do not fit, or another error of Python's where they are of another form.
    """
    topology, modules, parameters = Topology.from_json(told["topology"]), tuple(told["modules"]), told["parameters"]
    numbers = [
        *topology.decoder_layers,
        *(v for k, v in told["topology"].items() if k not in ("family", "decoder_layers")),
    ]
    _fits(all(type(n) is int and n >= 0 for n in [*numbers, *parameters.values()]))
    _fits(topology.family == checkpoint.config["model_type"])
    _fits(set(expert_count_keys(checkpoint.config).values()) == {topology.num_experts})
    _fits(0 < topology.top_k <= topology.num_experts)
    _fits(topology.num_groups > 0 and topology.num_experts % topology.num_groups == 0)
    _fits(tuple(layer_number(module) for module in modules) == topology.decoder_layers != ())
    _fits(set(map(layer_number, parameters)) == set(topology.decoder_layers))
    _fits(set(modules) <= {name.rpartition(".")[0] for name in parameters})
    return assembled(checkpoint, topology, _rows(checkpoint, topology, modules, told), parameters, modules)


def _rows(checkpoint: Checkpoint, topology: Topology, modules: tuple[str, ...], told: dict[str, Any]) -> Tensors:
    """The row of every tensor that depends on the experts, by the rule of its kind."""
    rules, mtp_rules, roots = told["rules"], told["mtp_rules"], set(told["mtp"])
    layer_of = {number: layer for layer, number in enumerate(topology.decoder_layers)}
    found, mtp = dict[str, ExpertTensor](), dict[str, ExpertTensor | None]()
    for name in checkpoint.tensors:
        kind = kind_of(name)
        if roots and mtp_root(name, topology.num_layers) in roots:
            rule = mtp_rules[kind]
            _fits(rule is not None or expert_number(name) is None)
            mtp[name] = rule and _row(checkpoint, topology, name, rule, len(layer_of) - 1)
        elif kind in rules and (layer := layer_of.get(layer_number(name))) is not None:
            found[name] = _row(checkpoint, topology, name, rules[kind], layer)
        else:
            _fits(expert_number(name) is None or OTHER_PARTS.search(name) is not None)
    for routed in (True, False):
        _fits({row.layer for row in found.values() if row.routed == routed} == set(layer_of.values()))
    said = declared(checkpoint) is not None
    quantised = check_rows(checkpoint, found, modules, topology.num_experts, declared=said)
    return Tensors(found, {name: mtp[name] for name in sorted(mtp)}, quantised)


def _row(checkpoint: Checkpoint, topology: Topology, name: str, rule: list[Any], layer: int) -> ExpertTensor:
    """The row of one tensor."""
    axis, routed, tail = rule
    expert = expert_number(name)
    _fits(type(routed) is bool and type(tail) is int and tail >= 0 and (axis is None) == (expert is not None))
    if axis is not None:
        _fits(type(axis) is int and axis >= 0)
        _fits(checkpoint.tensors[name].shape[axis] == topology.num_experts + tail)
    return ExpertTensor(layer, expert, axis, routed, tail)


def _fits(yes: bool) -> None:
    if not yes:
        raise _Unfit
