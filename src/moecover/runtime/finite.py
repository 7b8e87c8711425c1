"""One guard against numbers that are not finite: reads what a model's layers give, says where NaN or infinity began.

`watched` looks at the output of every decoder layer, at the last hidden states and at the logits; padding is not looked
at. A pass that has a name (`naming`: the corpus and its block, the row that is generated) ends at the first such
number. A pass without one runs on, and `taken` tells where the number came from: the harness's requests are named by
whoever knows them.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moecover.errors import InputError, arg

if TYPE_CHECKING:
    import torch

    from moecover.runtime.running import Running

OF_FILE = "The weights of the file hold NaN or infinity. Fetch or convert it again"  # cause, where no dtype is chosen
SHOWN = 8  # experts that a message lists
_local = threading.local()  # what the pass of this thread is called, its padding mask, and the first place noticed


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Name the pass that this thread runs in the block, as in ``corpus web, block 3``."""
    before = getattr(_local, "what", None)
    _local.what = what
    try:
        yield
    finally:
        _local.what = before


def name_pass(what: str) -> None:
    """Name the pass whose layer this thread runs next, until another one is named; for passes side by side."""
    _local.what = what


def rows_text(kind: str, first: int, count: int) -> str:
    """Some rows of a corpus in words, counted from 0: ``block 3`` or ``windows 4 to 7``."""
    return f"{kind} {first}" if count == 1 else f"{kind}s {first} to {first + count - 1}"


def not_finite(place: str, what: str, cause: str = "") -> InputError:
    """The error for numbers that are not finite.

    Args:
        place: a layer, an expert, an item; empty where only the pass is known.
        what: the numbers, with their verb, as in ``the output is``.
        cause: a sentence on what holds them; the general advice by default.
    """
    where = ", ".join(part for part in (getattr(_local, "what", None), place) if part)
    cause = cause or f"The weights hold NaN or infinity, or the dtype overflows (try {arg('dtype', 'float32')})"
    return InputError(f"{where}{': ' if where else ''}{what} not finite. {cause}")


def is_finite(values: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite; needs no memory for it."""
    import torch

    if not values.numel():
        return True
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def taken() -> str:
    """Where the passes of this thread that had no name first gave such a number; forgotten then. Empty: nowhere."""
    found: str = getattr(_local, "noticed", "")
    _local.noticed = ""
    return found


@contextlib.contextmanager
def watched(model: Running) -> Iterator[None]:
    """Watch the outputs of a model's decoder layers, its last hidden states and its logits until the block ends.

    Raises:
        InputError: in a pass with a name, an output that is not finite; says which, and which tensor is at fault.
    """
    from moecover.runtime.loading import backbone_of

    root = model.module
    backbone: torch.nn.Module = backbone_of(root)
    with contextlib.ExitStack() as stack:
        stack.callback(backbone.register_forward_pre_hook(_before, with_kwargs=True).remove)
        for number, name in enumerate(model.layers):
            layer = root.get_submodule(name)
            hook = functools.partial(_after_layer, number, name)
            stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        stack.callback(backbone.register_forward_hook(functools.partial(_after_all, root, model.layers)).remove)
        if backbone is not root:
            stack.callback(root.register_forward_hook(functools.partial(_after_head, root, model.layers)).remove)
        yield


def _before(module: torch.nn.Module, args: object, kwargs: dict[str, Any]) -> None:
    _local.mask = kwargs.get("attention_mask")


def _after_layer(
    number: int, name: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    if _counts_finite(output[0] if isinstance(output, tuple) else output):
        return
    entered = args[0] if args else kwargs.get("hidden_states")
    if number == 0 and not _counts_finite(entered):
        _notice("the token embedding", "its output is", "")
    else:
        culprit, cause = _cause(module, name)
        _notice(f"decoder layer {number}{culprit}", "the output is", cause)


def _after_all(
    root: torch.nn.Module, layers: tuple[str, ...], module: torch.nn.Module, args: object, output: Any
) -> None:
    if not _counts_finite(getattr(output, "last_hidden_state", None)):
        _notice("", "the last hidden states are", _cause(root, "", outside=layers)[1])


def _after_head(
    root: torch.nn.Module, layers: tuple[str, ...], module: torch.nn.Module, args: object, output: Any
) -> None:
    if not _counts_finite(getattr(output, "logits", None)):
        _notice("", "the logits are", _cause(root, "", outside=layers)[1])


def _counts_finite(values: object) -> bool:
    """Whether an output ``[sequence, position, ...]`` is finite at every token; anything else is not looked at."""
    import torch

    if not isinstance(values, torch.Tensor) or not values.is_floating_point() or is_finite(values):
        return True
    mask = getattr(_local, "mask", None)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and values.dim() > 2 and len(mask) == len(values):
        tokens = mask[:, -values.shape[1] :].bool().to(values.device)  # with a cache the mask covers earlier tokens too
        return tokens.shape == values.shape[:2] and is_finite(values[tokens])
    return False


def _notice(place: str, what: str, cause: str) -> None:
    """End a pass that has a name; note the place in one that has none."""
    if getattr(_local, "what", None) is not None:
        raise not_finite(place, what, cause)
    if not getattr(_local, "noticed", ""):
        _local.noticed = f"{place}{': ' if place else ''}{what} not finite. {cause}".strip()


def _cause(module: torch.nn.Module, name: str, *, outside: tuple[str, ...] = ()) -> tuple[str, str]:
    """The experts at fault, as the end of a place, and a sentence on the tensor that holds such numbers."""
    import torch

    skipped = tuple(f".{layer}." for layer in outside)
    for key, value in module.named_parameters():
        full = f"{name}.{key}" if name else key
        if value.is_meta or not value.is_floating_point() or any(part in f".{full}" for part in skipped):
            continue
        if value.element_size() > 1 and not is_finite(value.detach()):
            ids = (
                (~torch.isfinite(value.detach())).flatten(1).any(1).nonzero().flatten().tolist()
                if value.dim() > 2
                else []
            )
            experts = f", expert {', '.join(map(str, ids[:SHOWN]))}" if ids and "experts" in key else ""
            return experts, f"{full} holds NaN or infinity"
    return "", ""
