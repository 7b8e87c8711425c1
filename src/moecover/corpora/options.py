"""Keyword arguments of every job that reads calibration text; small, since jobs that read none name them too."""

from __future__ import annotations

from typing import TypedDict

from moecover.runtime.options import RunOptions


class TextOptions(TypedDict, total=False):
    """Keyword arguments of every job that reads calibration text.

    Attributes:
        sequences: blocks per corpus; None for up to 128 (all rows of ``input_ids``).
        length: tokens per block; None for 2048, or the model's positions if fewer.
        seed: of the sample of blocks; 0 by default.
        bos: what blocks of text begin with: ``auto`` (default) what the tokenizer adds by itself, ``always`` its BOS
            token, ``never`` nothing. Rows of ``input_ids`` are taken as they are.
    """

    sequences: int | None
    length: int | None
    seed: int
    bos: str | None


class JobOptions(RunOptions, TextOptions, total=False):
    """Keyword arguments of a job that runs a model on calibration text."""
