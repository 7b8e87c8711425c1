"""Made-up scores of two methods, for the tests of their differences."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SIZES = {"arc": 40, "boolq": 150, "piqa": 80}


def answers(
    rng: np.random.Generator, sizes: dict[str, int], gain: float = 0.0, agree: float = 0.7
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Right and wrong answers of two methods to the same items; they share an answer with probability ``agree``."""
    a, b = {}, {}
    for i, (task, n) in enumerate(sizes.items()):
        level = 0.4 + 0.1 * i
        b[task] = (rng.random(n) < level).astype(float)
        a[task] = np.where(rng.random(n) < agree, b[task], rng.random(n) < level + gain).astype(float)
    return a, b


def windows(rng: np.random.Generator, n: int, shift: float = 0.0) -> tuple[Array, Array]:
    """Windows of unequal length of two methods whose log perplexities differ by ``shift`` in truth."""
    tokens = rng.integers(50, 400, size=n).astype(float)
    hardness = 3 + 0.5 * rng.standard_normal(n)
    b = np.stack([tokens * hardness, tokens], axis=1)
    a = np.stack([tokens * (hardness + shift + 0.03 * rng.standard_normal(n)), tokens], axis=1)
    return a, b
