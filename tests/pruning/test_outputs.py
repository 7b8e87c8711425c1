"""Outputs: what is replaced, what is copied, and what a model that was pruned twice says of its original."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecover.checkpoints.structure import read_structure
from moecover.errors import InputError, MoecoverError
from moecover.planning.artifact import LayerPlan, Plan
from moecover.planning.channel_sets import packed
from moecover.pruning.job import prune as prune_job
from moecover.pruning.writer import prune
from moecover.verification.verify import verify
from tests.conftest import hand_plan
from tests.support.folders import contents, names_in
from tests.support.proofs import edit_manifest
from tests.support.thin import random_shape


@pytest.fixture
def source(checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    shutil.copytree(checkpoints("mixtral"), tmp_path / "m")
    return tmp_path / "m"


def cut(folder: Path, out: Path, kept: list[list[int]], **options: Any) -> Path:
    structure = read_structure(folder)
    return prune(structure, hand_plan(structure, kept), out, **options)


HALF = [[0, 2, 5], [1, 2, 4]]


# ---------------------------------------------------------------------------------------------------- overwriting
@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", ".gitattributes", "model-extra.safetensors"])
def test_a_file_of_the_user_s_is_not_overwritten(source: Path, tmp_path: Path, name: str) -> None:
    out = cut(source, tmp_path / "out", HALF)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    before = contents(out)
    with pytest.raises(InputError, match=rf"out/{name} was not written by moecover, and overwriting would remove it"):
        cut(source, out, HALF, overwrite=True)
    assert contents(out) == before
    (out / name).unlink()
    cut(source, out, [[0, 1, 2]] * 2, overwrite=True)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
@pytest.mark.parametrize("same_size", [True, False])
def test_a_file_that_has_changed_is_not_overwritten(source: Path, tmp_path: Path, name: str, same_size: bool) -> None:
    """Weights that another tool has trained on, or an edited card."""
    out = cut(source, tmp_path / "out", HALF)
    content = (out / name).read_bytes()
    (out / name).write_bytes(content[:-1] + (b"\0" if same_size else b""))
    with pytest.raises(
        InputError, match=rf"out/{name} has changed since moecover wrote it, and overwriting would lose"
    ):
        cut(source, out, HALF, overwrite=True)
    (out / name).write_bytes(content)
    cut(source, out, HALF, overwrite=True)


def test_a_link_in_place_of_a_file_is_not_followed(source: Path, tmp_path: Path) -> None:
    out = cut(source, tmp_path / "out", HALF)
    (out / "link").symlink_to("nowhere")
    with pytest.raises(InputError, match="out/link was not written by moecover"):
        cut(source, out, HALF, overwrite=True)


def test_it_is_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    out = cut(source, tmp_path / "out", HALF)
    (out / "mine").write_text("x")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": list(range(40))}) + "\n")
    with pytest.raises(InputError, match="out/mine was not written by moecover"):
        prune_job(source, output=out, corpora=[f"r={rows}"], keep=3, overwrite=True, progress=False)
    assert names_in(tmp_path) == ["m", "out", "rows.jsonl"]


# ---------------------------------------------------------------------------------------------------- odd outputs
def test_odd_outputs(source: Path, tmp_path: Path) -> None:
    loop, other = tmp_path / "loop", tmp_path / "other"
    loop.symlink_to(loop)
    other.symlink_to(tmp_path / "back")
    (tmp_path / "back").symlink_to(other)
    (tmp_path / "file").write_text("x")
    cases = (
        (loop, "cannot be an output"),
        (other, "cannot be an output"),
        (loop / "out", "cannot be an output"),
        (tmp_path / ("n" * 300), "cannot be an output: File name too long"),
        (tmp_path / "a\0b", "cannot be an output"),
        (Path("~nobody-of-this-name") / "out", "cannot be an output"),
        (tmp_path / "file", "file (exists|was not written by moecover)"),
    )
    before = names_in(tmp_path)
    for out, message in cases:
        for overwrite in (False, True):
            with pytest.raises(InputError, match=message) as caught:
                cut(source, out, HALF, overwrite=overwrite)
            assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(MoecoverError, match=r"Not a directory|File exists"):
        cut(source, tmp_path / "file" / "out", HALF)
    assert names_in(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_an_output_without_permission(source: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o000)
    try:
        for out in (tmp_path / "closed", tmp_path / "closed" / "out"):
            with pytest.raises(MoecoverError, match="Permission denied"):
                cut(source, out, HALF)
    finally:
        (tmp_path / "closed").chmod(0o700)


# ---------------------------------------------------------------------------------------------------- what is copied
def test_links_out_of_the_folder_are_not_copied(source: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("private key")
    (source / "assets").mkdir()
    for name in ("notes.txt", "assets/notes.txt", "hf_quant_config.json", "README.md", "LICENSE"):
        (source / name).symlink_to(secret)
    (source / "inner.txt").write_text("inside")
    (source / "link.txt").symlink_to("inner.txt")
    (source / "broken.txt").symlink_to("nothing")
    said: list[str] = []
    out = cut(source, tmp_path / "out", HALF, say=said.append)
    assert not [name for name, content in contents(out).items() if b"private key" in content]
    assert (out / "link.txt").read_text() == "inside"
    assert "README.original.md" not in names_in(out)
    (note,) = (line for line in said if "links to files outside" in line)
    assert "notes.txt" in note
    left_out = json.loads((out / "moecover.json").read_text())["left_out"]
    assert {"notes.txt", "assets/notes.txt", "hf_quant_config.json", "README.md", "LICENSE"} <= set(left_out)


def test_a_snapshot_of_the_hub_s_cache_links_to_its_blobs(source: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--tiny"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (repository / "elsewhere").write_text("private")
    (snapshot / "elsewhere").symlink_to("../../elsewhere")
    out = cut(snapshot, tmp_path / "out", HALF)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (out / "elsewhere").exists()


STALE = (
    "pytorch_model.bin.index.json",
    "model.safetensors.index.json",
    "model.fp16.safetensors.index.json",
    "params.json",
    "original/params.json",
    "original/tokenizer.model",
    "adapter_config.json",
)


def test_descriptions_of_the_unpruned_weights_are_not_copied(source: Path, tmp_path: Path) -> None:
    (source / "original").mkdir()
    for name in STALE:
        (source / name).write_text('{"metadata": {}, "weight_map": {"lm_head.weight": "model.safetensors"}}')
    settings = {"modules_to_not_convert": ["model.layers.0.block_sparse_moe.experts.5.w1"]}
    (source / "quantization_config.json").write_text(json.dumps(settings))
    said: list[str] = []
    out = cut(source, tmp_path / "out", HALF, say=said.append)
    assert not [name for name in STALE if (out / name).exists()]
    assert json.loads((out / "quantization_config.json").read_text()) == {
        "modules_to_not_convert": ["model.layers.0.block_sparse_moe.experts.2.w1"]
    }
    assert set(STALE) <= set(json.loads((out / "moecover.json").read_text())["left_out"])
    assert any("descriptions of the unpruned weights are not copied: adapter_config.json" in line for line in said)
    assert read_structure(out).topology.num_experts == 3


# ---------------------------------------------------------------------------------------------------- pruned twice
def test_what_was_pruned_twice_leads_to_the_first_original(
    checkpoints: Callable[..., Path], source: Path, tmp_path: Path
) -> None:
    first = cut(source, tmp_path / "first", [[0, 2, 3, 5], [1, 2, 3, 4]])
    second = cut(first, tmp_path / "second", [[0, 1, 3], [1, 2, 3]])
    third = cut(second, tmp_path / "third", [[1, 2], [0, 2]])
    assert verify(first, second).equal
    assert verify(second, third).equal
    manifest = json.loads((third / "moecover.json").read_text())
    assert manifest["source"]["name"] == str(second)
    assert manifest["original"] == {
        "name": str(source),
        "revision": None,
        "fingerprint": read_structure(source).model_fingerprint,
        "num_experts": 6,
        "num_bytes": read_structure(source).checkpoint.num_bytes,
        "channels": 24,
        "top_k": 2,
    }
    assert [row["old_to_new"] for row in manifest["experts"]] == [{"2": 0, "5": 1}, {"2": 0, "4": 1}]
    at_once = cut(source, tmp_path / "once", [[2, 5], [2, 4]])
    assert (at_once / "model.safetensors").read_bytes() == (third / "model.safetensors").read_bytes()
    card = (third / "README.md").read_text()
    assert "# m, 2 of 6 experts" in card
    assert "This is `m` (mixtral)" in card
    assert "in several steps, this time from `second`" in card
    assert "| routed experts per MoE layer | 6 | 3 | 2 |" in card
    assert "moecover verify second ." in card


def test_thinner_experts_pruned_again_lead_to_the_first_original(source: Path, tmp_path: Path) -> None:
    """Channels first, then experts, then channels again; the bytes are those of the same choice in one step."""
    structure = read_structure(source)
    first = prune(structure, one := random_shape(structure, 16, keep=6), tmp_path / "first")
    second = cut(first, tmp_path / "second", [[0, 2, 3], [1, 2, 3]])
    structure = read_structure(second)
    third = prune(structure, two := random_shape(structure, 8, keep=2, seed=1), tmp_path / "third")
    assert verify(second, third).equal
    manifest = json.loads((third / "moecover.json").read_text())
    assert (manifest["original"]["channels"], manifest["source"]["channels"]) == (24, 16)
    layers = []
    for row, start, before, after in zip(
        manifest["experts"], ([0, 2, 3], [1, 2, 3]), one.layers, two.layers, strict=True
    ):
        kept = [start[e] for e in after.kept]
        sets = [[before.channels[e][j] for j in ids] for e, ids in zip(kept, after.channels, strict=True)]
        assert row["old_to_new"] == {str(e): new for new, e in enumerate(kept)}
        assert row["channels"] == [packed(ids) for ids in sets]
        layers.append(LayerPlan(decoder_layer=after.decoder_layer, kept=kept, channels=sets))
    at_once = prune(read_structure(source), Plan(schema=1, keep=2, width=8, layers=layers), tmp_path / "once")
    assert (at_once / "model.safetensors").read_bytes() == (third / "model.safetensors").read_bytes()
    card, between = ((folder / "README.md").read_text() for folder in (third, second))
    assert "# m, 2 of 6 experts, 8 of 24 channels each" in card
    assert "with whole routed experts and channels of the others removed (8 stay in each) by moecover" in card
    assert "| channels per expert | 24 | 16 | 8 |" in card
    assert "removed experts and channels masked" in card
    assert "# m, 3 of 6 experts, 16 of 24 channels each" in between
    assert "| channels per expert | 24 | 16 | 16 |" in between
    edit_manifest(second, lambda m: m["experts"][0]["channels"].pop())
    with pytest.raises(InputError, match="its channels are not those of the folder"):
        cut(second, tmp_path / "again", [[0, 1]] * 2)


def test_a_first_original_from_the_hub_is_the_base_model(source: Path, tmp_path: Path) -> None:
    first = cut(source, tmp_path / "first", HALF)
    edit_manifest(first, lambda m: m["source"].update(name="someone/tiny-moe", revision="0123"))
    card = (cut(first, tmp_path / "second", [[0, 1]] * 2) / "README.md").read_text()
    assert "base_model: someone/tiny-moe\n" in card
    assert "# tiny-moe, 2 of 6 experts" in card


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m["experts"].pop(), "does not describe the model in its folder"),
        (lambda m: m["experts"][0].update(old_to_new={"0": 0, "1": 1}), "its experts are not those of the folder"),
        (lambda m: m.pop("experts"), "does not describe the model in its folder"),
        (lambda m: m.update(original=5), "does not describe the model in its folder"),
        (lambda m: m.update(files=None), "is damaged"),
    ],
)
def test_a_manifest_that_leads_nowhere(
    source: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    first = cut(source, tmp_path / "first", HALF)
    edit_manifest(first, change)
    with pytest.raises(InputError, match=message):
        cut(first, tmp_path / "second", [[0, 1]] * 2)
    assert names_in(tmp_path) == ["first", "m"]
