"""The models of a comparison: everything that is known of each before its cells run, and models.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, cast

from moecover.checkpoints.structure import Structure
from moecover.comparison.cell_files import read_records
from moecover.comparison.cells import Cell, Sample
from moecover.comparison.config import ModelEntry
from moecover.comparison.jobs import RunFacts
from moecover.corpora.packing import Corpus
from moecover.files.atomic import write_text
from moecover.files.hashing import sealed, unsealed
from moecover.files.reading import read_json
from moecover.planning.shapes import shape_name
from moecover.repairing.targets import Place

MODELS = "models.json"


@dataclass
class ComparedModel:
    """A model with its cells and what they depend on.

    Attributes:
        entry: its entry of the configuration.
        structure: the checkpoint; of a hub model first from its headers alone.
        cells: all of them.
        files: further GGUF files by name.
        samples: corpora of every calibration sample.
        fitted_on: the part of a calibration sample that merge, repair and skipping rule are made on.
        places: what a repair refits; empty if no cell is repaired.
        texts: for perplexity.
        shard_hashes: hash of every weight file, of the model and of its further files by `name_of`.
        weights: hash of the weights.
        files_weights: of every further file.
        in_tasks: tokens and forward passes of one variant in the tasks.
        longest: tokens of the longest request of the tasks.
        in_memory: tasks that do not run layer by layer.
        fingerprints: by cell id.
        pending: cells that are not done yet.
        walls: seconds that cells took that are done.
    """

    entry: ModelEntry
    structure: Structure
    cells: list[Cell]
    files: Mapping[str, Structure] = field(default_factory=dict)
    samples: dict[Sample, tuple[Corpus, ...]] = field(default_factory=dict)
    fitted_on: dict[Sample, tuple[Corpus, ...]] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    texts: tuple[Corpus, ...] = ()
    shard_hashes: dict[str, dict[str, list[int | str]]] = field(default_factory=dict)
    weights: str = ""
    files_weights: dict[str, str] = field(default_factory=dict)
    in_tasks: tuple[int, int] = (0, 0)
    longest: int = 0
    in_memory: tuple[str, ...] = ()
    fingerprints: dict[str, str] = field(default_factory=dict)
    pending: list[Cell] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.entry.name

    def name_of(self, file: str) -> str:
        """The name of a further file beside those of all models."""
        return f"{self.name}, file {file}"


class ModelRecord(TypedDict):
    """A model as models.json has it; the last seven are None until it has run."""

    name: str
    model: str
    revision: str | None
    family: str
    fingerprint: str
    experts: int
    top_k: int
    layers: int
    num_bytes: int
    num_bytes_by_keep: dict[str, int]
    dtype: str | None
    device: str | None
    peak_rss_bytes: int | None
    peak_device_bytes: int | None
    cpu: str | None
    layer_by_layer: bool | None
    batch_size: int | None


def stored_facts(run: Path) -> dict[str, RunFacts]:
    """How the models ran in earlier runs, by name; empty if models.json cannot be read."""
    try:
        found = map(unsealed, read_json(run / MODELS))
        return {
            m["name"]: RunFacts(
                dtype=m["dtype"],
                device=m["device"],
                peak_rss_bytes=m["peak_rss_bytes"],
                peak_device_bytes=m["peak_device_bytes"],
                cpu=m["cpu"],
                layer_by_layer=m["layer_by_layer"],
                batch_size=m.get("batch_size"),
            )
            for m in found
            if m.get("dtype")
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def with_peaks(facts: RunFacts, before: RunFacts | None) -> RunFacts:
    """The newer facts with the larger peaks of the two."""
    if before is None:
        return facts
    device = facts["peak_device_bytes"]
    return {
        **facts,
        "peak_rss_bytes": max(facts["peak_rss_bytes"], before["peak_rss_bytes"] or 0),
        "peak_device_bytes": None if device is None else max(device, before["peak_device_bytes"] or 0),
    }


def write_models(run: Path, models: Sequence[ComparedModel], facts: Mapping[str, RunFacts]) -> None:
    """Write models.json.

    Args:
        run: the run folder.
        models: of the comparison.
        facts: how they ran, by name; those that have not run are missing.
    """
    records = [_record(model, facts.get(model.name)) for model in models]
    write_text(run / MODELS, json.dumps([sealed(record) for record in records], indent=1) + "\n")


def read_models(run: Path) -> list[ModelRecord]:
    """The content of models.json.

    Raises:
        InputError: it was changed since it was written.
    """
    return cast("list[ModelRecord]", read_records(run / MODELS))


def _record(model: ComparedModel, facts: RunFacts | None) -> ModelRecord:
    structure, topology = model.structure, model.structure.topology
    return {
        "name": model.name,
        "model": model.entry.model,
        "revision": structure.checkpoint.revision,
        "family": topology.family,
        "fingerprint": structure.model_fingerprint,
        "experts": topology.num_experts,
        "top_k": topology.top_k,
        "layers": len(topology.decoder_layers),
        "num_bytes": structure.checkpoint.num_bytes,
        "num_bytes_by_keep": {
            shape_name(keep, width or None): structure.num_bytes(keep, width=width or None)
            for keep, width in sorted({(c.keep, c.width or 0) for c in model.cells if not c.file})
        },
        "dtype": facts["dtype"] if facts else None,
        "device": facts["device"] if facts else None,
        "peak_rss_bytes": facts["peak_rss_bytes"] if facts else None,
        "peak_device_bytes": facts["peak_device_bytes"] if facts else None,
        "cpu": facts["cpu"] if facts else None,
        "layer_by_layer": facts["layer_by_layer"] if facts else None,
        "batch_size": facts["batch_size"] if facts else None,
    }
