"""Bytes of memory that merge and repair of a layer take beside the model, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moecover.merging.method import NONE
from moecover.repairing.refit import needed_bytes as refit_bytes
from moecover.repairing.solver import REFIT, peak_bytes
from moecover.repairing.sums import CHUNK

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure
    from moecover.repairing.targets import Place

TOKENS = 65_536  # of calibration text that merge and repair run on by default
# Seconds of a repair over those of a plain pass over as much text, measured (docs/repair.md, docs/scale.md); a refit
# takes 3.5 times as long as ridge on qwen2-moe-tiny.
PACE = {"scale": 11.0, "ridge": 11.0, "refit": 39.0}


def needed_bytes(
    structure: Structure,
    where: Sequence[Place],
    *,
    kind: str,
    merge: str = NONE,
    keep: int,
    tokens: int,
    dtype: str,
) -> int:
    """Bytes of memory that merge and repair of the largest layer take beside the model, with states of both passes.

    Args:
        structure: the checkpoint.
        where: from `places`.
        kind: of the repair, or ``none``.
        merge: name of the merge, or ``none``.
        keep: experts kept per layer.
        tokens: of all corpora.
        dtype: of the model, by torch's name, ``auto`` for the stored one.
    """
    import torch

    topology, refits = structure.topology, kind == REFIT
    hidden, slots, experts = topology.hidden_size, topology.top_k, topology.num_experts

    def of_layer(place: Place) -> int:
        width, shared = place.widths
        features = 4 * tokens * (slots * width + shared)
        # Target, inputs of the experts, outputs of both blocks; hidden states of both passes, twice as in `memory`.
        held = 8 * tokens * hidden * int(getattr(torch, place.dtype if dtype == "auto" else dtype).itemsize)
        widths = [width] * keep + [shared] * (shared > 0)
        solving = features + peak_bytes(tokens=tokens, hidden_size=hidden, widths=widths)
        of_width = 3 * hidden * width  # parameters of an expert
        moved = keep * of_width + 3 * hidden * shared + experts * hidden
        # The experts' parameters are spread over all experts' places at every step, with gradients.
        moving = refit_bytes(moved, tokens=tokens, hidden_size=hidden) + 8 * experts * of_width if refits else 0
        if merge == NONE:
            return held + max(solving, moving)
        # Whole experts: new and old values of the kept ones, an average; logits, two experts' activations and matches.
        whole = width if isinstance(structure.width, str) else structure.width.channels
        merged = 3 * hidden * whole * (2 * keep * int(getattr(torch, place.dtype).itemsize) + 32)
        merging = 8 * tokens * experts + 16 * CHUNK * whole + 32 * whole * whole
        return held + merged + max(merging, solving if kind != NONE else 0, moving)

    return max(map(of_layer, where))
