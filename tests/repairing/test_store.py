"""Repaired checkpoints: the golden property, every other byte, the manifest, and what is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moecover.checkpoints.pieces import pieces_by_shard
from moecover.checkpoints.structure import Structure, read_structure
from moecover.cli import main as cli
from moecover.errors import InputError
from moecover.files.hashing import file_hash
from moecover.planning.artifact import Plan
from moecover.planning.masking import masked
from moecover.pruning.writer import prune
from moecover.repairing.applied import LayerRepair, repaired
from moecover.repairing.layers import repair_layers
from moecover.runtime import cost as fitting
from moecover.runtime.loading import load_model
from moecover.runtime.streaming import streamed
from moecover.verification.verify import verify
from tests.conftest import random_corpus, write_rows
from tests.support import zoo
from tests.support.proofs import logits_of
from tests.support.repairs import CORPORA, half, manifest_of, mended, outputs, written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_repaired_checkpoint_equals_the_repaired_model(
    checkpoints: Callable[..., Path], family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    structure = read_structure(checkpoints(family, dtype=dtype))
    plan, original = half(structure), load_model(structure)
    repairs = [*repair_layers(original, structure, plan, CORPORA, kind="ridge")]
    assert any(one.experts for one in repairs)
    cut = written(structure, plan, tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(cut, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with masked(original, structure, plan):
        without = logits_of(original)
        with repaired(original, structure, repairs):
            expected = logits_of(original)
    assert torch.equal(logits_of(plain.eval()), expected)
    assert (without - expected).abs().max() > 1e-3  # the repair does something
    result = verify(structure.checkpoint.path, cut)
    assert result["equal"]
    assert result["max_abs_difference"] == 0
    assert result["repaired"] == len(manifest_of(cut)["tensors"]) > 0


@pytest.mark.parametrize("family", ["granitemoe", "nemotron_h"])  # experts stacked on disk; no gate, one each on disk
def test_other_layouts_too(family: str, tmp_path: Path) -> None:
    zoo.make_model(family).save_pretrained(tmp_path / "model", save_original_format=True)
    structure = read_structure(tmp_path / "model")
    corpus = random_corpus("a", sequences=12, length=20, vocab=zoo.SMALL["vocab_size"])
    cut = written(structure, half(structure), tmp_path, corpora=[corpus])
    assert manifest_of(cut)["tensors"]
    assert verify(tmp_path / "model", cut)["equal"]


def test_only_what_the_manifest_names_has_other_bytes(structure: Structure, tmp_path: Path) -> None:
    plan = half(structure)
    plain = prune(structure, plan, tmp_path / "plain")
    cut = written(structure, plan, tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, cut))
    assert before.keys() == after.keys()
    different = {name for name in before if before[name].numpy().tobytes() != after[name].numpy().tobytes()}
    assert different == manifest_of(cut)["tensors"].keys()
    assert all("down_proj" in name or name.endswith("w2.weight") for name in different)
    same = {p.name for p in plain.iterdir()} - {"model.safetensors", "moecover.json", "README.md"}
    assert all((plain / name).read_bytes() == (cut / name).read_bytes() for name in same)
    assert "repair" not in json.loads((plain / "moecover.json").read_text())
    assert "byte for byte; nothing was trained" in (plain / "README.md").read_text()
    assert f"{len(different)} tensors, down projections of experts, were refitted" in (cut / "README.md").read_text()


def test_the_manifest_says_how_well_every_layer_fits(structure: Structure, tmp_path: Path) -> None:
    plan = half(structure)
    made = [*repair_layers(load_model(structure), structure, plan, CORPORA, kind="ridge")]
    facts = manifest_of(written(structure, plan, tmp_path))
    assert facts["kind"] == "ridge"
    assert [c["tokens used"] for c in facts["corpora"]] == [c.num_tokens for c in CORPORA]
    for row, one in zip(facts["layers"], made, strict=True):
        assert (row["decoder_layer"], row["experts"]) == (one.decoder_layer, sorted(one.experts))
        assert row["before"] == dict(zip("ab", one.fit.before, strict=True))
        assert row["after"] == dict(zip("ab", one.fit.after, strict=True))
        assert sum(row["after"].values()) <= sum(row["before"].values())


def test_a_layer_by_layer_repair_writes_the_same(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    structure = read_structure(checkpoints("qwen2_moe", shards=True))
    plan = half(structure)
    whole = mended(structure, plan, tmp_path / "whole")
    parts = mended(structure, plan, tmp_path / "parts", model=streamed(structure))
    assert whole.manifest() == parts.manifest()
    cut = prune(structure, plan, tmp_path / "out", repaired=parts)
    in_memory, said = verify(structure.checkpoint.path, cut), list[str]()
    monkeypatch.setattr(fitting, "OVERHEAD", 0)
    monkeypatch.setattr(fitting, "COPIES", 0.01)  # a layer of this model is no larger than its hidden states
    estimate = fitting.cost(structure, tokens=256, batch_tokens=64, limit=0, head=True)
    limit = (estimate.streamed + estimate.whole) // 2
    assert verify(structure.checkpoint.path, cut, memory_limit=limit, advance=said.append) == in_memory
    assert any("running layer by layer" in line for line in said)
    assert in_memory["equal"]


def test_a_wider_model_repairs_in_the_dtype_of_the_file(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    structure = read_structure(checkpoints("qwen2_moe", dtype=torch.bfloat16))
    plan, wide = half(structure), load_model(structure, dtype="float32")
    cut = written(structure, plan, tmp_path, model=contextlib.nullcontext(wide))
    tensors = load_file(cut / "model.safetensors")
    assert {tensors[name].dtype for name in manifest_of(cut)["tensors"]} == {torch.bfloat16}
    assert verify(structure.checkpoint.path, cut)["equal"]
    for number, corpus in enumerate(CORPORA):  # the stated fit is that of the rounded weights
        whole = outputs(wide, structure, corpus)
        found = outputs(load_model(read_structure(cut), dtype="float32"), read_structure(cut), corpus)
        for row, a, b in zip(manifest_of(cut)["layers"], whole, found, strict=True):
            error = float((a - b).square().sum() / a.square().sum())
            assert error == pytest.approx(row["after"]["ab"[number]], rel=1e-3)


# --------------------------------------------------------------------------------------------------------- command line
def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def text(tmp_path: Path) -> str:
    words = [
        "the",
        "river",
        "rises",
        "in",
        "hills",
        "and",
        "turns",
        "south",
        "past",
        "old",
        "mill",
        "falls",
        "into",
        "sea",
        "0",
        "17",
    ]
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(words), (3000,), generator=generator).tolist()
    rows = [{"text": " ".join(words[i] for i in picked[at : at + 30])} for at in range(0, 3000, 30)]
    return f"mine={write_rows(tmp_path / 'mine.jsonl', rows)}"


def saved(plan: Plan, path: Path) -> str:
    plan.save(path)
    return str(path)


def test_prune_repairs_from_a_plan_and_in_one_shot(
    checkpoints: Callable[..., Path], tmp_path: Path, text: str, capsys
) -> None:
    model = str(checkpoints("qwen2_moe", shards=True))
    structure = read_structure(model)
    passing = ["--corpus", text, "--length", "32", "--sequences", "40"]
    shot = tmp_path / "shot"
    status, out, err = run(
        capsys,
        "prune",
        model,
        *passing,
        "--retain",
        "0.5",
        "--repair",
        "ridge",
        "--repair-tokens",
        "1000",
        "-o",
        str(shot),
        "--json",
    )
    assert status == 0, err
    result = json.loads(out)
    assert result["repair"]["after"] < result["repair"]["before"]
    plan = Plan.model_validate(json.loads((shot / "moecover.json").read_text())["plan"])
    status, out, err = run(
        capsys,
        "prune",
        model,
        "--plan",
        saved(plan, tmp_path / "plan.json"),
        *passing,
        "--repair",
        "ridge",
        "--repair-tokens",
        "1000",
        "-o",
        str(tmp_path / "planned"),
    )
    assert status == 0, err
    assert f"repaired (ridge): {result['repair']['tensors']} tensors" in out
    assert manifest_of(shot) == manifest_of(tmp_path / "planned")
    assert manifest_of(shot)["corpora"][0]["tokens used"] == 992  # whole sequences
    for shard in shot.glob("*.safetensors"):
        assert file_hash(shard) == file_hash(tmp_path / "planned" / shard.name)
    assert len(pieces_by_shard(structure, plan.kept)) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.jsonl", "plan.json", "planned", "shot"]
    assert run(capsys, "verify", model, str(shot))[0] == 0


# By a plan a layer is taken up again in `test_resuming.py`, too.
@pytest.mark.parametrize("one_shot", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_killed_prune_goes_on_at_the_layer_it_was_at(
    checkpoints: Callable[..., Path], tmp_path: Path, text: str, capsys, one_shot: bool
) -> None:
    model = checkpoints("qwen2_moe")
    structure = read_structure(model)
    plan = ["--retain", "0.5"] if one_shot else ["--plan", saved(half(structure), tmp_path / "plan.json")]
    given = ["prune", str(model), *plan, "--corpus", text, "--length", "32", "--repair", "ridge"]
    code = (
        "import os, signal, sys\nfrom moecover.repairing import store as repair_files\n"
        "real, calls = repair_files.write_bytes, []\n"
        "def killed(*a):\n"
        "    calls.append(a)\n"
        "    if len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(*a)\n"
        "repair_files.write_bytes = killed\nfrom moecover.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, *given, "-o", str(out)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    status, _, err = run(capsys, *given, "-o", str(out))
    assert status == 0, err
    assert "resuming: 1 of 2 layers are repaired" in err
    found = [line for line in err.splitlines() if line.startswith("resuming: ")]
    assert len(found) == 1 + one_shot  # the profile's batches are not run again either
    assert not (tmp_path / ".out.repair.partial").exists()
    assert run(capsys, *given, "-o", str(tmp_path / "once"))[0] == 0
    assert file_hash(out / "model.safetensors") == file_hash(tmp_path / "once" / "model.safetensors")
    assert manifest_of(out) == manifest_of(tmp_path / "once")


def test_what_contradicts_itself_is_refused(
    checkpoints: Callable[..., Path], tmp_path: Path, text: str, capsys
) -> None:
    model = checkpoints("qwen2_moe")
    plan = saved(half(read_structure(model)), tmp_path / "plan.json")
    given = ["prune", str(model), "--plan", plan, "-o", str(tmp_path / "out")]
    for more, message in (
        (["--repair", "ridge"], "--repair ridge fits weights on calibration text: give --corpus NAME[=PATH]"),
        (
            ["--repair", "ridge", "--corpus", text, "--evaluation", "e"],
            "--evaluation measured the plan without merge and repair",
        ),
        (
            ["--repair-tokens", "100"],
            "--repair-tokens says what merge and repair run on: give --merge or --repair",
        ),
        (["--repair", "scale", "--corpus", text, "--keep", "4"], "--plan and --keep exclude each other"),
        (["--repair", "scale", "--corpus", text, "--repair-tokens", "0"], "--repair-tokens 0 is out of range"),
        (
            ["--repair", "scale", "--corpus", text, "--dtype", "bfloat16"],
            "stored in float32, which a model in bfloat16 does not hold",
        ),
        (
            ["--repair", "scale", "--corpus", text, "--repair-tokens", "5"],
            "--repair-tokens 5: 5 tokens a corpus are less than the first sequence",
        ),
    ):
        status, _, err = run(capsys, *given, *more)
        assert status == 2
        assert message in err.splitlines()[-1]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.jsonl", "plan.json"]


def test_families_and_formats_without_repair_are_refused_before_any_work(
    checkpoints: Callable[..., Path], tmp_path: Path, text: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecover.runtime.memory.load_model", None)  # nothing is loaded
    model = checkpoints("gpt_oss")
    given = ["--corpus", text, "--repair", "ridge", "--retain", "0.5", "-o", str(tmp_path / "out")]
    status, _, err = run(capsys, "prune", str(model), *given)
    assert status == 2
    assert (
        err.splitlines()[-1]
        == "moecover: --merge and --repair do not run on gpt_oss: its experts have biases, a norm or transposed "
        "weights. Use --merge none and --repair none"
    )
    quantised = Path(shutil.copytree(checkpoints("mixtral"), tmp_path / "quantised"))
    tensors = load_file(quantised / "model.safetensors")
    packed = {k: (v.to(torch.float8_e4m3fn) if ".experts." in k else v) for k, v in tensors.items()}
    save_file(packed, quantised / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (quantised / "config.json").write_text(json.dumps(config))
    status, _, err = run(capsys, "prune", str(quantised), *given)
    assert status == 2
    assert (
        "its experts are quantised (fp8), a refitted weight would have to be quantised again; repair the original"
        in err.splitlines()[-1]
    )


def test_corpora_count_by_the_weights_of_the_plan(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    model, even = load_model(structure), half(structure)

    def fitted(**weights: int) -> LayerRepair:
        plan = even.model_copy(update={"options": {"weights": weights}})
        return next(
            iter([*repair_layers(model, structure, plan, CORPORA, kind="ridge", held_share=0.0, penalties=(0.1,))])
        )

    one, more, alone = fitted(a=1, b=1), fitted(a=2, b=1), fitted(a=1, b=0)
    assert alone.fit.after[0] < more.fit.after[0] < one.fit.after[0]
    assert alone.fit.after[1] > more.fit.after[1] > one.fit.after[1]
    with pytest.raises(InputError, match="every corpus has weight 0 in the plan"):
        fitted(a=0, b=0)


def test_a_repair_shows_itself(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    made = mended(structure, half(structure), tmp_path / "state")
    before, after = made.mean_errors()
    assert repr(made) == (
        f"<Repaired ridge: {len(made.hashes)} tensors, mean relative squared error {before:.3f} -> {after:.3f}>"
    )
    rows = made.rows_shown()
    assert [row["layer"] for row in rows] == list(structure.topology.decoder_layers)
    assert sum(float(row["error after"] or 0) for row in rows) / len(rows) == pytest.approx(after)
