"""`shrink` on a GGUF file: the same steps in llama.cpp, resumed, proven and measured; and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moecover import report
from moecover.checkpoints.structure import read_structure
from moecover.evaluation.artifact import Evaluation
from moecover.planning.artifact import Plan
from moecover.shrinking import quality
from moecover.shrinking.quality import Quality
from tests.support.command_line import run
from tests.support.gguf_models import needs_llama
from tests.support.tiny import TEXT

pytestmark = needs_llama


def test_a_file_is_shrunk_proven_and_measured(
    converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quality.QUALITIES, "fast", Quality(6, 6, "ridge", 200, 2, "little"))
    model = Path(shutil.copy(converted("qwen2_moe"), tmp_path))  # all in one folder, as most have it
    output, work = tmp_path / "half.gguf", tmp_path / "half.gguf-work"
    given = []
    for name, words in (("a", TEXT), ("b", TEXT[::-1])):
        (tmp_path / f"{name}.txt").write_text(words * 60)
        given += ["--corpus", f"{name}={tmp_path / name}.txt"]
    command = ["shrink", model, "--budget", "50%", *given, "--quality", "fast", "-o", output]
    status, out, err = run(capsys, *command, "--dry-run", "--json")
    assert status == 0, err
    runs = [step["name"] for step in json.loads(out)["steps"] if step["kind"] == "run"]
    assert runs[:2] == ["profile", "measure shapes"]
    assert not work.exists()
    status, out, err = run(capsys, *command)
    assert status == 0, err
    assert "worst text: " in out
    (thin,) = [line for line in err.splitlines() if line.startswith("note: calibration text is thin")]
    assert thin.endswith("Give more corpora, or longer ones (--corpus)")
    (folder,) = [path for path in work.iterdir() if path.is_dir() and path.name.startswith("50")]
    plan, whole = Plan.load(folder / "plan.json"), read_structure(model)
    assert not isinstance(whole.width, str)
    shapes = {(point["keep"], point["width"]): point["loss"] for point in plan.found["shapes"]}
    assert len(shapes) > 1
    assert all(keep * width <= 0.5 * whole.topology.num_experts * whole.width.channels for keep, width in shapes)
    assert shapes[plan.keep, plan.width or whole.width.channels] == min(shapes.values())
    rows = Evaluation.load(folder / "evaluation").rows
    assert rows[0].num_bytes == whole.checkpoint.num_bytes
    assert rows[1].num_bytes == read_structure(output).checkpoint.num_bytes
    assert f"{rows[1].perplexity['a'].perplexity:.2f}" in (tmp_path / "half.md").read_text()
    report(work, tmp_path / "page.html", progress=False)
    page = (tmp_path / "page.html").read_text()
    assert f"{plan.keep} of {whole.topology.num_experts} experts" in page
    assert "no repair" in page
    assert ">loss, nats<" in page
    before = output.read_bytes()
    output.unlink()
    (tmp_path / "half.md").unlink()
    status, _, err = run(capsys, *command)
    assert status == 0, err
    assert "profile is done" in err
    assert "plan.json is made" in err
    assert output.read_bytes() == before


def test_what_is_refused_before_any_work(
    converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, taken = converted("qwen2_moe"), tmp_path / "taken.gguf"
    taken.write_bytes(b"mine")
    cases = {
        ("-o", tmp_path / "o.gguf", "--repair", "ridge"): "--repair ridge has no use here: a GGUF file is cut as it is",
        ("-o", tmp_path / "o.gguf", "--dtype", "float32"): "--dtype has no use here",
        ("-o", tmp_path / "folder"): "does not end in .gguf",
        ("-o", taken): "taken.gguf exists",
        ("-o", taken, "--overwrite"): "taken.gguf was not written by moecover",
    }
    for more, message in cases.items():
        status, _, err = run(capsys, "shrink", model, "--budget", "50%", "--corpus", "python", *more)
        assert (status, message in err) == (2, True), err
        assert "profiling" not in err
    checkpoint = model.with_name("checkpoint")
    status, _, err = run(
        capsys, "shrink", checkpoint, "--budget", "50%", "--corpus", "python", "-o", tmp_path / "o.gguf"
    )
    assert (status, "ends in .gguf, and that of" in err) == (2, True), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken.gguf"]
