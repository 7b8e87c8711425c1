"""The repair of a whole model: reads the files of the repaired layers, gives what the writer and the manifest need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecover.checkpoints.header import TensorEntry, read_header
from moecover.checkpoints.pieces import Piece
from moecover.checkpoints.structure import Structure
from moecover.files.hashing import HASH
from moecover.merging.method import NONE
from moecover.planning.artifact import Plan
from moecover.repairing.applied import LayerRepair
from moecover.repairing.targets import places_on_disk
from moecover.repairing.tensors import LayerRow, layer_repair, stored_bytes
from moecover.text import Cell, Shown


@dataclass(frozen=True, repr=False)
class Repaired(Shown):
    """The repair of a whole model.

    Attributes:
        kind: see `solver.KINDS`; ``none`` for a merge alone.
        merge: name in `MERGES`, or ``none``.
        corpora: the records of the calibration text, with the number of tokens used.
        layers: the repair of every MoE layer.
        hashes: of every tensor of the output that is not the original's, by name.
        pieces: where the bytes of these tensors lie, by name.
    """

    kind: str
    merge: str
    corpora: list[dict[str, Any]]
    layers: list[LayerRow]
    hashes: dict[str, str]
    pieces: dict[str, Piece]

    def of_layer(self, structure: Structure, plan: Plan) -> Callable[[int], LayerRepair]:
        """A function that reads the repair of a MoE layer from its file, for `with_repairs`."""
        where, shards = places_on_disk(structure, plan.width), dict[Path, dict[str, TensorEntry]]()

        def read(name: str) -> bytes:
            path = self.pieces[name].file
            assert path is not None
            return stored_bytes(path.parent, shards.setdefault(path, read_header(path)[0])[name])

        return lambda layer: layer_repair(structure, where[layer], plan, layer, self.layers[layer], read)

    def mean_errors(self) -> tuple[float, float]:
        """Squared error as a share of the squared output before and after, mean over corpora and layers."""
        before = sum(_mean(row["before"]) for row in self.layers) / len(self.layers)
        return before, sum(_mean(row["after"]) for row in self.layers) / len(self.layers)

    def manifest(self) -> dict[str, Any]:
        """The entry in the manifest of the output."""
        return {
            "kind": self.kind,
            **({"merge": self.merge} if self.merge != NONE else {}),
            "corpora": self.corpora,
            "mean": self.mean_errors(),
            "layers": self.layers,
            "hash": HASH,
            "tensors": self.hashes,
        }

    @property
    def merged(self) -> tuple[int, int]:
        """Number of removed experts that were merged, and of the kept ones that took them in."""
        groups = [others for row in self.layers for others in row.get("merged", {}).values()]
        return sum(map(len, groups)), len(groups)

    @property
    def what(self) -> str:
        """Merge and repair in a word: ``ridge``, ``ream``, ``ream + ridge``."""
        return " + ".join(one for one in (self.merge, self.kind) if one != NONE)

    def summary(self) -> str:
        before, after = self.mean_errors()
        return f"{self.what}: {len(self.hashes)} tensors, mean relative squared error {before:.3f} -> {after:.3f}"

    def rows_shown(self) -> list[dict[str, Cell]]:
        return [
            {
                "layer": row["decoder_layer"],
                "experts merged": sum(map(len, row.get("merged", {}).values())),
                "experts refitted": None if "held" in row else len(row["experts"]),
                "shared refitted": None if "held" in row else row["shared"],
                "parameters changed": len(row.get("parameters", ())),
                "error before": _mean(row["before"]),
                "error after": _mean(row["after"]),
            }
            for row in self.layers
        ]


def _mean(errors: Mapping[str, float]) -> float:
    return sum(errors.values()) / len(errors)
