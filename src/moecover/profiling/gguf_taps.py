"""What llama.cpp's graph shows of the experts, as `hooks` records a live model: a tap for each layer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.gguf_width import DOWN
from moecover.checkpoints.structure import Structure
from moecover.llama.experts import Recorder, Routed
from moecover.llama.library import Library
from moecover.profiling.channels import Channels
from moecover.profiling.hooks import Tap
from moecover.profiling.reductions import Buffers, norms_and_peaks, scratch
from moecover.runtime.finite import OF_FILE, is_finite, not_finite

if TYPE_CHECKING:
    import torch


def width_in(structure: Structure) -> int | None:
    """Channels of every expert of a GGUF model; None where its layers differ."""
    tensors = structure.checkpoint.tensors
    widths = {tensors[f"blk.{number}.{DOWN}"].shape[-1] for number in structure.topology.decoder_layers}
    return widths.pop() if len(widths) == 1 else None


class GgufTaps:
    """A tap for every MoE layer, filled while llama.cpp runs a chunk of tokens.

    Args:
        library: that runs the model.
        structure: the file.

    Attributes:
        taps: by MoE layer.
        recorder: the watch for `Model.session`.
    """

    def __init__(self, library: Library, structure: Structure) -> None:
        topology, buffers = structure.topology, Buffers()
        layers = topology.decoder_layers
        self.recorder = Recorder(library, layers, frozenset(structure.checkpoint.tensors), self._use)
        self._downs: dict[int, Any] = {}  # the down projections of the layers that have run
        width, of = width_in(structure), [functools.partial(self._columns, layer) for layer in range(len(layers))]
        channels = [None if width is None else Channels(topology.num_experts, c, width, buffers) for c in of]
        self.taps = [Tap(number, buffers, one) for number, one in zip(layers, channels, strict=True)]

    def _columns(self, layer: int) -> Iterator[torch.Tensor]:
        """The down projections of a layer, one after the other; only while the layer runs."""
        import torch

        for matrix in self.recorder.tensors.matrices(self._downs[layer]):
            yield torch.from_numpy(matrix)

    def _use(self, routed: Routed) -> None:
        """Record a layer.

        Raises:
            InputError: an output of an expert is not finite.
        """
        import torch

        tap, hidden = self.taps[routed.layer], routed.outputs.shape[-1]
        self._downs[routed.layer] = routed.down
        tap.index = torch.from_numpy(routed.ids).long()
        tap.weights, tap.logits = torch.from_numpy(routed.weights.copy()), torch.from_numpy(routed.logits)
        tap.weighs_inputs = routed.weighs_inputs
        tap.experts, tap.order = torch.sort(tap.index.reshape(-1))
        outputs = torch.from_numpy(routed.outputs.reshape(-1, hidden))
        norms, peaks = norms_and_peaks(outputs, scratch(tap.buffers, hidden, outputs.device))
        if not is_finite(norms):
            bad = sorted(set(tap.index.reshape(-1)[~torch.isfinite(norms)].tolist()))
            named = ", ".join(map(str, bad[:8]))
            raise not_finite(f"decoder layer {tap.decoder_layer}, expert {named}", "the output is", OF_FILE)
        tap.left.append((tap.experts, tap.order, norms[tap.order], peaks[tap.order]))
        if tap.channels is not None:
            entering = torch.from_numpy(routed.entering.reshape(-1, routed.entering.shape[-1]))
            tap.activated(entering[tap.order])
