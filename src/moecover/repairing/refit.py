"""Local refit of one MoE block: reads its parameters, inputs and wanted outputs, returns better parameters.

What a closed form cannot reach, since the output is not linear in it: the router, the gate and up projections, and
what they do together with the down projections. All are moved by Adam (Kingma and Ba, arXiv 1412.6980) on the layer's
own squared error, starting from the solved weights. Pure: tensors in, tensors out; `run` is the block. No other layer
takes part, and no gradient leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.repairing.sums import CHUNK, squares

if TYPE_CHECKING:
    import torch

    from moecover.repairing.calibration import Calibration

EPOCHS = 6  # over the tokens that are not held out
TOKENS = 512  # of a step
STEP = 0.02  # of Adam, in root mean squares of a parameter, times the root of the error's share of the output
BETAS = 0.9, 0.99
WARM_UP = 10  # steps

Run = Callable[[Mapping[str, "torch.Tensor"], "torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Refitted:
    """New parameters of a block.

    Attributes:
        values: by name, in the dtypes in which they are stored.
        errors: squared error of every corpus as a share of its squared target.
        held: weighted squared error on the held-out tokens, with the weights before and with these, as shares of the
            squared target there.
    """

    values: dict[str, torch.Tensor]
    errors: list[float]
    held: tuple[float, float]


def refit(
    run: Run,
    start: Mapping[str, torch.Tensor],
    inputs: torch.Tensor,
    target: torch.Tensor,
    calibration: Calibration,
    dtypes: Mapping[str, torch.dtype],
    most: Sequence[float],
    *,
    epochs: int = EPOCHS,
    step: float = STEP,
    tokens: int = TOKENS,
) -> Refitted | None:
    """Move all parameters of a block towards the wanted output.

    Tokens that are held out take no part; they decide, with the parameters in their stored dtypes, whether the result
    is taken. Steps are small where little is left to gain: they follow the root of the relative error.

    Args:
        run: the block's output ``[token, hidden]`` for parameters by name and inputs ``[token, hidden]``.
        start: parameters to begin with.
        inputs: of all calibration tokens, ``[token, hidden]``.
        target: the original's output, ``[token, hidden]``.
        calibration: how the tokens count.
        dtypes: in which the parameters are stored, by name.
        most: error of every corpus, as in `Refitted.errors`, that may not be exceeded where the corpus counts.
        epochs: turns over the tokens.
        step: see `STEP`.
        tokens: of a step.

    Returns:
        The new parameters; None where they do not fit the held-out tokens better than ``start``, or exceed ``most``.
    """
    import torch

    with torch.inference_mode(False), torch.no_grad():
        wanted, share = target.float(), calibration.share()  # copies: tensors of inference mode take no gradients
        given = inputs.to(torch.float32, copy=True)
        wanted = wanted.clone()

        def losses(values: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
            parts = zip(torch.split(given, CHUNK), torch.split(wanted, CHUNK), strict=True)
            errors = torch.cat([squares(y - run(values, x)) for x, y in parts])
            return calibration.by_corpus(errors) * calibration.inverse, float((errors * share * calibration.held).sum())

        whole = float((squares(wanted) * share * calibration.held).sum())
        first = {name: value.float().clone() for name, value in start.items()}
        held_before = losses(first)[1]
        if not (whole > 0 and held_before > 0):
            return None
        scale = step * math.sqrt(held_before / whole)
        rows = (~calibration.held & (share > 0)).nonzero()[:, 0]
        moved = _moved(run, first, given, wanted, share.float(), rows, scale, epochs=epochs, tokens=tokens)
        values = {name: value.to(dtypes[name]) for name, value in moved.items()}
        after, held_after = losses({name: value.float() for name, value in values.items()})
        within = (after <= torch.tensor(most, device=after.device)) | (calibration.of_corpus == 0)
    if not (held_after < held_before and bool(within.all())):
        return None
    return Refitted(values, after.tolist(), (held_before / whole, held_after / whole))


def _moved(
    run: Run,
    start: Mapping[str, torch.Tensor],
    inputs: torch.Tensor,
    target: torch.Tensor,
    share: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    *,
    epochs: int,
    tokens: int,
) -> dict[str, torch.Tensor]:
    """The parameters after all steps; see `refit`."""
    import torch

    moved = {name: value.clone().requires_grad_() for name, value in start.items()}
    sizes = {name: float(value.square().mean().sqrt()) for name, value in start.items()}
    groups = [{"params": [value], "lr": scale * sizes[name]} for name, value in moved.items()]
    optimiser = torch.optim.Adam(groups, betas=BETAS)
    steps = epochs * math.ceil(len(rows) / tokens)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda at: min(1.0, (at + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * at / steps))
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        for some in torch.split(rows[order], tokens):
            with torch.enable_grad():
                errors = (run(moved, inputs[some]) - target[some]).square().sum(1)
                loss = (errors * share[some]).mean()
                optimiser.zero_grad()
                torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return {name: value.detach() for name, value in moved.items()}


def needed_bytes(parameters: int, *, tokens: int, hidden_size: int) -> int:
    """Bytes that `refit` takes beside its arguments: float32 values, start, gradients, two moments; inputs, target."""
    return 20 * parameters + 8 * tokens * hidden_size
