"""Where a model comes from: reads a local folder or a hub id, gives its configuration and the headers of its shards.

Only JSON is parsed and only the headers of safetensors files are read; no weight is loaded and no code of the
checkpoint runs. Names of files that the checkpoint itself gives (the index) are checked before use.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecover.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".npz")  # fmt: skip
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorEntry:
    """One tensor on disk: ``start`` and ``end`` are byte offsets into its shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Checkpoint:
    """A model as it lies on disk.

    Attributes:
        folder: local folder that holds the files; None when only the hub's headers were asked for.
        name: what the user called it (path or hub id).
        revision: commit of a hub model, None for a folder.
        config: parsed config.json.
        tensors: every tensor by name, in the order of the shards and of their bytes.
        shard_metadata: the ``__metadata__`` of every shard by file name, in order.
        index: parsed index file, None for a checkpoint of one file.
    """

    folder: Path | None
    name: str
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    shard_metadata: dict[str, dict[str, str] | None]
    index: dict[str, Any] | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of config.json that describes the language model."""
        text: dict[str, Any] = self.config.get("text_config", self.config)
        return text

    @property
    def path(self) -> Path:
        """The local folder.

        Raises:
            InputError: only headers were fetched.
        """
        if self.folder is None:
            raise InputError(f"{self.name}: only its headers were fetched, this needs the files")
        return self.folder


def is_hub_id(model: str) -> bool:
    """True for text in the form ``owner/name`` that is not a path."""
    return not model.startswith((".", "/", "~")) and re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None


def open_checkpoint(model: str | Path, *, revision: str | None = None, headers_only: bool = False) -> Checkpoint:
    """The checkpoint behind a local folder or a hub id.

    Args:
        model: folder with config.json and safetensors files, or ``owner/name`` on the hub.
        revision: branch, tag or commit of a hub model.
        headers_only: do not download the weights of a hub model, read their headers over the network.

    Raises:
        InputError: the folder or file is missing, truncated or malformed, or the hub does not have it.
    """
    text = os.fspath(model)
    try:
        folder = Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"no folder {text}: {error}") from error
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"--revision is for hub models, {text} is a folder")
        return open_folder(folder, name=text)
    if folder.exists():
        raise InputError(f"{text} is a file. Give the folder that holds config.json and the safetensors files")
    if not is_hub_id(text):
        raise InputError(f"no folder {text}. Give an existing folder or a hub id in the form owner/name")
    if headers_only:
        return _open_hub_headers(text, revision)
    local = _download(text, revision)
    opened = open_folder(local, name=text)
    commit = local.name if re.fullmatch(r"[0-9a-f]{40}", local.name) else revision
    return Checkpoint(local, text, commit, opened.config, opened.tensors, opened.shard_metadata, opened.index)


def _hub_error(model: str, revision: str | None, error: Exception) -> InputError:
    at = f" at revision {revision}" if revision else ""
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return InputError(f"no folder {model}, and the hub did not give {model}{at}: {reason}")


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    unwanted = [f"*{suffix}" for suffix in OTHER_WEIGHTS if suffix != ".safetensors"]
    try:
        return Path(
            snapshot_download(model, revision=revision, ignore_patterns=[*unwanted, "original/*", "*/*.safetensors"])
        )
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean "not to be had"
        raise _hub_error(model, revision, error) from error


def _open_hub_headers(model: str, revision: str | None) -> Checkpoint:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    try:
        config_file = Path(hf_hub_download(model, "config.json", revision=revision))
        repository = get_safetensors_metadata(model, revision=revision)
    except Exception as error:  # as in _download
        raise _hub_error(model, revision, error) from error
    config = _read_json(config_file)
    tensors = {
        name: TensorEntry(name, info.dtype, tuple(info.shape), shard, *info.data_offsets)
        for shard, header in sorted(repository.files_metadata.items())
        for name, info in header.tensors.items()
    }
    return Checkpoint(None, model, revision, config, tensors, dict.fromkeys(repository.files_metadata), None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {type(value).__name__}, a JSON object is needed")
    return value


def _plain_name(name: object, where: Path) -> str:
    """A file name from a checkpoint, refused when it could point out of its folder."""
    if not isinstance(name, str) or name != os.path.basename(name) or "\\" in name or not name.endswith(".safetensors"):  # noqa: PTH119
        raise InputError(f"{where} names the file {name!r}. Only plain names that end in .safetensors are read")
    return name


def _sizes(values: Any) -> tuple[int, ...]:
    if not all(type(n) is int and n >= 0 for n in values):
        raise ValueError(f"{values} are no sizes")
    return tuple(values)


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str] | None]:
    """Entries and ``__metadata__`` of one safetensors file, checked against the size of the file.

    Raises:
        InputError: the file is truncated or malformed.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise InputError(f"{path} is truncated or no safetensors file: {size} bytes, header of {length} bytes. Fetch it again")  # fmt: skip
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None)
        rows = []
        for name, v in header.items():
            begin, end = _sizes(v["data_offsets"])
            rows.append((name, str(v["dtype"]), _sizes(v["shape"]), begin, end))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} has no valid safetensors header: {error}") from error
    rows.sort(key=lambda row: (row[3], row[4]))
    entries, position = {}, 0
    for name, dtype, shape, begin, end in rows:
        bits = DTYPE_BITS.get(dtype)
        if bits is None:
            raise InputError(f"{path}: tensor {name} has the unknown type {dtype}")
        count = math.prod(shape)
        if begin != position or (end - begin) * 8 != count * bits:
            raise InputError(f"{path}: tensor {name} has shape {list(shape)} of {dtype}, {count * bits // 8} bytes, but the header gives it bytes {begin} to {end}")  # fmt: skip
        position = end
        entries[name] = TensorEntry(name, dtype, shape, path.name, 8 + length + begin, 8 + length + end)
    if 8 + length + position != size:
        raise InputError(
            f"{path} is truncated: {size} bytes, its header describes {8 + length + position}. Fetch it again"
        )
    return entries, metadata


def open_folder(folder: Path, *, name: str) -> Checkpoint:
    """The checkpoint in a local folder; see `open_checkpoint`."""
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise InputError(f"{folder} holds no config.json. Give the folder of a Hugging Face checkpoint")
    config = _read_json(config_path)
    index: dict[str, Any] | None = None
    if (folder / INDEX).is_file():
        index = _read_json(folder / INDEX)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{folder / INDEX} has no weight_map")
        shards = sorted({_plain_name(shard, folder / INDEX) for shard in weight_map.values()})
    elif (folder / SINGLE).is_file():
        weight_map, shards = None, [SINGLE]
    else:
        other = sorted(p.name for p in folder.iterdir() if p.name.endswith(OTHER_WEIGHTS))
        found = f"; {', '.join(other[:3])} is not read, weights come from safetensors only" if other else ""
        raise InputError(f"{folder} has a config.json but no weights: neither {SINGLE} nor {INDEX}{found}")
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, dict[str, str] | None] = {}
    for shard in shards:
        if not (folder / shard).is_file():
            raise InputError(f"{folder / shard} is missing, {INDEX} names it. Fetch the checkpoint again")
        entries, metadata[shard] = read_header(folder / shard)
        if repeated := entries.keys() & tensors.keys():
            raise InputError(f"{folder}: tensor {min(repeated)} is in two shards")
        tensors.update(entries)
    if weight_map is not None:
        for tensor, shard in weight_map.items():
            if tensor not in tensors or tensors[tensor].shard != shard:
                raise InputError(f"{folder / INDEX} says that {tensor} is in {shard}, but it is not there")
        tensors = {key: entry for key, entry in tensors.items() if key in weight_map}
    return Checkpoint(folder, name, None, config, tensors, metadata, index)
