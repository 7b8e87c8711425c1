"""The folder that is copied and damaged: a tiny model and everything that the program writes from it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import yaml

from moecover.cli.main import main
from tests.support.gguf_files import plan_for, write_gguf
from tests.support.grids import write_text_file
from tests.support.runs import make_run
from tests.support.tiny import make_checkpoint


def made_base(base: Path) -> Path:
    """Write the folder; every file that `targets.TARGETS` names is in it."""
    model = make_checkpoint(base / "model", "qwen3_moe", shards=True)
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    text = ["--sequences", "4", "--length", "16"]
    for number, name in enumerate("ab"):
        write_text_file(base / f"{name}.jsonl", number, words=240)
    _run("profile", model, "--corpus", f"a={base / 'a.jsonl'}", *text, "-o", base / "profile")
    _run("profile", model, "--corpus", f"b={base / 'b.jsonl'}", *text, "-o", base / "other")
    _run("plan", base / "profile", "--keep", 4, "-o", base / "plan.json")
    _run("prune", model, "--plan", base / "plan.json", "-o", base / "cut")
    as_list = ["--export", "llm-compressor", "-o", base / "list.json"]
    _run("plan", "--from", base / "plan.json", "--model", model, *as_list)
    held_out = ["--perplexity", f"b={base / 'b.jsonl'}", "--length", 16, "--windows", 2]
    _run("evaluate", model, "--plan", base / "plan.json", *held_out, "-o", base / "evaluation")
    make_run(base / "run", models=(("tiny", 2, 8),), budgets=(0.5,), tasks=("boolq",), texts=("t",), corpora=("a",))
    (base / "plugin.py").write_text("")
    gguf = write_gguf(base / "m.gguf", "qwen3moe")
    plan_for([[0, 2, 5], [1, 3, 4]]).save(base / "gguf-plan.json")
    _run("prune", gguf, "--plan", base / "gguf-plan.json", "-o", base / "cut.gguf")
    grid = {
        "models": ["model"],
        "calibration": [["a=a.jsonl"]],
        "methods": ["tb-coverage"],
        "retain": [0.5],
        "sequences": 2,
        "length": 16,
        "perplexity": ["b=b.jsonl"],
        "window": 16,
        "windows": 1,
    }
    (base / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return base


def _run(*arguments: object) -> None:
    with contextlib.redirect_stdout(None):
        assert main([*map(str, arguments), "-q"]) == 0
