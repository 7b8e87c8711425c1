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
    from moecover.repairing.parts import Part

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
        held: weighted squared error of the trial on the held-out tokens, before and after its steps, as shares of the
            squared target there.
    """

    values: dict[str, torch.Tensor]
    errors: list[float]
    held: tuple[float, float]


def refit(
    run: Run,
    trial: Mapping[str, torch.Tensor],
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

    Whether steps help on other text is tried first, on tokens that neither the solved parameters nor the steps of the
    trial have seen. The steps that count then begin with parameters that were solved on all tokens, and run over all.
    Steps are small where little is left to gain: they follow the root of the relative error.

    Args:
        run: the block's output ``[token, hidden]`` for parameters by name and inputs ``[token, hidden]``.
        trial: parameters that the trial begins with, solved without the held-out tokens.
        start: parameters to begin with, solved on all tokens.
        inputs: of all calibration tokens, ``[token, hidden]``.
        target: the original's output, ``[token, hidden]``.
        calibration: how the tokens count.
        dtypes: in which the parameters are stored, by name.
        most: error of every corpus, as in `Refitted.errors`, that may not be exceeded where the corpus counts.
        epochs: turns over the tokens; a third as many in the trial.
        step: see `STEP`.
        tokens: of a step.

    Returns:
        The new parameters; None where the trial does not fit the held-out tokens better, or ``most`` is exceeded.
    """
    import torch

    with torch.inference_mode(False), torch.no_grad():
        # Copies: tensors of inference mode take no gradients.
        given, wanted = inputs.to(torch.float32, copy=True), target.to(torch.float32, copy=True)
        share, held, total = calibration.share(), calibration.held, calibration.part.total

        def errors(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
            parts = zip(torch.split(given, CHUNK), torch.split(wanted, CHUNK), strict=True)
            return torch.cat([squares(y - run(values, x)) for x, y in parts])

        def on_held(each: torch.Tensor) -> float:
            return float(total((each * share * held).sum()))

        whole, before = on_held(squares(wanted)), on_held(errors(trial))
        if not (whole > 0 and before > 0):
            return None
        scale = step * math.sqrt(before / whole)
        text = given, wanted, share.float()
        part, fitted = calibration.part, calibration.counting(held=False)
        tried = _moved(run, trial, text, fitted, part, scale, epochs=-(-epochs // 3), tokens=tokens)
        if not (after := on_held(errors(tried))) < before:
            return None
        moved = _moved(run, start, text, calibration.counting(held=True), part, scale, epochs=epochs, tokens=tokens)
        values = {name: value.to(dtypes[name]) for name, value in moved.items()}
        each = errors({name: value.float() for name, value in values.items()})
        found = calibration.by_corpus(each) * calibration.inverse
        within = (found <= torch.tensor(most, device=found.device)) | (calibration.of_corpus == 0)
    return Refitted(values, found.tolist(), (before / whole, after / whole)) if bool(within.all()) else None


def _moved(
    run: Run,
    start: Mapping[str, torch.Tensor],
    text: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    part: Part,
    scale: float,
    *,
    epochs: int,
    tokens: int,
) -> dict[str, torch.Tensor]:
    """The parameters after all steps over some tokens.

    Args:
        run: see `refit`.
        start: see `refit`.
        text: inputs, target and share of every token of this process.
        rows: tokens of all processes.
        part: which of them are here.
        scale: of a step.
        epochs: turns over the tokens.
        tokens: of a step, of all processes.
    """
    import torch

    inputs, target, share = text
    moved = {name: value.clone().requires_grad_() for name, value in start.items()}
    sizes = {name: float(value.square().mean().sqrt()) for name, value in start.items()}
    groups = [{"params": [value], "lr": scale * sizes[name]} for name, value in moved.items()]
    optimiser = torch.optim.Adam(groups, betas=BETAS)
    steps = epochs * math.ceil(len(rows) / tokens)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda at: min(1.0, (at + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * at / steps))
    )
    generator = torch.Generator().manual_seed(0)
    place = torch.full_like(part.everyone, -1)  # of a token among those of this process
    place[part.mine] = torch.arange(len(part.mine), device=rows.device)
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        for some in torch.split(rows[order], tokens):
            here = place[some]
            here = here[here >= 0]
            optimiser.zero_grad()
            if len(here) > 0:
                with torch.enable_grad():
                    errors = (run(moved, inputs[here]) - target[here]).square().sum(1)
                    torch.autograd.backward((errors * share[here]).sum() / len(some))
            for value in moved.values() if part.here.size > 1 else ():
                value.grad = part.total(torch.zeros_like(value) if value.grad is None else value.grad)
            optimiser.step()
            schedule.step()
    return {name: value.detach() for name, value in moved.items()}


def needed_bytes(parameters: int, *, tokens: int, hidden_size: int) -> int:
    """Bytes that `refit` takes: float32 values, two starts, gradients and two moments; copies of inputs and target."""
    return 24 * parameters + 8 * tokens * hidden_size
