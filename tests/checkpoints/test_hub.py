"""Hub models over the real client, against a small HTTP server that plays the hub; in processes that know where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fake_hub import COMMIT, Hub, moecover, served

REPO = "someone/tiny-moe"


@pytest.fixture
def hub(checkpoints: Callable[..., Path], tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repo"
    shutil.copytree(checkpoints("qwen3_moe", shards=True), folder)
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    with served({REPO: folder}) as server:
        yield server


def test_inspect_fetches_headers_only(hub: Hub, tmp_path: Path) -> None:
    ((status, out, err),) = moecover(hub.url, tmp_path / "cache", ["inspect", REPO, "--json"])
    assert status == 0, err
    facts = json.loads(out)
    assert (facts["family"], facts["experts"], facts["moe_layers"]) == ("qwen3_moe", 8, [0, 2])
    on_disk = sum(p.stat().st_size for p in hub.folder.glob("*.safetensors"))
    assert facts["total_bytes"] < on_disk  # headers are not weights
    assert "pytorch_model.bin" not in hub.sent


def test_weights_that_the_configuration_names(hub: Hub, tmp_path: Path) -> None:
    """The same tensors from the headers over the network as from the downloaded files, and no others."""
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "own.safetensors.index.json").write_bytes((hub.folder / "model.safetensors.index.json").read_bytes())
    (hub.folder / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "own.safetensors.index.json"})
    )
    (hub.folder / "model.safetensors").write_bytes(b"never read")
    commands = [["inspect", source, "--json"] for source in (hub.folder, REPO)]
    first, second = moecover(hub.url, tmp_path / "cache", *commands)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    before, facts = json.loads(first[1]), json.loads(second[1])
    assert {**facts, "model": 0, "warnings": 0} == {**before, "model": 0, "warnings": 0}
    assert facts["shards"] == len(list(hub.folder.glob("model-*.safetensors")))


def test_prune_a_hub_model_at_a_revision(hub: Hub, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": list(range(40))}) + "\n")
    prune = ["prune", REPO, "--revision", "v1", "--corpus", f"r={rows}", "--retain", 0.5, "-o", tmp_path / "out"]
    verify = ["verify", REPO, tmp_path / "out", "--corpus", f"r={rows}"]
    for status, out, err in moecover(hub.url, tmp_path / "cache", prune, verify):
        assert status == 0, err + out
    manifest = json.loads((tmp_path / "out" / "moecover.json").read_text())
    assert manifest["source"]["name"] == REPO
    assert manifest["source"]["revision"] == COMMIT
    assert f"base_model: {REPO}" in (tmp_path / "out" / "README.md").read_text()
    assert "pytorch_model.bin" not in hub.sent


def test_a_model_that_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    absent, no_revision = ["inspect", "someone/absent-gguf"], ["inspect", REPO, "--revision", "no"]
    for (_, name, *_), done in zip(
        (absent, no_revision), moecover(hub.url, tmp_path / "cache", absent, no_revision), strict=True
    ):
        status, _, err = done
        assert status == 2
        assert f"no folder {name}, and the hub did not give {name}" in err
        assert len(err.strip().splitlines()) == 1
        assert (f"hf download {name} FILE.gguf" in err) == ("gguf" in name)


def test_a_refusal_comes_before_the_download(hub: Hub, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": list(range(40))}) + "\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("x")
    config = json.loads((hub.folder / "config.json").read_text())
    prune = ["prune", REPO, "--corpus", f"r={rows}"]
    below, taken = [*prune, "--keep", 1, "-o", tmp_path / "o"], [*prune, "--keep", 4, "-o", tmp_path / "taken"]
    found = moecover(hub.url, tmp_path / "cache", below, taken)
    dry = ["profile", REPO, "--corpus", f"r={rows}", "-o", tmp_path / "p", "--dry-run"]
    ((status, out, err),) = moecover(hub.url, tmp_path / "cache", dry)
    assert (status, f"{REPO}, from the hub" in out, "not estimated" in out) == (0, True, True), err
    (hub.folder / "config.json").write_text(json.dumps({**config, "n_group": 4}))
    found += moecover(hub.url, tmp_path / "another cache", [*prune, "--keep", 4, "-o", tmp_path / "o"])
    for (status, _, err), message in zip(found, ("top-k of 2", "taken exists", "groups for"), strict=True):
        assert status == 2
        assert message in err
    assert "tokenizer.json" not in hub.sent  # a whole download would have fetched it
