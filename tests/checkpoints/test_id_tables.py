"""Tables of experts by token id (hash routing): how they are rewritten, what is refused, what cannot be done."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moecover.checkpoints.id_tables import remapped
from moecover.checkpoints.structure import Structure, read_structure
from moecover.errors import InputError
from moecover.planning.run import plan
from moecover.planning.search.routing import check_searchable
from moecover.profiling.run import profile
from moecover.pruning.writer import prune
from moecover.repairing.targets import check_stored
from moecover.runtime.loading import load_model
from moecover.runtime.masking import masked
from moecover.runtime.streaming import streamed
from tests.conftest import hand_plan, random_corpus
from tests.support import zoo


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which two layers of three look up the experts of a token id."""
    folder = tmp_path_factory.mktemp("deepseek_v4")
    zoo.make_model("deepseek_v4").save_pretrained(folder, save_original_format=True)
    return folder


@pytest.fixture(scope="module")
def structure(model: Path) -> Structure:
    return read_structure(model)


def test_a_table_by_hand() -> None:
    """Experts 1, 3 and 4 of five stay, as 0, 1 and 2; they start with 2, 1 and 1 places."""
    table = np.array([[0, 1], [1, 2], [2, 0], [3, 4], [0, 2]], dtype=np.int32)
    found = remapped(table, [1, 3, 4], 5)
    # Token 0 needs one beside 1: 3, by the lower id. Token 1: 4, which has fewer places than 3 now. All have two:
    # token 2 gets 1 and 3, token 4 gets 4 and again the lowest, 1.
    assert found.tolist() == [[1, 0], [0, 2], [0, 1], [1, 2], [2, 0]]
    assert found.dtype == table.dtype


def test_nothing_changes_but_the_ids_where_every_expert_of_the_table_stays() -> None:
    table = np.array([[4, 1], [1, 4]])
    assert remapped(table, [1, 2, 4], 6).tolist() == [[2, 0], [0, 2]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(3, 8))
def test_tokens_keep_distinct_experts_and_spread_evenly(seed: int, keep: int) -> None:
    """Kept experts keep their places, and all have nearly as many in the end."""
    draw = np.random.default_rng(seed)
    table = draw.permuted(np.tile(np.arange(12), (200, 1)), axis=1)[:, :3]
    kept = sorted(draw.choice(12, keep, replace=False).tolist())
    found = remapped(table, kept, 12)
    stay = np.isin(table, kept)
    assert (np.array(kept)[found][stay] == table[stay]).all()
    assert all(len(set(row)) == 3 for row in found.tolist())
    assert np.ptp(np.bincount(found.ravel(), minlength=keep)) <= 3  # of 75 to 200


def test_the_layout_has_the_tables_and_says_so(structure: Structure) -> None:
    assert {(t.layer, t.parameter) for t in structure.tables.values()} == {
        (0, "model.layers.0.mlp.gate.tid2eid"),
        (1, "model.layers.1.mlp.gate.tid2eid"),
    }
    assert not structure.tables.keys() & structure.tensors.keys()
    assert any("decoder layers 0, 1 look up a token's experts by its id" in line for line in structure.warnings)


def test_layer_by_layer_and_masked_as_in_memory(structure: Structure, tmp_path: Path) -> None:
    """The token ids reach routers of a model that runs layer by layer, and the card says what became of the tables."""
    corpus = random_corpus("a", sequences=2, length=20, vocab=zoo.SMALL["vocab_size"])
    live = load_model(structure)
    made = profile(structure, [corpus], model=live, batch_size=2)
    with streamed(structure) as stream:
        again = profile(structure, [corpus], model=stream, batch_size=2)
    for name, values in made.statistics["a"].items():
        assert np.array_equal(again.statistics["a"][name], values), name
    chosen = plan(made, method="random", keep=4, seed=1)
    out = prune(structure, chosen, tmp_path / "out")
    assert "The tables of decoder layers 0, 1 that give the experts of a token id were rewritten" in (
        (out / "README.md").read_text()
    )
    with masked(live, structure, chosen.kept):
        tables = [live.get_buffer(t.parameter).clone() for t in structure.tables.values()]
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[name], t) for name, t in zip(structure.tables, tables, strict=True))
    assert live.get_buffer("model.layers.0.mlp.gate.tid2eid").max() == 7  # unmasked, it is as before


def test_a_table_that_names_no_expert_is_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("tid2eid"))
    tensors[name][5, 1] = 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    damaged = read_structure(folder)
    chosen = plan(profile(read_structure(model), [random_corpus("a", vocab=128)]), method="random", keep=4, seed=1)
    with pytest.raises(InputError, match=r"tid2eid in .* sends token id 5 to expert 8\. Allowed: 0 to 7"):
        prune(damaged, chosen, tmp_path / "out", other_weights=True)
    assert not (tmp_path / "out").exists()
    tensors[name] = tensors[name][:-1]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tid2eid in .* has shape \[127, 2\], config.json asks for \[128, 2\]"):
        read_structure(folder)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"nothing in the files fills model.layers.\d.mlp.gate.tid2eid"):
        read_structure(folder)


def as_on_the_hub(model: Path, folder: Path) -> Path:
    """The checkpoint by the hub's names: experts packed in four bits with scales, and a layer for more tokens."""
    folder.mkdir()
    tensors = {name.removeprefix("model."): t for name, t in load_file(model / "model.safetensors").items()}
    for name in [name for name in tensors if ".experts." in name]:
        rows, columns = tensors[name].shape
        tensors[name] = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8)
        scales = torch.rand(rows, max(1, columns // 32)).to(torch.float8_e8m0fnu)
        tensors[name.replace(".weight", ".scale")] = scales
    last = {name: t for name, t in tensors.items() if name.startswith("layers.2.")}
    tensors |= {name.replace("layers.2.", "mtp.0."): t.clone() for name, t in last.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}
    config |= {"quantization_config": settings, "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_layout_of_the_hub(model: Path, tmp_path: Path) -> None:
    structure = read_structure(as_on_the_hub(model, tmp_path / "hub"))
    assert (structure.quantised, len(structure.tables)) == ("fp8", 2)
    chosen = hand_plan(structure, [[0, 2, 5, 7], [1, 2, 3, 4], [0, 1, 6, 7]])
    before = load_file(tmp_path / "hub" / "model.safetensors")
    for mtp in ("drop", "prune"):
        out = prune(structure, chosen, tmp_path / mtp, mtp=mtp)
        assert read_structure(out).checkpoint.num_bytes == structure.num_bytes(4, mtp=mtp)
        after = load_file(out / "model.safetensors")
        assert any(name.startswith("mtp.") for name in after) == (mtp == "prune")
        for layer in range(2):
            name = f"layers.{layer}.ffn.gate.tid2eid"
            assert after[name].tolist() == remapped(before[name].numpy(), chosen.kept[layer], 8).tolist()
        assert torch.equal(after["layers.1.ffn.experts.3.w2.weight"], before["layers.1.ffn.experts.4.w2.weight"])
        scale = after["layers.2.ffn.experts.2.w1.scale"].view(torch.uint8)
        assert torch.equal(scale, before["layers.2.ffn.experts.6.w1.scale"].view(torch.uint8))
    assert torch.equal(after["mtp.0.ffn.gate.bias"], before["mtp.0.ffn.gate.bias"][[0, 1, 6, 7]])


def test_a_table_in_a_multi_token_prediction_layer_is_dropped_or_refused(model: Path, tmp_path: Path) -> None:
    folder = as_on_the_hub(model, tmp_path / "hub")
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.0.ffn.gate.tid2eid"] = tensors["layers.0.ffn.gate.tid2eid"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    structure = read_structure(folder)
    chosen = hand_plan(structure, [[0, 2, 5, 7]] * 3)
    with pytest.raises(InputError, match=r"does not rewrite mtp.0.ffn.gate.tid2eid, a table"):
        prune(structure, chosen, tmp_path / "out", mtp="prune")
    assert "mtp.0.ffn.gate.tid2eid" not in load_file(prune(structure, chosen, tmp_path / "out") / "model.safetensors")


def test_searches_and_repairs_are_refused(structure: Structure) -> None:
    with pytest.raises(InputError, match=r"deepseek_v4 look up experts by token id, so that no search can run"):
        check_searchable(structure)
    with pytest.raises(InputError, match=r"deepseek_v4: its blocks are called with token ids"):
        check_stored(structure)
