"""Runs in llm-compressor's environment: prunes half of the experts of a model by REAP.

    python reap_probe.py MODEL ROWS.jsonl OUT

One pass over the rows, as they are, without an update of what enters a layer from the pruned layers before it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import REAPPruningModifier
from transformers import AutoModelForCausalLM


def main(model: str, rows: str, out: str) -> None:
    """Prune, and save without a tokenizer."""
    ids = [json.loads(line)["input_ids"] for line in Path(rows).read_text().splitlines()]
    text = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    live = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    oneshot(
        model=live,
        dataset=text,
        recipe=REAPPruningModifier(sparsity=0.5, ignore=[]),
        num_calibration_samples=len(ids),
        max_seq_length=len(ids[0]),
        moe_calibrate_all_experts=False,
        propagate_error=False,
        shuffle_calibration_samples=False,
    )
    live.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
