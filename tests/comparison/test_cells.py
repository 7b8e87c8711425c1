"""The cells that a configuration expands into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moecover.checkpoints.topology import Topology
from moecover.comparison.cells import Cell, cells
from moecover.comparison.reading import read

EXAMPLES = Path(__file__).parents[2] / "examples"


TOPOLOGY = Topology("m", (1, 2), 60, 4, 8, 3)


def expanded(path: Path) -> list[Cell]:
    asked = read(path, {})
    return [c for entry in asked.config.models for c in cells(asked, entry, TOPOLOGY)]


def test_paper_grid() -> None:
    found = expanded(EXAMPLES / "paper.yaml")
    assert len(found) == 2 * (1 + 3 * (5 + 3))
    assert {c.keep for c in found} == {15, 30, 45, 60}
    config = read(EXAMPLES / "paper.yaml", {}).config
    assert (config.sequences, config.length, config.window) == (128, 2048, 2048)
    assert config.tasks == ["arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "winogrande"]
    assert config.perplexity == ["wikitext2", "c4"]
    assert {c.label for c in found} == {"full model", "random", "REAP", "ExpertSparsity", "TB-Coverage (contribution)"}


def test_tiny_example() -> None:
    found = expanded(EXAMPLES / "tiny.yaml")
    assert len(found) == 2 * (1 + 3 * (5 + 3 * 3))
    assert {c.model for c in found} == {"qwen2-moe-tiny", "deepseek-moe-tiny"}


def test_ids_do_not_depend_on_the_rest_of_the_grid(grid: Callable[..., Path]) -> None:
    small = {c.id for c in expanded(grid())}
    large = [
        c.id
        for c in expanded(
            grid(retain=[0.25, 0.5], samples=[0, 3], seeds=[0, 1, 2], saliencies=["reap", "contribution"])
        )
    ]
    assert small < set(large)
    assert len(set(large)) == len(large)
