"""Processes that share the repair of a layer decide alike, although one computes otherwise.

The one that differs does so by far more than any rounding. A decision of its own would leave the other one waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moecover.repairing.parts import Part, whole
from moecover.repairing.solver import Fit, fit
from moecover.repairing.sums import Block
from moecover.runtime.world import World
from tests.support.ranks import in_ranks

TOKENS, HIDDEN, WIDTH = 240, 10, 5
HERE = threading.local()  # has the rank of the process


def blocks_of(mine: torch.Tensor) -> tuple[list[Block], torch.Tensor]:
    """Two experts on some of the tokens, and a target that neither gives."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    found = []
    for name in ("0", "1"):
        weight = torch.randn(HIDDEN, WIDTH, generator=generator, dtype=torch.float64)
        features = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
        target += features @ (weight + 0.5 * weight.roll(1, 0)).T
        found.append(Block(name, weight, torch.arange(len(mine)), features[mine]))
    return found, target[mine]


def shared(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Fit]:
    """The fits of two processes, each of which has every other token."""
    corpus = (torch.arange(TOKENS) >= 150).long()

    def one(here: World) -> Fit:
        HERE.rank = here.rank
        mine = torch.arange(here.rank, TOKENS, 2)
        blocks, target = blocks_of(mine)
        return fit(blocks, target, Part(corpus, mine, here), kind="ridge", **options)

    found = in_ranks(monkeypatch, one)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def alone() -> Fit:
    blocks, target = blocks_of(torch.arange(TOKENS))
    return fit(blocks, target, whole((torch.arange(TOKENS) >= 150).long()), kind="ridge")


def differing(original: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function that gives something else in the second process."""

    def found(*arguments: Any, **options: Any) -> Any:
        value = original(*arguments, **options)
        return change(value) if getattr(HERE, "rank", 0) == 1 else value

    return found


def test_two_processes_repair_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone()
    for found in shared(monkeypatch):
        assert found.penalties == expected.penalties
        assert found.after == pytest.approx(expected.after, rel=1e-9)
        for name, weight in expected.weights.items():
            torch.testing.assert_close(found.weights[name], weight, rtol=1e-9, atol=1e-9)


def test_what_one_process_computes_otherwise_chooses_no_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = differing(torch.linalg.lstsq, lambda found: SimpleNamespace(solution=-3 * found.solution))
    monkeypatch.setattr("torch.linalg.lstsq", solve)
    first, other = shared(monkeypatch)
    assert (first.penalties, first.kept, first.after) == (other.penalties, other.kept, other.after)


def test_sweeps_end_in_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The penalty, part of the objective, is another number in one of them."""
    monkeypatch.setattr("torch.cholesky_solve", differing(torch.cholesky_solve, torch.zeros_like))
    for tolerance in (0.05 * number for number in range(1, 20)):
        first, other = shared(monkeypatch, penalties=(1.0,), held_share=0.0, tolerance=tolerance)
        assert first.after == other.after


def test_a_step_that_is_not_finite_in_one_process_is_taken_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    infinite = differing(torch.cholesky_solve, lambda step: torch.full_like(step, torch.inf))
    monkeypatch.setattr("torch.cholesky_solve", infinite)
    first, other = shared(monkeypatch)
    assert list(first.penalties) == ["scale"]
    for name, weight in first.weights.items():
        torch.testing.assert_close(other.weights[name], weight, rtol=1e-9, atol=1e-9)


def test_a_factorisation_that_fails_in_one_process_is_used_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = differing(torch.linalg.cholesky_ex, lambda found: (found.L, torch.ones_like(found.info)))
    monkeypatch.setattr("torch.linalg.cholesky_ex", fails)
    used: list[int] = []
    solve = torch.cholesky_solve

    def noted(*arguments: Any) -> torch.Tensor:
        used.append(HERE.rank)
        return solve(*arguments)

    monkeypatch.setattr("torch.cholesky_solve", noted)
    first, other = shared(monkeypatch)
    assert used == []
    monkeypatch.undo()
    for name, weight in alone().weights.items():
        for found in (first, other):
            torch.testing.assert_close(found.weights[name], weight, rtol=1e-8, atol=1e-8)
