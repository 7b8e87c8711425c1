"""Repaired layers as files: reads a model, a plan and calibration text, keeps the repair of every layer in a folder.

The folder beside an output holds ``layer-N.safetensors`` for every finished decoder layer N: the refitted down
projections under the names, in the layout and in the dtype of the output, with errors, inputs and a hash of each. An
interrupted run resumes after the last finished layer; the writer of the checkpoint copies the bytes. The folder may be
deleted at any time before the output is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from moecover.checkpoints.header import TensorEntry, read_header
from moecover.checkpoints.pieces import Piece
from moecover.checkpoints.stamps import stamps
from moecover.checkpoints.structure import Structure
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, MoecoverError
from moecover.files.atomic import canonical_json, write_bytes
from moecover.files.hashing import hash_of, sealed, unsealed
from moecover.files.reading import parse_json
from moecover.merging.method import NONE
from moecover.planning.artifact import Plan
from moecover.repairing.applied import LayerRepair
from moecover.repairing.artifact import Repaired
from moecover.repairing.layers import repair_layers
from moecover.repairing.targets import places_on_disk
from moecover.repairing.tensors import (
    LayerRow,
    bytes_of,
    layer_repair,
    layer_row,
    stored_bytes,
    written_tensors,
)
from moecover.runtime.distributed import check_same, of_first
from moecover.runtime.pass_state import remove
from moecover.runtime.world import ALONE, World

if TYPE_CHECKING:
    import torch

    from moecover.runtime.running import Running


class _About(TypedDict):
    """What the file of a layer says of itself."""

    inputs: dict[str, object]
    row: LayerRow
    hashes: dict[str, str]


class _Layers:
    """The finished layers of a repair in their folder.

    Attributes:
        rows: of every finished layer.
        hashes: see `Repaired`.
        pieces: see `Repaired`.
    """

    def __init__(self, structure: Structure, plan: Plan, folder: Path, inputs: dict[str, object]) -> None:
        self._structure, self._plan, self._folder, self._inputs = structure, plan, folder, inputs
        self._places = places_on_disk(structure, plan.width)
        self.rows: list[LayerRow] = []
        self.hashes: dict[str, str] = {}
        self.pieces: dict[str, Piece] = {}
        self._entries: list[dict[str, TensorEntry]] = []

    def resume(self, say: Callable[[str], None]) -> None:
        """Take over the layers that an earlier run with the same inputs has finished."""
        for layer in range(len(self._plan.layers)):
            found = _read(self._file(layer))
            if found is None:
                break
            made_from = found[1]["inputs"]
            if differs := [name for name in self._inputs if made_from.get(name) != self._inputs[name]]:
                say(f"starting the repair over: {self._folder} was made from other inputs, {differs[0]} differs")
                remove(self._folder)
                break
            self._take(*found)
        if self.rows:
            say(f"resuming: {len(self.rows)} of {len(self._plan.layers)} layers are repaired")

    def done(self, layer: int) -> LayerRepair | None:
        """The repair of a layer that is finished."""
        if layer >= len(self.rows):
            return None
        entries = self._entries[layer]

        def read(name: str) -> bytes:
            return stored_bytes(self._folder, entries[name])

        return layer_repair(self._structure, self._places[layer], self._plan, layer, self.rows[layer], read)

    def add(self, made: LayerRepair, corpora: Sequence[str]) -> None:
        """Write the repair of the next layer.

        Raises:
            MoecoverError: the disk is full or the folder cannot be written.
        """
        from safetensors.torch import save

        layer, row = len(self.rows), layer_row(made, corpora)
        tensors = written_tensors(self._structure, self._places[layer], self._plan, layer, made, row)
        hashes = {name: hash_of(bytes_of(tensor)) for name, tensor in tensors.items()}
        about: _About = {"inputs": self._inputs, "row": row, "hashes": hashes}
        write_bytes(self._file(layer), save(tensors, metadata={"moecover": json.dumps(sealed(about))}))
        self._take(read_header(self._file(layer))[0], about)

    def _file(self, layer: int) -> Path:
        return self._folder / f"layer-{self._plan.layers[layer].decoder_layer}.safetensors"

    def _take(self, entries: dict[str, TensorEntry], about: _About) -> None:
        file = self._file(len(self.rows))
        self.rows.append(about["row"])
        self.hashes.update(about["hashes"])
        self._entries.append(entries)
        self.pieces.update({n: Piece(n, e.dtype, e.shape, ((e.start, e.end),), file) for n, e in entries.items()})


def _read(path: Path) -> tuple[dict[str, TensorEntry], _About] | None:
    """The tensors of a finished layer and what its file says of itself; None where it is missing or damaged."""
    try:
        entries, metadata = read_header(path)
        about = cast("_About", unsealed(parse_json((metadata or {})["moecover"])))
        about["inputs"].keys(), about["row"].keys()
        if about["hashes"].keys() != entries.keys():
            return None
        if any(hash_of(stored_bytes(path.parent, e)) != about["hashes"][name] for name, e in entries.items()):
            return None
    except (OSError, InputError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return entries, about


def _as_json(value: object) -> Any:
    """A value as it is read back from a file."""
    return json.loads(json.dumps(value))


def _inputs(
    structure: Structure, plan: Plan, records: Sequence[object], settings: Mapping[str, object]
) -> dict[str, object]:
    """What a repair is made from, by the name that a message gives it."""
    from moecover.version import VERSION

    found: dict[str, object] = {
        "--repair": settings["--repair"],
        "--merge": settings["--merge"],
        "the model": [structure.model_fingerprint, stamps(structure)],
        "the plan": hashlib.sha256(canonical_json(plan.to_dict()).encode()).hexdigest(),
        "the calibration text": records,
        **settings,
        "the version of moecover": VERSION,
    }
    return found


def _check_unchanged(structure: Structure, stamped: object, folder: Path) -> None:
    """Drop a repair whose model was written to meanwhile."""
    if stamped != _as_json(stamps(structure)):
        remove(folder)
        raise MoecoverError(
            f"{structure.checkpoint.name} changed while it was read. Run again when no other program writes to it"
        )


def repair(
    structure: Structure,
    plan: Plan,
    corpora: Sequence[Corpus],
    *,
    model: contextlib.AbstractContextManager[torch.nn.Module | Running],
    kind: str,
    merge: str = NONE,
    folder: Path,
    batch_size: int = 4,
    dtype: str = "auto",
    device: str = "auto",
    here: World = ALONE,
    advance: Callable[[int], None] = lambda layers: None,
    say: Callable[[str], None] = lambda line: None,
) -> Repaired:
    """Merge and repair a model for a plan, layer by layer; each layer is saved in a file as soon as it is done.

    Args:
        structure: the original.
        plan: which experts stay.
        corpora: calibration text, each with its record.
        model: opens the original; entered only where a layer is left to be done.
        kind: see `solver.KINDS`; ``none`` for a merge alone.
        merge: name in `MERGES`, or ``none``.
        folder: for the files; the caller removes it when the output is complete.
        batch_size: sequences per forward pass.
        dtype: of the model, by name.
        device: of the model, by name.
        here: this process among those that share the text; the first one has the files.
        advance: called with the number of layers that are done.
        say: called with a line on what an earlier run left.

    Raises:
        InputError: see `repair_layers`.
        MoecoverError: the disk is full or the folder cannot be written.
    """
    records = [{"name": c.name, "tokens used": c.num_tokens, **c.record} for c in corpora]
    stamped = _as_json(stamps(structure))
    settings = {"--repair": kind, "--merge": merge, "--batch-size": batch_size, "--dtype": dtype, "--device": device}
    layers = _Layers(structure, plan, folder, _as_json(_inputs(structure, plan, records, settings)))
    check_same(here, {"model": structure.model_fingerprint, "plan": plan.to_dict(), "text": records, **settings})
    if here.rank == 0:
        layers.resume(say)
    finished = of_first(here, len(layers.rows))
    advance(finished)
    made = Repaired(kind, merge, records, layers.rows, layers.hashes, layers.pieces)
    if finished == len(plan.layers):
        return of_first(here, made)

    def done(layer: int) -> LayerRepair | None:
        return of_first(here, layers.done(layer) if here.rank == 0 else None) if layer < finished else None

    with (
        model as live,
        contextlib.closing(
            repair_layers(live, structure, plan, corpora, kind=kind, merge=merge, batch_size=batch_size, done=done)
        ) as repairs,
    ):
        for layer, one in enumerate(repairs):
            if layer >= finished:
                if here.rank == 0:
                    layers.add(one, [corpus.name for corpus in corpora])
                advance(1)
            del one
    if here.rank == 0:
        _check_unchanged(structure, stamped, folder)
    return of_first(here, made)


@contextlib.contextmanager
def kept_for_later(folder: Path) -> Iterator[None]:
    """Make an error or an interrupt in the block say that finished layers were saved for the next run."""
    try:
        yield
    except BaseException as error:
        if count := len([*folder.glob("layer-*.safetensors")]):
            left = f"Progress of the repair ({count} layers) saved in {folder}; rerun the same command to resume"
            if isinstance(error, MoecoverError):
                raise error.extended(left) from error
            error.add_note(left)
        raise
