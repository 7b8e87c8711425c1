"""Plans from importance matrices of llama.cpp: what they tell, against sums by hand, and what they do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from moecover.checkpoints.structure import read_structure
from moecover.errors import InputError
from moecover.planning.artifact import Plan, kept_sets
from moecover.planning.fitting import check_plan
from moecover.planning.run import plan, plan_budgets
from moecover.planning.saliency import default_saliency
from moecover.profiling.imatrix import imatrix_profile
from tests.support.command_line import run
from tests.support.gguf_files import EXPERTS, HIDDEN, LAYERS, TOP_K, WIDTH, shapes_of, write_gguf

TOKENS = 400
OF_DOWN = "blk.{}.ffn_down_exps.weight"


def write_imatrix(path: Path, *, seed: int, layers: tuple[int, ...] = LAYERS, **changed: Any) -> Path:
    """A file as llama-imatrix writes it: for every matrix sums of squares and counts, a row for every expert."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(changed.get("kind", "imatrix"))
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", TOKENS // 2)
    writer.add_tensor("blk.0.attn_q.weight.counts", np.full(1, TOKENS, dtype=np.float32))
    for layer in layers:
        experts = rng.multinomial(TOKENS * TOP_K, rng.dirichlet(np.ones(EXPERTS)))
        for matrix, width in (("gate", HIDDEN), ("down", changed.get("width", WIDTH))):
            sums = rng.gamma(1, size=(EXPERTS, width)) * experts[:, None]
            name = f"blk.{layer}.ffn_{matrix}_exps.weight"
            writer.add_tensor(f"{name}.in_sum2", (sums * changed.get("sign", 1)).astype(np.float32))
            if changed.get("lacks") != f"{matrix}.counts":
                writer.add_tensor(f"{name}.counts", experts[:, None].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(path: Path) -> dict[str, Any]:
    return {one.name: one for one in gguf.GGUFReader(path).tensors}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {name: write_imatrix(tmp_path / f"{name}.gguf", seed=i) for i, name in enumerate(("wiki", "code"))}


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_statistics_are_those_of_the_definition(files: Mapping[str, Path], tmp_path: Path, kind: str) -> None:
    model = write_gguf(tmp_path / "model.gguf", "qwen3moe", types={"ffn_down_exps": kind}, finite=True)
    made = imatrix_profile(files, model=str(model), progress=False)
    structure = read_structure(model)
    assert made.topology == structure.topology
    assert made.model["fingerprint"] == structure.model_fingerprint
    weights = tensors(model)
    for name, path in files.items():
        read, statistics = tensors(path), made.statistics[name]
        assert (statistics["num_tokens"] == TOKENS).all()
        for row, layer in enumerate(LAYERS):
            down = weights[OF_DOWN.format(layer)]
            matrices = dequantize(down.data, down.tensor_type).astype(np.float64)
            count = read[f"{OF_DOWN.format(layer)}.counts"].data.reshape(-1)
            squares = read[f"{OF_DOWN.format(layer)}.in_sum2"].data
            assert statistics["count"][row].tolist() == count.tolist()
            for expert in range(EXPERTS):
                energy = [
                    squares[expert, j] * sum(matrices[expert, i, j] ** 2 for i in range(HIDDEN)) for j in range(WIDTH)
                ]
                assert made.channels[name][row, expert] == pytest.approx(energy, rel=1e-6)
                expected = np.sqrt(count[expert] * sum(energy))
                assert statistics["norm_sum"][row, expert] == pytest.approx(expected, rel=1e-6)
        assert np.isnan(statistics["weight_sum"]).all()


def test_what_is_not_known_is_refused_by_name(files: Mapping[str, Path], tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "model.gguf", "qwen3moe")
    counted, estimated = imatrix_profile(files, progress=False), imatrix_profile(files, model=model, progress=False)
    assert (counted.topology.top_k, counted.topology.num_experts) == (TOP_K, EXPERTS)
    assert (default_saliency(counted), default_saliency(estimated)) == ("frequency", "ean")
    with pytest.raises(InputError, match=r"contribution needs statistics .* Known from it: frequency, ean, ean-mean"):
        plan(estimated, keep=3)
    with pytest.raises(InputError, match=r"reap needs statistics .* Known from it: frequency$"):
        plan_budgets(counted, keeps=[3], saliency="reap")
    with pytest.raises(InputError, match="does not know the largest outputs"):
        plan_budgets(estimated, keeps=[3], saliency="ean", protect_super_experts=True)
    with pytest.raises(InputError, match="width=32 needs the energies of channels"):
        plan_budgets(counted, keeps=[3], widths=[32], saliency="frequency")
    (thin,) = plan_budgets(estimated, keeps=[4], widths=[32], saliency="ean")
    assert thin.width == 32


def test_the_plan_cuts_any_quantisation_and_the_original(
    files: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoints: Callable[..., Path]
) -> None:
    model = write_gguf(tmp_path / "model.gguf", "qwen2moe", types={"_exps": "Q8_0"}, finite=True)
    sibling = write_gguf(tmp_path / "sibling.gguf", "qwen2moe", types={"_exps": "Q4_0"}, seed=1)
    given = [part for name, path in files.items() for part in ("--imatrix", f"{name}={path}")]
    for more, saliency in ((["--model", model], "ean"), ([], "frequency")):
        chosen = tmp_path / f"{saliency}.json"
        status, out, err = run(capsys, "plan", *given, *more, "--keep", 3, "-o", chosen)
        assert status == 0, err
        assert "--profile" not in out
        assert err.count("tokens. Make the importance matrices of more text") == 1
        made = Plan.load(chosen)
        assert made.options["saliency"] == saliency
        assert (made.topology_fingerprint is None) == (made.model_fingerprint is None) == (not more)
        for source in (model, sibling):
            status, _, err = run(
                capsys, "prune", source, "--plan", chosen, "-o", tmp_path / f"{saliency}-{source.name}"
            )
            assert status == 0, err
    original = checkpoints(
        "qwen2_moe",
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        mlp_only_layers=[0],
    )
    structure = read_structure(original)
    check_plan(Plan.load(tmp_path / "ean.json"), structure)
    status, _, err = run(capsys, "prune", original, "--plan", tmp_path / "ean.json", "-o", tmp_path / "cut")
    assert status == 0, err
    assert read_structure(tmp_path / "cut").topology.num_experts == 3
    assert len(kept_sets(made)) == len(LAYERS)


def test_files_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one line with what was found; the older format with the reason."""
    monkeypatch.setenv("HOME", str(tmp_path))
    legacy = tmp_path / "imatrix.dat"
    legacy.write_bytes((120).to_bytes(4, "little") + b"blk.0.ffn_down_exps.weight")
    model = write_gguf(tmp_path / "model.gguf", "qwen3moe")
    cases = {
        legacy: "The older importance matrices (.dat) do not tell how many tokens an expert was given",
        Path("~/no.gguf"): f"no file {tmp_path / 'no.gguf'}",
        model: "is no importance matrix: general.type is None",
        write_imatrix(tmp_path / "a.gguf", seed=0, kind="model"): "general.type is 'model'",
        write_imatrix(tmp_path / "b.gguf", seed=0, layers=()): "holds no routed experts",
        write_imatrix(tmp_path / "c.gguf", seed=0, layers=(1,)): "has 1 blocks of 6 experts, " + str(model),
        write_imatrix(tmp_path / "d.gguf", seed=0, width=96): "has experts of 96 channels, " + str(model),
        write_imatrix(tmp_path / "e.gguf", seed=0, sign=-1): "in_sum2 holds numbers that are negative or not finite",
    }
    for path, message in cases.items():
        command = ["plan", "--imatrix", f"x={path}", "--model", model, "--keep", 3, "-o", tmp_path / "p.json"]
        status, out, err = run(capsys, *command)
        assert (status, out) == (2, "")
        assert message in err, path
        assert len(err.strip().split("\n")[-1]) < 500
    status, _, err = run(capsys, "plan", "--keep", 3, "-o", tmp_path / "p.json")
    assert (status, "give either PROFILE_DIR or --imatrix NAME=FILE" in err) == (2, True)


def test_shapes_of_the_test_files() -> None:
    """The matrices that the sums are of."""
    assert shapes_of("qwen3moe")[OF_DOWN.format(1)] == (EXPERTS, HIDDEN, WIDTH)
