"""Repaired layers as files: reads a model, a plan and calibration text, keeps what the repair of every layer gave.

The folder beside an output holds ``layer-N.safetensors`` for every decoder layer N that is finished: the down
projections that were refitted, under the names, in the layout and in the dtype that they have in the output, with how
well they fit, what they were made from and a hash of each. A run that was interrupted goes on behind them; the writer
of the checkpoint copies their bytes. The folder may be deleted at any time before the output is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from moecover.checkpoints.header import TensorEntry, read_header
from moecover.checkpoints.model_class import build_on_meta
from moecover.checkpoints.pieces import Piece, piece, pieces_by_shard
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.structure import Structure
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, MoecoverError
from moecover.files.atomic import canonical_json, write_bytes
from moecover.files.copying import CHUNK_BYTES, HASH
from moecover.planning.artifact import Plan
from moecover.profiling.run import stamps
from moecover.repairing.layers import LayerRepair, repair_layers
from moecover.repairing.solver import Fit
from moecover.repairing.targets import Place, places
from moecover.runtime.pass_state import remove

if TYPE_CHECKING:
    import torch

    from moecover.runtime.running import Running


@dataclass(frozen=True)
class Repaired:
    """The repair of a whole model.

    Attributes:
        kind: of the repair.
        corpora: the records of the calibration text, with the tokens that were used.
        layers: of every MoE layer: ``decoder_layer``; ``experts``, ids in the original of those that were refitted;
            ``shared``, whether that one was; ``penalties``; squared error as a share of the squared output, ``before``
            and ``after``, by corpus; ``kept``, why others were not.
        hashes: of every tensor of the output that is not the original's, by name.
        pieces: where their bytes lie, by name.
    """

    kind: str
    corpora: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    hashes: dict[str, str]
    pieces: dict[str, Piece]

    def of_layer(self, structure: Structure, plan: Plan) -> Callable[[int], LayerRepair]:
        """What reads the repair of a MoE layer from its file, as `repairing.with_repairs` takes it."""
        where, shards = places_on_disk(structure), dict[Path, dict[str, TensorEntry]]()

        def read(name: str) -> bytes:
            path = self.pieces[name].file
            assert path is not None
            return stored_bytes(path.parent, shards.setdefault(path, read_header(path)[0])[name])

        return lambda layer: layer_repair(structure, where[layer], plan.layers[layer].kept, self.layers[layer], read)

    def mean_errors(self) -> tuple[float, float]:
        """Squared error as a share of the squared output before and after, mean over corpora and layers."""
        return mean_errors(self.layers)

    def manifest(self) -> dict[str, Any]:
        """What the manifest of the output says of it."""
        return {
            "kind": self.kind,
            "corpora": self.corpora,
            "mean": self.mean_errors(),
            "layers": self.layers,
            "hash": HASH,
            "tensors": self.hashes,
        }


def mean_errors(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Errors ``before`` and ``after`` of `Repaired.layers`, mean over corpora and layers."""
    before, after = (
        sum(sum(row[when].values()) / len(row[when]) for row in rows) / len(rows) for when in ("before", "after")
    )
    return before, after


def places_on_disk(structure: Structure) -> list[Place]:
    """`places` from the configuration and the headers alone, before anything is loaded.

    Raises:
        InputError: the model cannot be repaired; says why.
    """
    return places(structure, build_on_meta(structure.checkpoint.config, structure.checkpoint.name))


def _hash(content: Any) -> str:
    return str(xxhash.xxh3_128_hexdigest(content))


def _bytes(tensor: torch.Tensor) -> Any:
    import torch

    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def stored_bytes(folder: Path, entry: TensorEntry) -> bytes:
    """The bytes of a tensor on disk."""
    with (folder / entry.shard).open("rb") as file:
        file.seek(entry.start)
        return file.read(entry.num_bytes)


def _tensor(content: bytes, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(content), dtype=getattr(torch, dtype)).view(*shape)


def names_of(structure: Structure, place: Place, kept: Sequence[int], row: dict[str, Any]) -> dict[str, list[int]]:
    """The tensors of the output that a layer's repair changed: name, and the refitted experts in it (none: the shared one).

    Args:
        structure: the original.
        place: of the layer.
        kept: ids of its kept experts, ascending.
        row: of `Repaired.layers`.
    """
    found: dict[str, list[int]] = {}
    for expert in row["experts"]:
        name = place.experts[expert if len(place.experts) > 1 else 0]
        there = piece(structure.checkpoint.tensors[name], structure.tensors[name], list(kept))
        if there is None:
            raise KeyError(f"expert {expert} of {name} is not kept")
        found.setdefault(there.name, []).append(expert)
    if row["shared"] and place.shared is not None:
        found[place.shared[1]] = []
    return found


def layer_repair(
    structure: Structure, place: Place, kept: Sequence[int], row: dict[str, Any], read: Callable[[str], bytes]
) -> LayerRepair:
    """The repair of a layer from tensors of the output.

    Args:
        structure: the original.
        place: of the layer.
        kept: ids of its kept experts, ascending.
        row: of `Repaired.layers`.
        read: the bytes of a tensor of the output, by name.
    """
    hidden, stacked = structure.topology.hidden_size, len(place.experts) == 1
    experts, shared = {}, None
    for name, ids in names_of(structure, place, kept, row).items():
        if not ids and place.shared is not None:
            shared = place.shared[0], _tensor(read(name), place.dtype, (hidden, place.widths[1]))
        elif stacked:
            whole = _tensor(read(name), place.dtype, (len(kept), hidden, place.widths[0]))
            experts.update({expert: whole[kept.index(expert)] for expert in ids})
        else:
            experts[ids[0]] = _tensor(read(name), place.dtype, (hidden, place.widths[0]))
    before, after = list(row["before"].values()), list(row["after"].values())
    return LayerRepair(row["decoder_layer"], experts, shared, Fit({}, before, after, row["penalties"], row["kept"]))


def _tensors(
    structure: Structure, place: Place, kept: Sequence[int], repair: LayerRepair, row: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors of the output that a layer's repair changes, as they are written."""
    import torch

    found = {}
    for name, ids in names_of(structure, place, kept, row).items():
        if not ids:
            assert repair.shared is not None
            found[name] = repair.shared[1].cpu().contiguous()
        elif len(place.experts) > 1:
            found[name] = repair.experts[ids[0]].cpu().contiguous()
        else:
            entry = structure.checkpoint.tensors[place.experts[0]]
            size = entry.num_bytes // entry.shape[0]
            with (structure.checkpoint.path / entry.shard).open("rb", buffering=0) as file:
                originals = [os.pread(file.fileno(), size, entry.start + expert * size) for expert in kept]
            parts = [
                repair.experts[expert].cpu() if expert in ids else _tensor(content, place.dtype, entry.shape[1:])
                for expert, content in zip(kept, originals, strict=True)
            ]
            found[name] = torch.stack(parts)
    return found


def _read(path: Path) -> tuple[dict[str, TensorEntry], dict[str, Any]] | None:
    """The tensors of a finished layer and what it says of itself; None where it is missing or damaged."""
    try:
        entries, metadata = read_header(path)
        about = json.loads((metadata or {})["moecover"])
        about["inputs"].keys(), about["row"].keys()
        if about["hashes"].keys() != entries.keys():
            return None
        if any(_hash(stored_bytes(path.parent, entry)) != about["hashes"][name] for name, entry in entries.items()):
            return None
    except (OSError, InputError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return entries, about


def repair(
    structure: Structure,
    plan: Plan,
    corpora: Sequence[Corpus],
    *,
    model: contextlib.AbstractContextManager[torch.nn.Module | Running],
    kind: str,
    folder: Path,
    batch_size: int = 4,
    dtype: str = "auto",
    device: str = "auto",
    advance: Callable[[int], None] = lambda layers: None,
    say: Callable[[str], None] = lambda line: None,
) -> Repaired:
    """The repair of a model for a plan, layer by layer, each kept in a file as soon as it is done.

    Args:
        structure: the original.
        plan: which experts stay.
        corpora: calibration text, each with its record.
        model: opens the original; entered only where a layer is left to be done.
        kind: see `repairing.repair_layers`.
        folder: for the files; the caller removes it when the output is complete.
        batch_size: sequences per forward pass.
        dtype: of the model, by name.
        device: of the model, by name.
        advance: called with 1 behind every layer.
        say: takes a line on what is there from an earlier run.

    Raises:
        InputError: what `repair_layers` raises.
        MoecoverError: the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save

    from moecover.version import VERSION

    layers = plan.layers
    where = places_on_disk(structure)
    records = [{"name": c.name, "tokens used": c.num_tokens, **c.record} for c in corpora]
    inputs: dict[str, Any] = {
        "--repair": kind,
        "the model": [structure.model_fingerprint, stamps(structure)],
        "the plan": hashlib.sha256(canonical_json(plan.to_dict()).encode()).hexdigest(),
        "the calibration text": records,
        "--batch-size": batch_size,
        "--dtype": dtype,
        "--device": device,
        "the version of moecover": VERSION,
    }
    inputs = json.loads(json.dumps(inputs))
    rows, hashes, pieces = list[dict[str, Any]](), dict[str, str](), dict[str, Piece]()
    read: dict[int, tuple[Path, dict[str, TensorEntry]]] = {}

    def file(layer: int) -> Path:
        return folder / f"layer-{layers[layer].decoder_layer}.safetensors"

    def take(layer: int, entries: dict[str, TensorEntry], about: dict[str, Any]) -> None:
        rows.append(about["row"])
        hashes.update(about["hashes"])
        read[layer] = file(layer), entries
        pieces.update({n: Piece(n, e.dtype, e.shape, ((e.start, e.end),), file(layer)) for n, e in entries.items()})

    for layer in range(len(layers)):
        found = _read(file(layer))
        if found is None:
            break
        if differs := [n for n in inputs if found[1]["inputs"].get(n) != inputs[n]]:
            say(f"repairing anew: {folder} was made from other inputs, {differs[0]} differs")
            remove(folder)
            break
        take(layer, *found)
    if rows:
        say(f"resuming: {len(rows)} of {len(layers)} layers are repaired")
    advance(len(rows))

    def done(layer: int) -> LayerRepair | None:
        if layer not in read:
            return None
        path, entries = read[layer]
        return layer_repair(
            structure,
            where[layer],
            layers[layer].kept,
            rows[layer],
            lambda name: stored_bytes(path.parent, entries[name]),
        )

    if len(rows) == len(layers):
        return Repaired(kind, records, rows, hashes, pieces)
    finished = len(rows)
    with (
        model as live,
        contextlib.closing(
            repair_layers(live, structure, plan, corpora, kind=kind, batch_size=batch_size, done=done)
        ) as repairs,
    ):
        for layer, made in enumerate(repairs):
            if layer < finished:
                continue
            names = [c.name for c in corpora]
            row: dict[str, Any] = {
                "decoder_layer": made.decoder_layer,
                "experts": sorted(made.experts),
                "shared": made.shared is not None,
                "penalties": made.fit.penalties,
                "before": dict(zip(names, made.fit.before, strict=True)),
                "after": dict(zip(names, made.fit.after, strict=True)),
                "kept": made.fit.kept,
            }
            tensors = _tensors(structure, where[layer], layers[layer].kept, made, row)
            about = {"inputs": inputs, "row": row, "hashes": {n: _hash(_bytes(t)) for n, t in tensors.items()}}
            write_bytes(file(layer), save(tensors, metadata={"moecover": json.dumps(about)}))
            take(layer, read_header(file(layer))[0], about)
            del made, tensors
            advance(1)
    if inputs["the model"][1] != json.loads(json.dumps(stamps(structure))):
        remove(folder)
        raise MoecoverError(f"{structure.checkpoint.name} changed while it was read. Start again when it is at rest")
    return Repaired(kind, records, rows, hashes, pieces)


@contextlib.contextmanager
def kept_for_later(folder: Path) -> Iterator[None]:
    """Have an error or an interrupt of the block say that finished layers stay for the next run."""
    try:
        yield
    except BaseException as error:
        if count := len([*folder.glob("layer-*.safetensors")]):
            left = f"The finished layers of the repair ({count}) are kept in {folder} and are used when the same command runs again"
            if isinstance(error, MoecoverError):
                raise type(error)(f"{error}. {left}") from error
            error.add_note(left)
        raise


def changed_tensors(
    structure: Structure, plan: Plan, cut: Checkpoint, hashes: dict[str, str], *, mtp: str
) -> list[str]:
    """Names of the tensors of a repaired checkpoint that are neither the original's, byte for byte, nor of the noted hash.

    Args:
        structure: the original.
        plan: what was kept.
        cut: the repaired checkpoint.
        hashes: of the repaired tensors, by name.
        mtp: see `checkpoint.prune`.
    """
    expected = {p.name: (shard, p) for shard, ps in pieces_by_shard(structure, plan.kept, mtp=mtp).items() for p in ps}
    found = [*expected.keys() ^ cut.tensors.keys(), *hashes.keys() - expected.keys()]
    for name in expected.keys() & cut.tensors.keys():
        there, (shard, one) = cut.tensors[name], expected[name]
        if (there.dtype, there.shape) != (one.dtype, one.shape):
            found.append(name)
        elif name in hashes:
            found += [name] * (_hash(stored_bytes(cut.path, there)) != hashes[name])
        elif not _same_bytes(structure.checkpoint.path / shard, one.ranges, cut.path / there.shard, there.start):
            found.append(name)
    return sorted(set(found))


def _same_bytes(one: Path, ranges: Sequence[tuple[int, int]], other: Path, start: int) -> bool:
    """Whether byte ranges of a file are what another one holds from ``start`` on."""
    with one.open("rb") as first, other.open("rb") as second:
        second.seek(start)
        for begin, end in ranges:
            first.seek(begin)
            for at in range(begin, end, CHUNK_BYTES):
                size = min(CHUNK_BYTES, end - at)
                if first.read(size) != second.read(size):
                    return False
    return True
