"""Processes that share the repair of a layer decide alike, although one computes otherwise; threads stand for them.

The one that differs does so by far more than any rounding. A decision of its own would leave the others waiting for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moecover.repairing.parts import Part, whole
from moecover.repairing.solver import Fit, fit
from moecover.repairing.sums import Block
from moecover.runtime.world import World

TOKENS, HIDDEN, WIDTH = 240, 10, 5
OTHER = "other"  # begins the name of the thread that differs


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over two threads; one that comes alone is an error after a while."""
    meeting, given = threading.Barrier(2, timeout=5), dict[int, torch.Tensor]()

    def total(here: World, values: torch.Tensor) -> torch.Tensor:
        if here.size == 1:
            return values
        given[here.rank] = values
        meeting.wait()
        found = given[0] + given[1]
        meeting.wait()
        return found

    monkeypatch.setattr("moecover.repairing.parts.total", total)


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


def in_two_threads(**options: Any) -> list[Fit]:
    corpus = (torch.arange(TOKENS) >= 150).long()

    def one(rank: int) -> Fit:
        mine = torch.arange(rank, TOKENS, 2)
        blocks, target = blocks_of(mine)
        part = Part(corpus, mine, World(rank=rank, size=2, local_rank=rank, local_size=2))
        return fit(blocks, target, part, kind="ridge", **options)

    with ThreadPoolExecutor(1, "first") as first, ThreadPoolExecutor(1, OTHER) as other:
        waiting = first.submit(one, 0), other.submit(one, 1)
        return [each.result() for each in waiting]


def alone() -> Fit:
    blocks, target = blocks_of(torch.arange(TOKENS))
    return fit(blocks, target, whole((torch.arange(TOKENS) >= 150).long()), kind="ridge")


def differing(original: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function that gives something else in one of the threads."""

    def found(*arguments: Any, **options: Any) -> Any:
        value = original(*arguments, **options)
        return change(value) if threading.current_thread().name.startswith(OTHER) else value

    return found


def test_two_processes_repair_as_one(reduced: None) -> None:
    expected = alone()
    for found in in_two_threads():
        assert found.penalties == expected.penalties
        assert found.after == pytest.approx(expected.after, rel=1e-9)
        for name, weight in expected.weights.items():
            torch.testing.assert_close(found.weights[name], weight, rtol=1e-9, atol=1e-9)


def test_what_one_process_computes_otherwise_chooses_no_factors(reduced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = differing(torch.linalg.lstsq, lambda found: SimpleNamespace(solution=-3 * found.solution))
    monkeypatch.setattr("torch.linalg.lstsq", solve)
    first, other = in_two_threads()
    assert (first.penalties, first.kept, first.after) == (other.penalties, other.kept, other.after)


def test_sweeps_end_in_all_processes(reduced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The penalty, part of the objective, is another number in one of them."""
    monkeypatch.setattr("torch.cholesky_solve", differing(torch.cholesky_solve, torch.zeros_like))
    for tolerance in (0.05 * number for number in range(1, 20)):
        first, other = in_two_threads(penalties=(1.0,), held_share=0.0, tolerance=tolerance)
        assert first.after == other.after


def test_a_step_that_is_not_finite_in_one_process_is_taken_by_none(
    reduced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    infinite = differing(torch.cholesky_solve, lambda step: torch.full_like(step, torch.inf))
    monkeypatch.setattr("torch.cholesky_solve", infinite)
    first, other = in_two_threads()
    assert list(first.penalties) == ["scale"]
    for name, weight in first.weights.items():
        torch.testing.assert_close(other.weights[name], weight, rtol=1e-9, atol=1e-9)


def test_a_factorisation_that_fails_in_one_process_is_used_by_none(
    reduced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = differing(torch.linalg.cholesky_ex, lambda found: (found.L, torch.ones_like(found.info)))
    monkeypatch.setattr("torch.linalg.cholesky_ex", fails)
    used: list[str] = []
    solve = torch.cholesky_solve

    def noted(*arguments: Any) -> torch.Tensor:
        used.append(threading.current_thread().name)
        return solve(*arguments)

    monkeypatch.setattr("torch.cholesky_solve", noted)
    first, other = in_two_threads()
    assert used == []
    for name, weight in alone().weights.items():
        for found in (first, other):
            torch.testing.assert_close(found.weights[name], weight, rtol=1e-8, atol=1e-8)
