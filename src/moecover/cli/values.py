"""Values of options as people write them: shares in percent, short names of dtypes."""

from __future__ import annotations

DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def share(text: str) -> float:
    """A share, as 0.5 or 50%.

    Raises:
        ValueError: it is no number.
    """
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def dtype(text: str) -> str:
    """A dtype by torch's name, from that or a short one."""
    return DTYPE_NAMES.get(text, text)
