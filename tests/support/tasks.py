"""Task files for lm-evaluation-harness, small enough to score in a moment, and plans at random."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moecover.checkpoints.structure import Structure
from moecover.planning.artifact import LayerPlan, Plan

ARC = [
    {
        "id": str(i),
        "question": f"Which is number {i}?",
        "choices": {"text": ["one", "two", f"the {i}th"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[i % 3],
    }
    for i in range(7)
]
BLIMP = [
    {"uid": uid, "good": f"the cats {i} sleep", "bad": f"the cats {i} sleeps"}
    for uid in ("adjunct_island", "drop_argument")
    for i in range(3)
]


def write_rows(folder: Path, **splits: Sequence[Mapping[str, object]]) -> None:
    """One JSONL file a split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


LETTERS = """task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}/arc_easy/test.jsonl}}}}
test_split: test
fewshot_split: test
num_fewshot: 2
output_type: {kind}
doc_to_text: >-
  {{{{question}}}} {{% for one in choices.text %}}{{{{choices.label[loop.index0]}}}}. {{{{one}}}} {{% endfor %}}Answer:
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: ["A", "B", "C"]
metric_list: [{{metric: {metric}}}]
"""


def own_task(data: Path, kind: str = "multiple_choice", metric: str = "acc") -> Path:
    """A folder with a task whose choices are one token each, of one context with two examples drawn by chance."""
    folder = data.parent / f"own-{kind}"
    folder.mkdir()
    (folder / "letters.yaml").write_text(LETTERS.format(data=data, kind=kind, metric=metric))
    return folder


def random_plan(structure: Structure, keep: int, seed: int = 0) -> Plan:
    """Experts drawn by chance, others in every layer."""
    topology, chance = structure.topology, np.random.default_rng(seed)
    kept = [sorted(map(int, chance.choice(topology.num_experts, keep, replace=False))) for _ in topology.decoder_layers]
    layers = [LayerPlan(decoder_layer=d, kept=k) for d, k in zip(topology.decoder_layers, kept, strict=True)]
    return Plan(schema=1, keep=keep, layers=layers)
