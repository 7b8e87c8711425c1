"""A tiny grid for the tests of comparisons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.grids import write_text_file


@pytest.fixture
def grid(tmp_path: Path, checkpoints: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a configuration of a tiny grid and gives its path; keywords replace or add fields, None removes them."""
    for number, name in enumerate(("a", "b", "test")):
        write_text_file(tmp_path / f"{name}.jsonl", number)
    base: dict[str, Any] = {
        "models": [{"model": str(checkpoints("qwen2_moe")), "name": "qwen"}],
        "calibration": [["a=a.jsonl", "b=b.jsonl"]],
        "sequences": 6,
        "length": 32,
        "search_tokens": 128,
        "seeds": [0, 1],
        "retain": [0.5],
        "perplexity": ["test=test.jsonl"],
        "window": 32,
        "windows": 6,
    }

    def write(name: str = "grid.yaml", **fields: Any) -> Path:
        value = {k: v for k, v in {**base, **fields}.items() if v is not None}
        (tmp_path / name).write_text(yaml.safe_dump(value, sort_keys=False))
        return tmp_path / name

    return write
