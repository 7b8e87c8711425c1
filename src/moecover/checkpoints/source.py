"""Where a model comes from: a local folder, a hub id or a GGUF file; gives its configuration and its shards' headers.

Only JSON is parsed and only the headers of safetensors and GGUF files are read; no weight is loaded and no code of the
checkpoint runs. File names that the checkpoint itself gives (in its index) are checked before use.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from moecover.checkpoints.config_edit import QUANTISATION_FILES, Config, quantisation
from moecover.checkpoints.header import TensorEntry, entries_of, read_header, row_of
from moecover.checkpoints.shipped import SHIPPED, shipped_model
from moecover.checkpoints.weight_files import (
    INDEX_ENDING,
    OTHER_WEIGHTS,
    check_config,
    merged,
    named_weights,
    plain_name,
    shards_of,
    unread_note,
    weights_in,
)
from moecover.errors import InputError, arg
from moecover.files.reading import read_json
from moecover.gguf.parts import GgufFiles, begins_as_gguf, is_gguf, open_gguf
from moecover.text import Cell, Shown, size_text

NUMBERS_SHOWN = {  # keys of a GGUF's architecture, as config.json calls them
    "context_length": "max_position_embeddings",
    "expert_shared_count": "n_shared_experts",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
EMBEDDING = "token_embd.weight"


@dataclass(frozen=True, repr=False)
class Checkpoint(Shown):
    """A model as it lies on disk.

    Attributes:
        folder: local folder that holds the files; None if only the hub's headers were requested.
        name: what the user called it (path or hub id).
        revision: commit of a hub model, None for a folder.
        config: parsed config.json.
        tensors: all tensors by name, in the order of the shards and of their bytes.
        shard_metadata: the ``__metadata__`` of every shard by file name, in order.
        index: parsed index file, None for a checkpoint of one file.
        index_name: its name, None for a checkpoint of one file.
        notes: what the user should know of how the files were read.
        gguf: the headers of GGUF files; None for safetensors. The configuration then holds what these say in the words
            of config.json, as far as it is shown to the user.
    """

    folder: Path | None
    name: str
    revision: str | None
    config: Config
    tensors: dict[str, TensorEntry]
    shard_metadata: dict[str, dict[str, str] | None]
    index: Config | None
    index_name: str | None = None
    notes: tuple[str, ...] = ()
    gguf: GgufFiles | None = None

    def summary(self) -> str:
        """Name, family, number of tensors and size."""
        family, size = self.config.get("model_type"), size_text(self.num_bytes)
        return f"{self.name}: {family}, {len(self.tensors)} tensors, {size}"

    def rows_shown(self) -> list[dict[str, Cell]]:
        """One row per shard: its name, number of tensors and their bytes."""
        sizes: dict[str, list[int]] = {shard: [] for shard in self.shard_metadata}
        for entry in self.tensors.values():
            sizes[entry.shard].append(entry.num_bytes)
        return [{"shard": shard, "tensors": len(found), "bytes": sum(found)} for shard, found in sizes.items()]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    @property
    def text_config(self) -> Config:
        """The part of config.json that describes the language model."""
        text = self.config.get("text_config")
        return text if isinstance(text, dict) else self.config

    @property
    def path(self) -> Path:
        """The local folder.

        Raises:
            InputError: only headers were fetched.
        """
        if self.folder is None:
            raise InputError(f"{self.name}: only its headers were fetched, this needs the files")
        return self.folder

    @property
    def declared_quantisation(self) -> str | None:
        """The quantisation that config.json or a quantiser's own settings file declares; None if neither does."""
        if found := quantisation(self.config):
            return found
        if self.folder is None:
            return None
        return next((name for name in QUANTISATION_FILES if (self.folder / name).is_file()), None)


def is_hub_id(model: str) -> bool:
    """Whether a text has the form ``owner/name`` and is not a path."""
    return not model.startswith((".", "/", "~")) and re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None


def open_checkpoint(model: str | Path, *, revision: str | None = None, headers_only: bool = False) -> Checkpoint:
    """Open the checkpoint in a local folder or on the hub.

    Args:
        model: folder with config.json and safetensors files, a GGUF file (of a split one the first part),
            ``owner/name`` on the hub, or ``shipped:NAME`` for a model that comes with the package.
        revision: branch, tag or commit of a hub model.
        headers_only: read the headers of a hub model over the network, without downloading its weights.

    Raises:
        InputError: the folder or file is missing, truncated or malformed, or the hub does not have it.
    """
    text = os.fspath(model)
    if text.startswith(SHIPPED):
        if revision is not None:
            raise InputError(f"{arg('revision')} is for hub models, {text} comes with the package")
        return open_folder(shipped_model(text.removeprefix(SHIPPED)), name=text)
    try:
        folder = Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"no folder {text}: {error}") from error
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"{arg('revision')} is for hub models, {text} is a folder")
        return open_folder(folder, name=text)
    if is_gguf(folder):
        if revision is not None:
            raise InputError(f"{arg('revision')} is for hub models, {text} is a file")
        return _open_gguf(folder, name=text)
    if begins_as_gguf(folder):
        raise InputError(f"{text} is a GGUF file by its content. Link it under such a name: ln -s {text} NAME.gguf")
    if folder.exists():
        raise InputError(
            f"{text} is a file. Give a .gguf file, or the folder that holds config.json and the safetensors files"
        )
    if not is_hub_id(text):
        raise InputError(f"no folder {text}. Give an existing folder or a hub id in the form owner/name")
    if headers_only:
        return _open_hub_headers(text, revision)
    local = _download(text, revision)
    opened = open_folder(local, name=text)
    commit = local.name if re.fullmatch(r"[0-9a-f]{40}", local.name) else revision
    return replace(opened, revision=commit)


# -------------------------------------------------------------------------------------------------------------- GGUF
def _open_gguf(path: Path, *, name: str) -> Checkpoint:
    """Open a GGUF file with all its parts."""
    files = open_gguf(path)
    family = files.first.text("general.architecture")
    if not family:
        raise InputError(f"{name} has no general.architecture: it holds no model")
    tensors = {
        info.name: TensorEntry(info.name, info.kind.name, info.shape, part.path.name, info.start, info.end)
        for part in files.parts
        for info in part.tensors.values()
    }
    config: Config = {"model_type": family}
    for key, shown in NUMBERS_SHOWN.items():
        if (value := files.first.number(f"{family}.{key}")) is not None:
            config[shown] = value
    if EMBEDDING in tensors:
        config["vocab_size"] = tensors[EMBEDDING].shape[0]
    metadata = dict.fromkeys(part.path.name for part in files.parts)
    return Checkpoint(path.parent, name, None, config, tensors, metadata, None, gguf=files)


# --------------------------------------------------------------------------------------------------------------- hub
def _hub_error(model: str, revision: str | None, error: Exception) -> InputError:
    at = f" at revision {revision}" if revision else ""
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    fetch = f". Fetch a file of it: hf download {model} FILE.gguf --local-dir ." if "GGUF" in model.upper() else ""
    return InputError(f"no folder {model}, and the hub did not give {model}{at}: {reason}{fetch}")


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    unwanted = [f"*{suffix}" for suffix in OTHER_WEIGHTS if suffix != ".safetensors"]
    try:
        return Path(
            snapshot_download(model, revision=revision, ignore_patterns=[*unwanted, "original/*", "*/*.safetensors"])
        )
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean that it cannot be fetched
        raise _hub_error(model, revision, error) from error


def _open_hub_headers(model: str, revision: str | None) -> Checkpoint:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download, parse_safetensors_file_metadata

    try:
        config = _read_json(Path(hf_hub_download(model, "config.json", revision=revision)))
        check_config(config, model)
        if (named := named_weights(config, model)) is None:
            files = get_safetensors_metadata(model, revision=revision).files_metadata
        else:
            index = _read_json(Path(hf_hub_download(model, named, revision=revision))) if _is_index(named) else None
            shards = [named] if index is None else shards_of(index, named)
            files = {s: parse_safetensors_file_metadata(model, s, revision=revision) for s in shards}
        rows = {
            shard: [row_of(n, t.dtype, list(t.shape), list(t.data_offsets)) for n, t in header.tensors.items()]
            for shard, header in sorted(files.items())
        }
    except InputError:
        raise
    except Exception as error:  # as in _download
        raise _hub_error(model, revision, error) from error
    headers = {plain_name(s, model): entries_of(of_shard, s, f"{model}, {s}") for s, of_shard in rows.items()}
    tensors, notes = merged(headers, None, model)
    return Checkpoint(None, model, revision, config, tensors, dict.fromkeys(headers), None, notes=tuple(notes))


# ------------------------------------------------------------------------------------------------------------ folder
def _read_json(path: Path) -> Config:
    try:
        value = read_json(path)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {type(value).__name__}, a JSON object is needed")
    return value


def _is_index(name: str) -> bool:
    return name.endswith(INDEX_ENDING)


def open_folder(folder: Path, *, name: str) -> Checkpoint:
    """Open the checkpoint in a local folder; see `open_checkpoint`."""
    config_path = folder / "config.json"
    if not config_path.is_file():
        files = sorted(path.name for path in folder.iterdir() if is_gguf(path))
        give = f"the file, {files[0]}" if files else "the folder of a Hugging Face checkpoint"
        raise InputError(f"{folder} holds no config.json. Give {give}")
    config = _read_json(config_path)
    check_config(config, str(folder))
    weights, notes = weights_in(folder, config)
    index = _read_json(folder / weights) if _is_index(weights) else None
    shards = [weights] if index is None else shards_of(index, folder / weights)
    headers, metadata = dict[str, dict[str, TensorEntry]](), dict[str, dict[str, str] | None]()
    for shard in shards:
        if not (folder / shard).is_file():
            raise InputError(f"{folder / shard} is missing, {weights} names it. Fetch the checkpoint again")
        headers[shard], metadata[shard] = read_header(folder / shard)
    tensors, more = merged(headers, index, folder / weights)
    said = (*notes, *more, *unread_note(folder, shards))
    return Checkpoint(folder, name, None, config, tensors, metadata, index, None if index is None else weights, said)
