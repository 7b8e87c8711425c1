"""The demo and the shipped model: what a newcomer sees first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moecover.checkpoints.inspection import inspect
from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import read_structure
from moecover.cli import tour
from moecover.cli.demo import markdown_table, rows_from_json
from moecover.cli.main import main
from moecover.cli.tour import HELD_OUT, runs
from moecover.corpora.packing import load_corpus
from moecover.corpora.tokenizer import load_tokenizer
from moecover.evaluation.perplexity import perplexity
from moecover.planning.artifact import keep_all
from moecover.planning.masking import masked
from moecover.profiling.run import profile
from moecover.runtime.loading import load_model
from moecover.shrinking.quality import QUALITIES, Quality
from tests.conftest import quick_dtype

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["less text", pytest.param("all of it", marks=pytest.mark.slow)])
def demo_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the demo writes, in the gate on less text and with fewer seeds, which takes most of its time."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "less text":
            for name, value in (("SEQUENCES", 8), ("LENGTH", 128), ("SEARCH_TOKENS", 1024), ("SEEDS", (0, 1))):
                patched.setattr(tour, name, value)
            patched.setitem(QUALITIES, "fast", Quality(8, 6, "ridge", 4096, 2, "little"))
        assert main(["demo", "-o", str(folder), "-q", "--dtype", quick_dtype()]) == 0
        yield folder


def test_demo_writes_what_it_says(demo_folder: Path) -> None:
    assert sorted(p.name for p in demo_folder.iterdir()) == [
        "explained",
        "moecover-demo.json",
        "plans",
        "profile",
        "pruned-50",
        "shrink-work",
        "shrunk-25",
        "shrunk-50",
    ]
    results = json.loads((demo_folder / "moecover-demo.json").read_text())
    assert results["verified"]["equal"] is True
    rows = rows_from_json((demo_folder / "moecover-demo.json").read_text())
    expected = [(label, b) for b in (0.5, 0.25) for label in (*(run.label for run in runs()), "shrink")]
    assert [(r.label.partition(",")[0], r.retain) for r in rows] == [
        (label.partition(",")[0], b) for label, b in [("full model", 1.0), *expected]
    ]
    assert all(set(r.perplexity) == set(HELD_OUT) for r in rows)
    full = rows[0]
    for row in rows[1:]:
        assert row.size_bytes < full.size_bytes
        assert row.geometric_mean() > full.geometric_mean()
    by_name = {(r.label, r.keep): r.geometric_mean() for r in rows}
    # The claims of the first screen: chosen experts are worth more than random ones, and thinner, repaired ones more.
    for retain in (0.5, 0.25):
        at = {r.label.partition(",")[0]: r for r in rows if r.retain == retain}
        assert at["shrink"].geometric_mean() < at[runs()[0].label].geometric_mean()
        assert at["shrink"].size_bytes <= 1.02 * at[runs()[0].label].size_bytes
    for keep in (30, 15):
        assert by_name[runs()[0].label, keep] < by_name[runs()[-1].label, keep]
    assert markdown_table(rows).count("\n") == len(rows) + 1


def test_the_written_checkpoint_speaks(demo_folder: Path) -> None:
    folder = demo_folder / "pruned-50"
    dtype = quick_dtype()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The river rises in", return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert len(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]).split()) >= 3


def test_a_second_demo_replaces_the_first_and_nothing_else(demo_folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.json").write_text("{}")
    assert main(["demo", "-o", str(tmp_path / "mine")]) == 2
    assert "was not written by moecover" in capsys.readouterr().err


def test_shipped_model_is_small_trained_and_in_the_right_shape() -> None:
    folder = shipped_model()
    assert sum(p.stat().st_size for p in folder.iterdir()) < 20_000_000
    facts = inspect(folder)
    assert (facts["family"], facts["experts"], facts["top_k"], facts["shared_experts"]) == ("qwen2_moe", 60, 4, 1)
    config = json.loads((folder / "config.json").read_text())
    assert config["norm_topk_prob"] is False
    assert config["vocab_size"] >= 4096
    record = json.loads((folder / "training.json").read_text())
    assert record["bits_per_byte"]["wikitext2"] <= 1.53
    assert record["bits_per_byte"]["c4"] <= 1.93
    card = (folder / "README.md").read_text()
    for figure in record["bits_per_byte"].values():
        assert f"{figure:.3f}" in card
    assert f"{record['tokens'] / 1e6:.1f} M tokens" in card


def test_second_shipped_model_is_small_trained_and_in_the_right_shape() -> None:
    folder = shipped_model("deepseek-moe-tiny")
    assert sum(p.stat().st_size for p in folder.iterdir()) < 20_000_000
    facts = inspect(folder)
    assert (facts["family"], facts["experts"], facts["top_k"], facts["shared_experts"]) == ("deepseek", 64, 6, 2)
    assert facts["moe_layers"] == [1, 2, 3, 4]  # the first layer is dense
    record, card = json.loads((folder / "training.json").read_text()), (folder / "README.md").read_text()
    for figure in record["bits_per_byte"].values():
        assert f"{figure:.3f}" in card
    structure = read_structure(folder)
    model = load_model(structure, dtype=quick_dtype())
    for name in HELD_OUT:
        assert perplexity(model, load_corpus(name, structure=structure, length=256)[:4]) < 300


def test_shipped_model_predicts_held_out_text() -> None:
    structure = read_structure(shipped_model())
    tokenizer, model = load_tokenizer(shipped_model()), load_model(structure, dtype=quick_dtype())
    for name in HELD_OUT:
        corpus = load_corpus(name, tokenizer=tokenizer, length=256)[:8]
        assert perplexity(model, corpus) < 200 < structure.checkpoint.config["vocab_size"]
        with masked(model, structure, keep_all(structure.topology)):
            assert perplexity(model, corpus) == perplexity(model, corpus)


def test_shipped_routers_are_specialised() -> None:
    """In every layer the busiest quarter of the experts takes well over a quarter of the tokens, and corpora differ."""
    structure = read_structure(shipped_model())
    tokenizer = load_tokenizer(shipped_model())
    corpora = [load_corpus(name, tokenizer=tokenizer, length=256)[:16] for name in HELD_OUT]
    made = profile(structure, corpora, batch_size=16, dtype=quick_dtype())
    for layer in range(len(structure.topology.decoder_layers)):
        quarters = []
        for name in HELD_OUT:
            count = made.statistics[name]["count"][layer]
            busiest = count.argsort()[-15:]
            assert count[busiest].sum() / count.sum() > 0.4
            quarters.append(set(busiest.tolist()))
        assert quarters[0] != quarters[2]
        assert len(quarters[0] & quarters[2]) < 13


def test_generated_docs_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr


def test_readme_names_commands_that_exist() -> None:
    from moecover.cli.main import make_parser

    text = (ROOT / "README.md").read_text()
    commands = [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("moecover ")]
    assert len(commands) == 3
    for command in commands:
        for part in command.split("&&"):
            make_parser().parse_args(part.split()[1:])
    for target in ("make demo", "make test"):
        assert target in text
