"""The experts in a graph of llama.cpp: which tensors hold routing, inputs and outputs of a layer, by their names.

llama.cpp names the tensors of every architecture alike (``llm_graph_context::build_moe_ffn``): ``ffn_moe_logits-N``,
``ffn_moe_weights..-N`` and so on for block N. What a later tensor has overwritten cannot be read: routing weights and
selected ids are still needed when the down projection has run, the logits are read when they are there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moecover.errors import InputError
from moecover.llama.library import Library
from moecover.llama.tensors import Tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOGITS, PROBABILITIES = ("ffn_moe_logits", "ffn_moe_logits_biased"), "ffn_moe_probs"
WEIGHTS = ("ffn_moe_weights", "ffn_moe_weights_softmax", "ffn_moe_weights_norm", "ffn_moe_weights_scaled")
WEIGHTED, TOP_K, BIASED_PROBABILITIES = "ffn_moe_weighted", "ffn_moe_topk", "ffn_moe_probs_biased"
DOWN, SCALED, BIASED = "ffn_moe_down", "ffn_moe_down_scaled", "ffn_moe_down_biased"
BEFORE_HEAD = b"result_norm"


class Routed(NamedTuple):
    """What one MoE layer computed for the tokens of a chunk, in llama.cpp's memory: valid within the call.

    Attributes:
        layer: index of the MoE layer.
        logits: of the router, float32 ``[token, expert]``.
        ids: selected experts, int32 ``[token, slot]``.
        weights: routing weights as they are used, float32 ``[token, slot]``.
        weighs_inputs: whether they scale the experts' inputs instead of their outputs.
        entering: input of the down projections, float32 ``[token, slot, channel]``.
        outputs: of the experts before weighting, float32 ``[token, slot, hidden]``.
        down: the down projections, for `Tensors.matrices`.
    """

    layer: int
    logits: NDArray[np.float32]
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    weighs_inputs: bool
    entering: NDArray[np.float32]
    outputs: NDArray[np.float32]
    down: Any


@dataclass
class _Layer:
    """What was seen of a layer in the graph that runs."""

    logits: NDArray[np.float32] | None = None
    weights: Any = None  # the last tensor with them
    early: NDArray[np.float32] | None = None  # weights that scale inputs
    product: Any = None  # of the down projections, before a scale and a bias
    held: tuple[NDArray[np.int32], NDArray[np.float32]] | None = None  # ids and inputs, where more follows the product
    done: bool = False  # whether it was handed over


@functools.cache
def named(name: bytes) -> tuple[str, int]:
    """What a tensor of a block is, and the block; an empty text for any other tensor."""
    what, dash, number = name.decode(errors="replace").rpartition("-")
    return (what, int(number)) if dash and number.isdecimal() else ("", -1)


def holds_logits(what: str, tensor: Any, null: Any) -> bool:
    """Whether a tensor is the router's logits.

    Where the softmax is taken over the selected experts only, the logits themselves are called probabilities: they are
    a product or a sum then, of two tensors, and not a function of one.
    """
    return what in LOGITS or (what == PROBABILITIES and tensor.src[1] != null)


@dataclass
class Recorder:
    """A watch (`model.Watch`) that hands over what every MoE layer computes, and runs no language-model head.

    Attributes:
        library: that runs the model.
        decoder_layers: blocks with experts, in order.
        names: of the file's tensors.
        use: receives each layer.
        head: whether the head runs too.
    """

    library: Library
    decoder_layers: Sequence[int]
    names: Collection[str]
    use: Callable[[Routed], None]
    head: bool = False
    tensors: Tensors = field(init=False)
    _seen: dict[int, _Layer] = field(init=False, default_factory=dict)
    _missing: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors, self._missing = Tensors(self.library), set(self.decoder_layers)
        self._last = {number: self._last_of(number) for number in self.decoder_layers}
        self._scaled = any(last == SCALED for last in self._last.values()) or any(
            f"blk.{number}.ffn_down_exps.scale" in self.names for number in self.decoder_layers
        )

    def _last_of(self, number: int) -> str:
        """The tensor that holds the outputs of a block's experts, biases and scales included."""
        stem = f"blk.{number}.ffn_down_exps."
        return BIASED if f"{stem}bias" in self.names else SCALED if f"{stem}scale" in self.names else DOWN

    def __call__(self, tensor: Any, ask: bool) -> bool:
        """See `model.Watch`."""
        name = self.tensors.name(tensor)
        if name == BEFORE_HEAD:
            return ask and not self.head
        what, number = named(name)
        if number not in self._last and self._scaled:
            what, number = self._unnamed(tensor)
        if number not in self._last:
            return False
        return self._wanted(what, number, tensor) if ask else self._take(what, number, tensor)

    def _unnamed(self, tensor: Any) -> tuple[str, int]:
        """A product with down projections that has no name of its own, because a scale follows."""
        null = self.library.ffi.NULL
        if tensor.src[2] == null or tensor.src[0] == null:
            return "", -1
        parts = self.tensors.name(tensor.src[0]).decode(errors="replace").split(".", 2)
        return (DOWN, int(parts[1])) if parts[0] == "blk" and parts[-1] == "ffn_down_exps.weight" else ("", -1)

    def _wanted(self, what: str, number: int, tensor: Any) -> bool:
        if holds_logits(what, tensor, self.library.ffi.NULL):
            if number in self._seen and self._seen[number].done:
                del self._seen[number]
            return True
        seen = self._seen.setdefault(number, _Layer())
        if what in WEIGHTS:
            seen.weights = tensor
        early = what == WEIGHTED and seen.product is None and not seen.done
        return what in (DOWN, self._last[number]) or early

    def _take(self, what: str, number: int, tensor: Any) -> bool:
        seen, null = self._seen.setdefault(number, _Layer()), self.library.ffi.NULL
        if holds_logits(what, tensor, null):
            seen.logits = np.array(self._table(tensor))
        elif what == WEIGHTED:
            seen.early = np.array(self._weights(tensor.src[1]))
        if what == DOWN:
            if tensor.src[2] == null:
                raise self._unknown(number)
            seen.product = tensor
            if what != self._last[number]:
                ids = self._ids(tensor)
                seen.held = ids.copy(), self._slots(tensor.src[1], ids).copy()
        if what == self._last[number]:
            self._finish(number, tensor, seen)
        return True

    def _finish(self, number: int, tensor: Any, seen: _Layer) -> None:
        if seen.product is None or seen.logits is None or (seen.early is None and seen.weights is None):
            raise self._unknown(number)
        ids, entering = seen.held or (self._ids(seen.product), None)
        if entering is None:
            entering = self._slots(seen.product.src[1], ids)
        early = seen.early is not None
        weights = seen.early if seen.early is not None else self._weights(seen.weights)
        self._missing.discard(number)
        self.use(
            Routed(
                self.decoder_layers.index(number),
                seen.logits,
                ids,
                weights.reshape(ids.shape),
                early,
                entering,
                self._slots(tensor, ids),
                seen.product.src[0],
            )
        )
        self._seen[number] = _Layer(done=True)

    def _table(self, tensor: Any) -> NDArray[np.float32]:
        """A tensor ``[token, expert]``, also where there is one token."""
        return self.tensors.array(tensor).reshape(-1, tensor.ne[0])

    def _weights(self, tensor: Any) -> NDArray[np.float32]:
        return np.ascontiguousarray(self.tensors.array(tensor)).reshape(-1)

    def _ids(self, product: Any) -> NDArray[np.int32]:
        ids = self.tensors.array(product.src[2])
        return np.ascontiguousarray(ids).reshape(-1, product.src[2].ne[0])

    def _slots(self, tensor: Any, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        return self.tensors.array(tensor).reshape(*ids.shape, tensor.ne[0])

    def check(self) -> None:
        """Refuse a model of which a chunk has run and some layer was not seen.

        Raises:
            InputError: names the block.
        """
        if self._missing:
            raise self._unknown(min(self._missing))

    def _unknown(self, number: int) -> InputError:
        return InputError(
            f"llama.cpp {self.library.version} does not show the experts of blk.{number} in the way that is known, so "
            "this architecture cannot be profiled as GGUF: profile the original, its plan applies here too"
        )
