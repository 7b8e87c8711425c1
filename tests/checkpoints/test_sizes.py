"""Predicted sizes of experts that differ in bytes: exact for a plan, the most for a number of experts."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecover.checkpoints.header import read_header
from moecover.checkpoints.inspection import inspect
from moecover.checkpoints.source import open_checkpoint
from moecover.checkpoints.structure import Structure, read_structure
from moecover.evaluation.budget_search import largest_within
from moecover.planning.keep import allowed_keeps
from moecover.pruning.card import model_card
from moecover.pruning.writer import prune
from tests.conftest import hand_plan
from tests.support.quantised import MTP, gptq, set_config, with_mtp
from tests.support.thin import random_shape


def mixed(source: Path, target: Path, packed: Callable[[int, int], bool]) -> Path:
    """A checkpoint in which some experts, by layer and id, are packed in 4 bits."""
    shutil.copytree(source, target)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        small = ".experts." in name and "shared" not in name and packed(*numbers[:2])
        tensors |= gptq(name.removesuffix(".weight"), tensor.float()) if small else {name: tensor}
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors", metadata={"format": "pt"})
    set_config(target, quantization_config={"quant_method": "gptq", "bits": 4})
    return target


@pytest.fixture
def structure(checkpoints: Callable[..., Path], tmp_path: Path) -> Structure:
    """12 experts in each of two layers; those with the low ids, more in the second layer, are packed."""
    source = checkpoints("qwen2_moe", dtype=torch.bfloat16)
    return read_structure(mixed(source, tmp_path / "mixed", lambda layer, expert: expert < 3 + 2 * layer))


@pytest.mark.parametrize("kept", [[[0, 1, 2, 3], [0, 1, 2, 3]], [[8, 9, 10, 11], [6, 7, 8, 9]], [[0, 4, 5, 11]] * 2])
def test_a_plan_s_size_is_exact(structure: Structure, tmp_path: Path, kept: list[list[int]]) -> None:
    plan = hand_plan(structure, kept)
    out = open_checkpoint(prune(structure, plan, tmp_path / "out"))
    assert structure.num_bytes(plan.kept) == out.num_bytes
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| {out.num_bytes / 1e6:.1f} |" in card
    assert model_card(structure, plan, repaired=None, command="", original_card="") in card


def test_the_most_for_a_number(structure: Structure) -> None:
    """No choice of as many experts takes more, and one takes it."""
    sizes = [[0] * 12 for _ in range(2)]
    for name, row in structure.tensors.items():
        if row.expert is not None:
            sizes[row.layer][row.expert] += structure.checkpoint.tensors[name].num_bytes
    for keep in (4, 7, 12):
        best = [
            max(itertools.combinations(range(12), keep), key=lambda ids, of=of: sum(of[e] for e in ids)) for of in sizes
        ]
        assert structure.num_bytes(keep) == structure.num_bytes(best)
    assert structure.num_bytes(12) == structure.checkpoint.num_bytes
    for row in inspect(structure)["sizes"]:
        assert row["bytes"] == structure.num_bytes(row["keep"])
    assert structure.num_bytes(4) > structure.num_bytes([[0, 1, 2, 3]] * 2)


def test_the_number_of_a_size_fits_whatever_is_kept(structure: Structure) -> None:
    for keep in allowed_keeps(structure.topology)[:-1]:
        assert largest_within(structure, structure.num_bytes(keep)) == keep
        assert largest_within(structure, structure.num_bytes(keep + 1) - 1) == keep


def test_as_many_in_every_group_of_the_router(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """Three groups of four: the largest of all lie in two groups, of which not all can stay."""
    source = checkpoints("deepseek_v3", dtype=torch.bfloat16)
    structure = read_structure(mixed(source, tmp_path / "m", lambda layer, expert: expert < 4))
    assert structure.topology.num_groups == 3
    best = [[0, 1, 4, 5, 8, 9]] * len(structure.topology.decoder_layers)
    assert structure.num_bytes(6) == structure.num_bytes(best)


@pytest.mark.parametrize("mtp", ["drop", "prune"])
def test_multi_token_prediction_layers_count(checkpoints: Callable[..., Path], tmp_path: Path, mtp: str) -> None:
    root, config = MTP["deepseek_v3"]
    whole = with_mtp(checkpoints("deepseek_v3", dtype=torch.bfloat16), tmp_path / "whole", root, **config)
    structure = read_structure(mixed(whole, tmp_path / "m", lambda layer, expert: (layer + expert) % 3 == 0))
    assert structure.mtp
    layers = len(structure.topology.decoder_layers)
    for kept in ([0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11], [0, 3, 4, 7, 8, 11]):
        out = prune(structure, hand_plan(structure, [kept] * layers), tmp_path / f"{mtp}{kept[1]}{kept[0]}", mtp=mtp)
        assert open_checkpoint(out).num_bytes == structure.num_bytes([kept] * layers, mtp=mtp)
        assert open_checkpoint(out).num_bytes <= structure.num_bytes(6, mtp=mtp)


def header_bytes(folder: Path) -> int:
    """Bytes of all tensors by their headers."""
    return sum(entry.num_bytes for file in folder.glob("*.safetensors") for entry in read_header(file)[0].values())


@pytest.mark.parametrize("mtp", ["drop", "prune"])
def test_every_shape_is_the_sum_over_its_headers(checkpoints: Callable[..., Path], tmp_path: Path, mtp: str) -> None:
    """Also where shared experts are padded; only the first shape looks at the tensors."""
    source = checkpoints("deepseek_v3", moe_intermediate_size=40, n_shared_experts=3)
    root, config = MTP["deepseek_v3"]
    structure = read_structure(with_mtp(source, tmp_path / "m", root, **config))
    structure.num_bytes(6)
    structure.checkpoint.tensors.clear()
    found = {(keep, width): structure.num_bytes(keep, width=width, mtp=mtp) for keep in (6, 9) for width in (16, 32)}
    structure = read_structure(tmp_path / "m")
    for (keep, width), size in found.items():
        out = prune(structure, random_shape(structure, width, keep=keep), tmp_path / f"{keep}x{width}", mtp=mtp)
        assert header_bytes(out) == size
