"""Proofs of repaired checkpoints: tensors neither of the original nor of the repair, and damaged manifests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecover.checkpoints.structure import read_structure
from moecover.cli import main as cli
from moecover.errors import InputError
from moecover.verification.verify import verify
from tests.support.proofs import edit_manifest, rehash
from tests.support.repairs import half, manifest_of, written


# -------------------------------------------------------------------------------------------------------------- verify
def change_another(tensors: dict[str, torch.Tensor], names: set[str]) -> str:
    name = next(k for k in tensors if k.endswith("k_proj.weight"))
    tensors[name][0, 0] = -tensors[name][0, 0]
    return name


def change_a_repaired(tensors: dict[str, torch.Tensor], names: set[str]) -> str:
    name = min(names)
    tensors[name].view(-1)[0] += 0.5
    return name


@pytest.mark.parametrize("change", [change_another, change_a_repaired])
def test_verify_finds_a_tensor_that_is_neither_original_nor_repaired(
    checkpoints: Callable[..., Path], tmp_path: Path, change: Callable[..., str], capsys
) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    cut = written(structure, half(structure), tmp_path)
    tensors = load_file(cut / "model.safetensors")
    name = change(tensors, set(manifest_of(cut)["tensors"]))
    save_file(tensors, cut / "model.safetensors", metadata={"format": "pt"})
    rehash(cut, "model.safetensors")
    result = verify(structure.checkpoint.path, cut)
    assert not result["equal"]
    assert result["changed_files"] == []
    assert result["changed_tensors"] == [name]
    assert cli.main(["verify", str(structure.checkpoint.path), str(cut)]) == 1
    assert f"neither the original's nor what the repair made, the first is {name}" in capsys.readouterr().out


def test_a_manifest_that_names_other_tensors_is_damaged(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    cut = written(structure, half(structure), tmp_path)
    edit_manifest(cut, lambda m: m["repair"]["tensors"].update({"model.layers.1.mlp.gate.weight": "0" * 32}))
    with pytest.raises(InputError, match="it names other tensors than its layers repair"):
        verify(structure.checkpoint.path, cut)
