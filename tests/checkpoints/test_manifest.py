"""The manifest is checked when it is read; `verify` needs a hash of every file that the model is read from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecover.checkpoints.manifest import check_complete, read_manifest
from moecover.checkpoints.source import open_checkpoint
from moecover.errors import InputError
from moecover.verification.verify import verify
from tests.support.proofs import edit_manifest

HASH = "0" * 32


@pytest.fixture
def cut(pruned: Callable[..., Path], tmp_path: Path) -> Path:
    """A pruned checkpoint in shards that a test may damage."""
    shutil.copytree(pruned("mixtral", shards=True), tmp_path / "cut")
    return tmp_path / "cut"


DAMAGE: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda m: m.update(files=None), "files is no JSON object"),
    (lambda m: m.update(files=[]), "files is no JSON object"),
    (lambda m: m.pop("files"), "files"),
    (lambda m: m["files"].update({"config.json": None}), "the hash of config.json is None"),
    (lambda m: m["files"].update({"config.json": "0" * 31}), "the hash of config.json is"),
    (lambda m: m["files"].update({"config.json": "Z" * 32}), "the hash of config.json is"),
    (lambda m: m["files"].update({"config.json": HASH + "\n"}), "the hash of config.json is"),
    (lambda m: m["files"].update({"config.json": [HASH]}), "the hash of config.json is"),
    (lambda m: m["files"].update({"../x": HASH}), "'../x', which lies outside the folder"),
    (lambda m: m["files"].update({"/etc/passwd": HASH}), "which lies outside the folder"),
    (lambda m: m["files"].update({"": HASH}), "which lies outside the folder"),
    (lambda m: m.update(plan=None), "plan is no JSON object"),
    (lambda m: m.update(source="x"), "source is no JSON object"),
    (lambda m: m["source"].update(name=None), "name of source is no text"),
    (lambda m: m["source"].update(fingerprint=5), "fingerprint of source is no text"),
    (lambda m: m.update(hash=None), "its hashes are None"),
    (lambda m: m.update(mtp=[]), "mtp is neither drop nor prune"),
    (lambda m: m.update(repair=5), "repair is no JSON object"),
    (lambda m: m["experts"][0].update(decoder_layer="0"), "decoder_layer of experts is no integer"),
    (lambda m: m["experts"][0].update(old_to_new=[1]), "is damaged"),
    (lambda m: m["experts"][0].update(old_to_new={"x": 1}), "an old_to_new has other ids"),
]


@pytest.mark.parametrize("change, message", DAMAGE)
def test_a_damaged_manifest(cut: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_manifest(cut, change)
    with pytest.raises(InputError, match=r"moecover\.json is damaged: .*Prune again") as caught:
        read_manifest(open_checkpoint(cut))
    assert message in str(caught.value)


def test_a_manifest_without_rows_of_the_model_s_files(
    checkpoints: Callable[..., Path], cut: Path, pruned: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(cut)
    first, *_, last = checkpoint.shard_metadata
    check_complete(checkpoint, read_manifest(checkpoint))
    for gone in ("config.json", "model.safetensors.index.json", first, last):
        edit_manifest(cut, lambda m, gone=gone: m["files"].pop(gone))
        with pytest.raises(InputError, match=f"it has no hash of {gone}"):
            check_complete(checkpoint, read_manifest(checkpoint))
        shutil.copy(pruned("mixtral", shards=True) / "moecover.json", cut)
    edit_manifest(cut, lambda m: m.update(files={}))
    with pytest.raises(
        InputError, match=r"it has no hash of config\.json, model\.safetensors\.index\.json, model-00001"
    ):
        verify(checkpoints("mixtral", shards=True), cut)


def test_a_row_of_a_file_that_is_absent(checkpoints: Callable[..., Path], cut: Path) -> None:
    edit_manifest(cut, lambda m: m["files"].update({"gone.json": HASH}))
    found = verify(checkpoints("mixtral", shards=True), cut)
    assert (found.equal, found.changed_files) == (False, ["gone.json"])
