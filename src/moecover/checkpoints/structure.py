"""A checkpoint with the layout of its experts, from configuration and headers: what all further work starts from."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from moecover.checkpoints.config_edit import expert_count_keys
from moecover.checkpoints.derivation import derive
from moecover.checkpoints.families import PROVEN_FAMILIES
from moecover.checkpoints.gguf_layout import ARCHITECTURES, gguf_layout, notes_on
from moecover.checkpoints.names import mtp_number
from moecover.checkpoints.sizes import Sizes
from moecover.checkpoints.source import Checkpoint, open_checkpoint
from moecover.checkpoints.structure_cache import place_of, recall, remember
from moecover.checkpoints.topology import ExpertLayout, ExpertTensor, IdTable, Topology, Width
from moecover.text import Cell, Shown, size_text

GGUF_MARK = "gguf-"


@dataclass(frozen=True, repr=False)
class Structure(Shown):
    """A checkpoint with the layout of its experts.

    Attributes:
        checkpoint: the files.
        topology: shape of the routed part.
        tensors: the expert-dependent tensors on disk, by name.
        parameters: expert axis of every expert-dependent parameter or buffer of the live model, by name.
        experts_modules: dotted name of the experts module of every MoE layer.
        count_keys: paths of the expert-count keys in config.json.
        mtp: all tensors of the multi-token-prediction layers that have experts, see `topology.ExpertTensors`.
        quantised: how the experts are stored, None if they are not quantised.
        width: the channels of the experts; or, in words, why their number cannot be changed.
        warnings: what the user should know before using the result.
        tables: the tensors on disk that hold ids of experts (hash routing), by name.
    """

    checkpoint: Checkpoint
    topology: Topology
    tensors: dict[str, ExpertTensor]
    parameters: dict[str, int]
    experts_modules: tuple[str, ...]
    count_keys: tuple[tuple[str, ...], ...]
    mtp: dict[str, ExpertTensor | None]
    quantised: str | None
    width: Width | str
    warnings: tuple[str, ...]
    tables: dict[str, IdTable] = field(default_factory=dict)

    def summary(self) -> str:
        """Name, family, shape of the routed part and size."""
        t = self.topology
        layers = f"{len(t.decoder_layers)} MoE layer{'s' if len(t.decoder_layers) > 1 else ''}"
        size = size_text(self.checkpoint.num_bytes)
        return f"{self.checkpoint.name}: {t.family}, {layers} x {t.num_experts} experts, top-{t.top_k}, {size}"

    def rows_shown(self) -> list[dict[str, Cell]]:
        """One row per MoE layer: its decoder layer, experts, top-k and the bytes that depend on its experts."""
        sizes = [0] * len(self.topology.decoder_layers)
        for name, row in self.tensors.items():
            sizes[row.layer] += self.checkpoint.tensors[name].num_bytes
        return [
            {
                "decoder layer": number,
                "experts": self.topology.num_experts,
                "top-k": self.topology.top_k,
                "expert bytes": size,
            }
            for number, size in zip(self.topology.decoder_layers, sizes, strict=True)
        ]

    @functools.cached_property
    def expert_num_bytes(self) -> int:
        """Bytes of one expert of one layer on disk, including its router rows (mean over the layers)."""
        return self.expert_total_bytes // (self.topology.num_experts * len(self.topology.decoder_layers))

    @functools.cached_property
    def expert_total_bytes(self) -> int:
        """Bytes of everything that depends on the experts: proportional to their number."""
        total = 0
        for name, row in self.tensors.items():
            entry = self.checkpoint.tensors[name]
            places = 1 if row.axis is None else entry.shape[row.axis]
            total += entry.num_bytes // places * (places - row.tail)
        return total

    @property
    def mtp_layers(self) -> tuple[int, ...]:
        """Multi-token-prediction layers that have experts, numbered on from the decoder layers."""
        total = self.topology.num_layers
        return tuple(sorted({total + mtp_number(name, total) for name, row in self.mtp.items() if row is not None}))

    def num_bytes(self, kept: int | Sequence[Sequence[int]], *, width: int | None = None, mtp: str = "drop") -> int:
        """Bytes of all tensors after pruning.

        Args:
            kept: ids of the kept experts of every MoE layer; or their number, for the most bytes that so many may take
                (experts of a mixed-precision checkpoint differ).
            width: channels that are kept of every expert; None for all.
            mtp: how multi-token-prediction layers with experts are treated, as in `prune`.
        """
        return self._sizes.num_bytes(kept, width=width, mtp=mtp == "prune")

    @functools.cached_property
    def _sizes(self) -> Sizes:
        return Sizes(self.checkpoint, self.topology, self.tensors, self.mtp, self.width)

    @property
    def proven(self) -> bool:
        """Whether a test holds the layout that is derived for the family, or the architecture of a GGUF file."""
        return self.topology.family in (PROVEN_FAMILIES if self.checkpoint.gguf is None else ARCHITECTURES)

    def has_topology(self, fingerprint: str) -> bool:
        """Whether the routed part has the shape with some fingerprint.

        llama.cpp has names of its own for the families, so that a plan of a checkpoint fits a GGUF file, and the other
        way round, where the shape is the same.
        """
        others = PROVEN_FAMILIES if self.checkpoint.gguf is not None else ARCHITECTURES
        families = [self.topology.family, *others]
        return any(replace(self.topology, family=name).fingerprint == fingerprint for name in families)

    @functools.cached_property
    def model_fingerprint(self) -> str:
        """Hash of the topology and of the routers' bytes: the same for every copy of a model, whatever its sharding.

        That of a GGUF file begins with `GGUF_MARK`: it is not comparable with a checkpoint's, see `has_routers`.
        """
        digest = hashlib.sha256(self.topology.fingerprint.encode())
        for name in sorted([*(n for n, t in self.tensors.items() if not t.routed), *self.tables]):
            entry = self.checkpoint.tensors[name]
            digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
            with (self.checkpoint.path / entry.shard).open("rb") as file:
                digest.update(os.pread(file.fileno(), entry.num_bytes, entry.start))
        return digest.hexdigest() if self.checkpoint.gguf is None else GGUF_MARK + digest.hexdigest()

    def has_routers(self, fingerprint: str) -> bool:
        """Whether the model has the routers with some fingerprint, as far as it tells: not across formats."""
        across = fingerprint.startswith(GGUF_MARK) != (self.checkpoint.gguf is not None)
        return across or fingerprint == self.model_fingerprint


def read_structure(model: str | Path | Checkpoint, *, revision: str | None = None) -> Structure:
    """Read the topology and the expert-dependent tensors of a checkpoint, from its configuration and headers only.

    The result is cached on this machine unless the process has loaded transformers, see `structure_cache`.

    Args:
        model: folder, hub id, or an opened checkpoint.
        revision: branch, tag or commit of a hub model.

    Raises:
        InputError: no routed experts, an architecture that is unknown or does not fit, or tensors that do not match it.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model, revision=revision)
    if checkpoint.gguf is not None:
        return assembled_gguf(checkpoint, gguf_layout(checkpoint))
    place = place_of(checkpoint)
    layout = recall(checkpoint, place) if place else None
    if layout is None:
        layout = derive(checkpoint)
        if place:
            remember(checkpoint, layout, place)
    return assembled(checkpoint, layout)


def assembled_gguf(checkpoint: Checkpoint, layout: ExpertLayout) -> Structure:
    """The structure of a GGUF file: quantised or converted, so that it is cut by the plan of another checkpoint."""
    tensors = layout.tensors.experts
    types = sorted({checkpoint.tensors[name].dtype for name, row in tensors.items() if row.routed})
    return Structure(
        checkpoint=checkpoint,
        topology=layout.topology,
        tensors=tensors,
        parameters={},
        experts_modules=(),
        count_keys=(),
        mtp={},
        quantised=f"GGUF, experts of {', '.join(types)}",
        width=layout.width,
        warnings=notes_on(checkpoint, layout),
    )


def assembled(checkpoint: Checkpoint, layout: ExpertLayout) -> Structure:
    """The structure of a checkpoint whose layout is known."""
    topology, tensors = layout.topology, layout.tensors
    warnings = list(checkpoint.notes)
    if topology.family not in PROVEN_FAMILIES:
        warnings.append(
            f"family {topology.family!r} is not among the proven ones (moecover ls families): run `moecover verify` on "
            "the result"
        )
    if tensors.mtp:
        warnings.append(
            f"{len(tensors.mtp)} tensors belong to multi-token-prediction layers with experts of their own: `prune` "
            "drops these layers, or cuts them with --mtp prune"
        )
    if layout.tables:
        numbers = sorted({topology.decoder_layers[table.layer] for table in layout.tables.values()})
        warnings.append(
            f"decoder layers {', '.join(map(str, numbers))} look up a token's experts by its id: `prune` gives the "
            "tokens of removed experts to those that stay"
        )
    stored = checkpoint.declared_quantisation or "a type that config.json does not declare"
    return Structure(
        checkpoint=checkpoint,
        topology=topology,
        tensors=tensors.experts,
        parameters=layout.parameters,
        experts_modules=layout.modules,
        count_keys=tuple(expert_count_keys(checkpoint.config)),
        mtp=tensors.mtp,
        quantised=stored if tensors.quantised else None,
        width=layout.width,
        warnings=tuple(warnings),
        tables=layout.tables,
    )
