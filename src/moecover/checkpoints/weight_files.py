"""Which files of a checkpoint hold its weights, by the rule of transformers' ``from_pretrained``: names in, names out.

The file that config.json gives under ``transformers_weights``; else model.safetensors; else the shards of
model.safetensors.index.json. All tensors of these shards count, whatever the index says of them, and of a tensor that
lies in several shards the last by the shards' names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from moecover.checkpoints.config_edit import Config
from moecover.checkpoints.header import TensorEntry
from moecover.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
INDEX_ENDING = ".safetensors.index.json"
OTHER_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".tflite",
    ".npz",
)
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")


def plain_name(name: object, where: object) -> str:
    """A file name from a checkpoint, refused if it could point out of its folder.

    Raises:
        InputError: it is no plain name of a safetensors file.
    """
    if not isinstance(name, str) or re.fullmatch(r"[^/\\\0]*\.safetensors", name) is None:
        raise InputError(f"{where} names the file {name!r}. Only plain names that end in .safetensors are read")
    return name


def named_weights(config: Config, where: str) -> str | None:
    """The file that config.json names as the one with the weights, or as their index; None if it names none.

    Args:
        config: parsed config.json.
        where: the checkpoint in messages.

    Raises:
        InputError: the name is not one of a file in the folder.
    """
    given = config.get("transformers_weights")
    if given is None:
        return None
    if isinstance(given, str) and given.endswith(INDEX_ENDING):
        return plain_name(given.removesuffix(".index.json"), _entry(where)) + ".index.json"
    return plain_name(given, _entry(where))


def _entry(where: str) -> str:
    return f"{where}: config.json, transformers_weights,"


def check_config(config: Config, where: str) -> None:
    """Refuse a configuration that sends transformers to another file.

    Raises:
        InputError: it does.
    """
    if "configuration_files" in config:
        raise InputError(
            f"{where}: config.json names others for other versions of transformers (configuration_files). "
            "Make the one for your version config.json, without that entry"
        )


def weights_in(folder: Path, config: Config) -> tuple[str, list[str]]:
    """The file with a folder's weights, or their index, and notes on what lies beside it and is not read.

    Raises:
        InputError: there is none, or transformers would read what is not supported.
    """
    names = sorted(path.name for path in folder.iterdir())
    if other := next((name for name in names if DISTRIBUTED.fullmatch(name)), None):
        raise InputError(
            f"{folder} holds a distributed checkpoint ({other}), which transformers reads instead of other files. "
            "Save the model whole, or move these files away"
        )
    if ADAPTER in names and (adapter := next((name for name in ADAPTER_WEIGHTS if name in names), None)):
        raise InputError(
            f"{folder} holds an adapter ({adapter}), which transformers adds to the weights where peft is installed. "
            "Merge it into them, or move it away"
        )
    if (named := named_weights(config, str(folder))) is not None:
        if not (folder / named).is_file():
            raise InputError(f"{folder / named} is missing, config.json names it (transformers_weights)")
        return named, [f"the weights are read from {named}, as config.json says (transformers_weights)"]
    if (folder / SINGLE).is_file():
        beside = (folder / INDEX).is_file()
        return SINGLE, [f"{SINGLE} is read, as transformers does, and not {INDEX} beside it"] if beside else []
    if (folder / INDEX).is_file():
        return INDEX, []
    others = [name for name in names if name.endswith(OTHER_WEIGHTS)]
    found = f"; {', '.join(others[:3])} is not read, weights come from safetensors only" if others else ""
    raise InputError(f"{folder} has a config.json but no weights: neither {SINGLE} nor {INDEX}{found}")


def shards_of(index: Config, where: object) -> list[str]:
    """Names of the shards of an index, in the order in which transformers reads them.

    Args:
        index: the parsed file.
        where: the file in messages.

    Raises:
        InputError: the index is malformed.
    """
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{where} has no weight_map")
    if not isinstance(metadata, dict):
        raise InputError(f"{where}: metadata is {metadata!r}, an object is needed")
    return sorted({plain_name(shard, where) for shard in weight_map.values()})


def merged(
    headers: Mapping[str, Mapping[str, TensorEntry]], index: Config | None, where: object
) -> tuple[dict[str, TensorEntry], list[str]]:
    """The tensors of all shards by name, in the order of the shards and of their bytes, and notes.

    Args:
        headers: the tensors of every shard, in the order of reading.
        index: the index; None for a checkpoint of one file.
        where: the index in messages.

    Raises:
        InputError: the index names a tensor that no shard has.
    """
    tensors, repeated = dict[str, TensorEntry](), list[str]()
    for entries in headers.values():
        for name, entry in entries.items():
            if tensors.pop(name, None) is not None:
                repeated.append(name)
            tensors[name] = entry
    notes = [_note(repeated, "in several shards: the last counts, as in transformers")] if repeated else []
    if index is None:
        return tensors, notes
    named: dict[str, str] = index["weight_map"]
    for name, shard in named.items():
        if name not in tensors:
            raise InputError(f"{where} says that {name} is in {shard}, but it is not there")
    if unnamed := [name for name in tensors if name not in named]:
        notes.append(_note(unnamed, "not in the index but in its shards: read, as in transformers"))
    if moved := [name for name, shard in named.items() if name not in headers[shard]]:
        notes.append(_note(moved, "in another shard than the index says: read from there, as in transformers"))
    return tensors, notes


def _note(names: Iterable[str], what: str) -> str:
    found = list(names)
    return f"{found[0]} {f'and {len(found) - 1} more tensors are' if found[1:] else 'is'} {what}"


def unread_note(folder: Path, shards: Iterable[str]) -> list[str]:
    """A note on safetensors files in a folder that hold none of its weights; none if there are none."""
    unread = sorted({path.name for path in folder.glob("*.safetensors")} - set(shards))
    return [f"not read, for it is none of the weights: {', '.join(unread[:3])}{' ...' * bool(unread[3:])}"] * bool(
        unread
    )


def inside(folder: Path, file: Path) -> bool:
    """Whether a file's content lies in the folder, or in the hub's cache if the folder is a snapshot of it.

    A symbolic link to anywhere else is not part of the checkpoint.
    """
    home, target = folder.resolve(), file.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    return home in target.parents or blobs in target.parents
