"""Which files a folder's weights are read from: the bytes of every tensor are those that ``from_pretrained`` loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moecover.checkpoints.source import open_checkpoint
from moecover.checkpoints.structure import read_structure
from moecover.errors import InputError
from moecover.pruning.writer import prune
from tests.conftest import hand_plan
from tests.support.quantised import set_config

INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


def shard(number: int) -> str:
    return f"model-0000{number}-of-00003.safetensors"


def put(folder: Path, shards: dict[str, Tensors], *, index: str = INDEX, named: dict[str, str] | None = None) -> None:
    """Write shards, and an index in which tensors are in ``named``, else in the last shard that has them."""
    for name, tensors in shards.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    text = json.dumps({"metadata": {}, "weight_map": weight_map if named is None else named})
    (folder / index).write_text(text)


def changed(tensors: Tensors) -> Tensors:
    return {name: tensor + 0.25 for name, tensor in tensors.items()}


def thirds(tensors: Tensors) -> dict[str, Tensors]:
    names = sorted(tensors)
    return {shard(i + 1): {name: tensors[name] for name in names[i::3]} for i in range(3)}


def plain(folder: Path, tensors: Tensors) -> None:
    put(folder, thirds(tensors))


def single_beside_index(folder: Path, tensors: Tensors) -> None:
    """What `save_pretrained` into the folder of a sharded model leaves."""
    put(folder, thirds(tensors))
    save_file(changed(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def single_beside_index_without_shards(folder: Path, tensors: Tensors) -> None:
    single_beside_index(folder, tensors)
    for name in thirds(tensors):
        (folder / name).unlink()


def in_two_shards(folder: Path, tensors: Tensors) -> None:
    """The index says the first, and the last is read."""
    shards = thirds(tensors)
    put(folder, shards)
    named = {key: name for name, of in shards.items() for key in of}
    twice = sorted(shards[shard(1)])[:4]
    shards[shard(3)] |= changed({name: tensors[name] for name in twice})
    put(folder, shards, named=named)


def wrong_shard(folder: Path, tensors: Tensors) -> None:
    shards = thirds(tensors)
    named = {key: name for name, of in shards.items() for key in of}
    named["lm_head.weight"] = next(s for s in shards if s != named["lm_head.weight"])
    put(folder, shards, named=named)


def not_in_the_index(folder: Path, tensors: Tensors) -> None:
    shards = thirds(tensors)
    left_out = (
        "lm_head.weight",
        *(f"model.layers.1.block_sparse_moe.{part}.weight" for part in ("gate", "experts.2.w1")),
    )
    named = {key: name for name, of in shards.items() for key in of if key not in left_out}
    put(folder, shards, named=named)


def shard_without_index(folder: Path, tensors: Tensors) -> None:
    """A shard that no index names."""
    put(folder, thirds(tensors))
    save_file(changed(tensors), folder / "model-00004-of-00003.safetensors", metadata={"format": "pt"})


def named_file(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "weights.safetensors", metadata={"format": "pt"})
    save_file(changed(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, transformers_weights="weights.safetensors")


def named_index(folder: Path, tensors: Tensors) -> None:
    put(
        folder,
        {f"own-{i}.safetensors": of for i, of in enumerate(thirds(tensors).values())},
        index="own.safetensors.index.json",
    )
    put(folder, thirds(changed(tensors)))
    set_config(folder, transformers_weights="own.safetensors.index.json")


FOLDERS: list[tuple[Callable[[Path, Tensors], None], str]] = [
    (plain, ""),
    (single_beside_index, "model.safetensors is read, as transformers does, and not model.safetensors.index.json"),
    (single_beside_index_without_shards, "model.safetensors is read, as transformers does"),
    (in_two_shards, "3 more tensors are in several shards: the last counts"),
    (wrong_shard, "lm_head.weight is in another shard than the index says"),
    (not_in_the_index, "and 2 more tensors are not in the index but in its shards"),
    (shard_without_index, "not read, for it is none of the weights: model-00004-of-00003.safetensors"),
    (named_file, "the weights are read from weights.safetensors, as config.json says (transformers_weights)"),
    (named_index, "the weights are read from own.safetensors.index.json"),
]


def folder_of(make: Callable[[Path, Tensors], None], source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    make(target, tensors)
    return target


def state(folder: Path) -> Tensors:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    return dict(model.state_dict())


def same(one: Tensors, two: Tensors) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("make, note", FOLDERS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_tensors_are_those_that_transformers_loads(
    checkpoints: Callable[..., Path], tmp_path: Path, make: Callable[[Path, Tensors], None], note: str
) -> None:
    folder = folder_of(make, checkpoints("mixtral"), tmp_path / "m")
    checkpoint, expected = open_checkpoint(folder), state(folder)
    again = tmp_path / "again"
    shutil.copytree(checkpoints("mixtral"), again)
    found: Tensors = {}
    for entry in checkpoint.tensors.values():
        with safe_open(folder / entry.shard, "pt") as file:
            found[entry.name] = file.get_tensor(entry.name)
    save_file(found, again / "model.safetensors", metadata={"format": "pt"})
    assert same(state(again), expected)
    structure = read_structure(checkpoint)
    notes = " ".join(structure.warnings)
    assert note in notes
    assert bool(note) == bool(structure.warnings)
    # The output holds the same weights: nothing is removed, so it is the same model.
    everything = [list(range(structure.topology.num_experts))] * len(structure.topology.decoder_layers)
    out = prune(structure, hand_plan(structure, everything), tmp_path / "out")
    assert same(state(out), expected)
    assert read_structure(out).checkpoint.tensors.keys() == checkpoint.tensors.keys()


# ------------------------------------------------------------------------------------------------------- refusals
@pytest.fixture
def sharded(checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    return folder_of(plain, checkpoints("mixtral"), tmp_path / "m")


@pytest.mark.parametrize(
    "value",
    [
        5,
        [],
        {},
        "",
        "nothing.bin",
        "../m/model.safetensors",
        "sub/x.safetensors",
        "x\0.safetensors",
    ],
)
def test_weights_named_by_the_configuration_must_be_a_file_in_the_folder(sharded: Path, value: object) -> None:
    set_config(sharded, transformers_weights=value)
    with pytest.raises(InputError, match="transformers_weights, names the file .* Only plain names"):
        open_checkpoint(sharded)


def test_weights_named_by_the_configuration_that_are_missing(sharded: Path) -> None:
    set_config(sharded, transformers_weights="gone.safetensors")
    with pytest.raises(InputError, match=r"gone\.safetensors is missing, config\.json names it"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("value", [5, "x", [], None, True])
def test_metadata_of_an_index_is_an_object(sharded: Path, value: object) -> None:
    index = json.loads((sharded / INDEX).read_text())
    (sharded / INDEX).write_text(json.dumps({**index, "metadata": value}))
    with pytest.raises(InputError, match="metadata is .*, an object is needed"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("value", [5, "x", [], None, {}])
def test_the_map_of_an_index_is_an_object(sharded: Path, value: object) -> None:
    index = json.loads((sharded / INDEX).read_text())
    (sharded / INDEX).write_text(json.dumps({**index, "weight_map": value}))
    with pytest.raises(InputError, match="has no weight_map"):
        open_checkpoint(sharded)


def test_other_files_that_transformers_would_read_instead(sharded: Path) -> None:
    for name, message in (
        ("shard-00001-model-00001-of-00001.safetensors", "holds a distributed checkpoint"),
        ("adapter_model.safetensors", r"holds an adapter \(adapter_model.safetensors\)"),
    ):
        (sharded / "adapter_config.json").write_text("{}")
        save_file({"w": torch.zeros(1)}, sharded / name)
        with pytest.raises(InputError, match=message):
            open_checkpoint(sharded)
        (sharded / name).unlink()
    set_config(sharded, configuration_files=["config.4.0.0.json"])
    with pytest.raises(InputError, match="names others for other versions of transformers"):
        open_checkpoint(sharded)
