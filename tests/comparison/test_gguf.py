"""GGUF models in a grid: planned on their own profile, masked in llama.cpp, beside other files of the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecover.cli.main import main
from moecover.comparison.reading import read
from moecover.evaluation.job import evaluate
from moecover.planning.artifact import Plan
from moecover.planning.run import plan_budgets
from moecover.profiling.artifact import Profile
from moecover.pruning.job import prune
from tests.support.gguf_files import plan_for
from tests.support.gguf_models import convert, needs_llama
from tests.support.grids import rows, run, written

KEPT = [[0, 1, 4, 5], [2, 3, 6, 7], [0, 2, 4, 6]]


@needs_llama
def test_a_grid_of_a_file_with_other_files(
    grid: Callable[..., Path], converted: Callable[..., Path], tmp_path: Path
) -> None:
    """Figures are those of `evaluate`, plans those of the file's profile; only new cells are run; the page has all."""
    model, cut = converted("qwen3_moe"), tmp_path / "cut.gguf"
    near = convert(model.with_name("checkpoint"), tmp_path / "near.gguf", experts="F16")
    plan_for(KEPT, layers=(0, 1, 2)).save(tmp_path / "half.json")
    out, entry = tmp_path / "run", {"model": str(model), "name": "tiny", "files": ["near.gguf"]}
    path = grid(models=[entry], seeds=[0])
    assert read(path, {}).config.methods[-1].method == "tb-coverage"
    assert run(path, out) == 0
    before = written(out)
    prune(model, tmp_path / "half.json", cut, progress=False)
    entry["files"] = ["near.gguf", {"file": str(cut), "name": "pruned"}]
    assert run(grid(models=[entry], seeds=[0]), out) == 0
    after = written(out)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"tiny-file-pruned"}
    results = json.loads((out / "results.json").read_text())
    cells = {cell["label"]: cell for cell in results["cells"]}
    assert list(cells) == ["full model", "near", "pruned", "random", "REAP", "TB-Coverage (contribution)"]
    ours = out / cells["TB-Coverage (contribution)"]["plan"]
    texts = [f"test={tmp_path / 'test.jsonl'}"]
    expected = evaluate(model, {"plan": ours}, files=[near, cut], texts=texts, length=32, windows=6, progress=False)
    for row, label in zip(expected.rows, ("full model", "TB-Coverage (contribution)", "near", "pruned"), strict=True):
        found = cells[label]["row"]
        assert found["perplexity"]["test"]["perplexity"] == row.perplexity["test"].perplexity
        assert found["perplexity"]["test"]["kl"] == row.perplexity["test"].kl
        assert (found["keep"], found["num_bytes"]) == (row.keep, row.num_bytes)
    profile = Profile.load(next((out / "profiles").rglob("profile.safetensors")).parent)
    assert Plan.load(ours).layers == plan_budgets(profile, keeps=[4])[0].layers
    assert profile.settings["device"] == "llama.cpp"
    assert [(c["a"], c["b"]) for c in results["comparisons"]] == [
        ("TB-Coverage (contribution)", "random"),
        ("TB-Coverage (contribution)", "REAP"),
        ("near", "pruned"),
        ("near", "TB-Coverage (contribution)"),
        ("pruned", "TB-Coverage (contribution)"),
    ]
    sizes = {r["label"]: (r["method"], r["value"]) for r in rows(out) if r["kind"] == "size"}
    assert sizes["pruned"] == ("file", str(cells["pruned"]["row"]["num_bytes"]))
    markdown = (out / "results.md").read_text()
    assert "\n| near | 8 |" in markdown
    assert "\n| pruned | 4 |" in markdown
    assert main(["report", str(out), "-o", str(tmp_path / "report.html"), "-q"]) == 0
    page = (tmp_path / "report.html").read_text()
    for part in ("near", "pruned", "Perplexity by size, tiny and its files", "Files at about equal bytes"):
        assert part in page


@needs_llama
@pytest.mark.parametrize(
    "fields, says",
    [
        ({"tasks": ["piqa"]}, "tasks run in transformers"),
        ({"repairs": ["ridge"]}, "repair ridge refits experts in transformers"),
        ({"methods": [{"method": "pooled", "repair": "refit"}]}, "repair refit refits experts"),
        ({"methods": ["expert-sparsity"]}, "method expert-sparsity runs the experts in transformers. Allowed: "),
        ({"dtype": "float32"}, "`dtype` float32 has no use here"),
        ({"memory_limit": "1GB"}, "`memory_limit` has no use here"),
        ({"device_map": "auto"}, "`device_map` has no use here"),
        ({"skip": True}, "experts are skipped in transformers"),
        ({"libllama": "none.so"}, "no such file. Give the shared library of llama.cpp"),
    ],
)
def test_what_needs_transformers_is_refused(
    grid: Callable[..., Path],
    converted: Callable[..., Path],
    tmp_path: Path,
    capsys: Any,
    fields: dict[str, Any],
    says: str,
) -> None:
    """In one line with that of the field, before anything is written."""
    path = grid(models=[{"model": str(converted("qwen3_moe")), "name": "tiny"}], **fields)
    assert run(path, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path}, line " in error
    assert says in error
    assert not (tmp_path / "run").exists()


def test_files_stand_beside_one_gguf_model(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    """Entries that cannot be are refused in one line; names are those of the files."""
    named = [
        {"model": "m.gguf", "files": ["a.gguf", {"file": "b-00001-of-00002.gguf"}, {"file": "a.gguf", "name": "c"}]}
    ]
    (entry,) = read(grid(models=named), {}).config.models
    assert (entry.model, entry.name) == (str(tmp_path / "m.gguf"), "m")
    assert [(file.file, file.name) for file in entry.files] == [
        (str(tmp_path / "a.gguf"), "a"),
        (str(tmp_path / "b-00001-of-00002.gguf"), "b"),
        (str(tmp_path / "a.gguf"), "c"),
    ]
    path, given = grid(), ("--corpus", "wikitext2", "--perplexity", "wikitext2", "-o", str(tmp_path / "run"))
    for arguments, says in (
        ((str(path), "--file", "a.gguf", *given), "list files in their model's entry"),
        (("m.gguf", "n.gguf", "--file", "a.gguf", *given), "--file goes with one MODEL.gguf, here are 2 models"),
        (("m.gguf", "--file", "a.gguf", "--file", "x/a.gguf", *given), "two files are called a. Give one of them"),
        (("m.gguf", "--file", "folder", *given), "rows from files are for GGUF. Give FILE.gguf"),
        ((str(tmp_path), "--file", "a.gguf", *given), "rows from files are for GGUF. Give MODEL.gguf"),
        ((str(path), "--libllama", "x.so", "-o", str(tmp_path / "run")), "no model is a GGUF file"),
    ):
        assert main(["compare", *arguments, "-q"]) == 2
        error = capsys.readouterr().err
        assert (error.count("\n"), says in error) == (1, True), error
