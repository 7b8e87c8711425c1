"""Thinner experts of quantised checkpoints: rows and columns go by whole blocks, with their scales, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moecover
from moecover.checkpoints.source import open_checkpoint
from moecover.checkpoints.structure import Structure, read_structure
from moecover.checkpoints.topology import Width
from moecover.cli.main import main
from moecover.errors import InputError
from moecover.planning.artifact import Plan
from moecover.pruning.writer import prune
from moecover.runtime import masking
from moecover.runtime.loading import load_model
from moecover.verification.verify import verify
from tests.conftest import random_corpus
from tests.support.proofs import logits_of, rehash
from tests.support.quantised import mxfp4, quantise, set_config
from tests.support.thin import channels_zeroed, random_shape

FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "modules_to_not_convert": ["lm_head", "gate", "q_proj", "k_proj", "v_proj"],
}


def in_blocks(structure: Structure, width: int, group: int) -> Plan:
    """A plan of random experts and random whole blocks of channels."""
    assert isinstance(structure.width, Width)
    plan, rng = random_shape(structure, width), np.random.default_rng(1)
    blocks = np.arange(structure.width.channels).reshape(-1, group)
    for layer in plan.layers:
        layer.channels = [
            blocks[sorted(rng.choice(len(blocks), width // group, replace=False))].flatten().tolist()
            for _ in layer.kept
        ]
    return plan


@pytest.mark.parametrize(
    "family, config, width",
    [
        ("qwen2_moe", {"moe_intermediate_size": 64}, 32),
        ("deepseek_v3", {"moe_intermediate_size": 64}, 48),  # one shared expert of 64 becomes two of 48, padded
    ],
)
def test_fp8_computes_what_its_zeroed_original_does(
    checkpoints: Callable[..., Path], tmp_path: Path, family: str, config: dict[str, int], width: int
) -> None:
    source = checkpoints(family, dtype=torch.bfloat16, **config)
    folder = quantise(source, tmp_path / "m", "fp8", weight_block_size=[16, 16], **FP8)
    structure = read_structure(folder)
    assert isinstance(structure.width, Width)
    assert structure.width.group == 16
    plan = in_blocks(structure, width, 16)
    out = prune(structure, plan, tmp_path / "out")
    cut = read_structure(out)
    assert cut.checkpoint.num_bytes == structure.num_bytes(plan.kept, width=width)
    assert isinstance(cut.width, Width)
    assert (cut.width.channels, cut.width.group) == (width, 16)
    assert verify(folder, out)["equal"]
    model, found = load_model(structure), logits_of(load_model(cut))
    with masking.masked(model, structure, plan.kept), channels_zeroed(model, structure, plan):
        zeroed = logits_of(model)
    assert (found - zeroed).abs().max() <= 2e-2 * zeroed.abs().max()
    tensors = load_file(out / "model.safetensors")
    name = f"model.layers.{structure.topology.decoder_layers[0]}.mlp.experts.0.down_proj.weight_scale_inv"
    tensors[name] = tensors[name].flip(1).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    rehash(out, "model.safetensors")
    assert not verify(folder, out)["equal"], "scales of other columns"


def test_one_scale_of_many_columns_serves_any_of_them(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    folder = quantise(
        checkpoints("qwen2_moe", dtype=torch.bfloat16), tmp_path / "m", "fp8", weight_block_size=[128, 128], **FP8
    )
    structure = read_structure(folder)
    out = prune(structure, random_shape(structure, 8), tmp_path / "out")
    assert verify(folder, out)["equal"]


def numbers(tensors: dict[str, torch.Tensor], name: str, data: str, scale: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of 4 bits and the scale of each, ``[..., row, column]``."""
    packed, scales = tensors[name + data], tensors[name + scale].view(torch.uint8)
    codes = torch.stack([packed & 15, packed >> 4], -1).reshape(*scales.shape[:-1], -1)
    return codes, scales.repeat_interleave(codes.shape[-1] // scales.shape[-1], -1)


def test_mxfp4_keeps_rows_and_blocks_of_columns(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    folder = mxfp4(checkpoints("gpt_oss", intermediate_size=128), tmp_path / "m")
    set_config(folder, quantization_config={"quant_method": "mxfp4"})
    structure = read_structure(folder)
    assert isinstance(structure.width, Width)
    assert structure.width.group == 32
    plan = in_blocks(structure, 64, 32)
    out = prune(structure, plan, tmp_path / "out")
    assert open_checkpoint(out).num_bytes == structure.num_bytes(plan.kept, width=64)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    for layer in plan.layers:
        at = f"model.layers.{layer.decoder_layer}.mlp.experts."
        for place, (expert, ids) in enumerate(zip(layer.kept, layer.channels, strict=True)):
            rows = [2 * i + part for i in ids for part in range(2)]  # gate and up alternate
            for old, new in zip(
                *(numbers(t, f"{at}gate_up_proj", "_blocks", "_scales") for t in (before, after)), strict=True
            ):
                assert torch.equal(old[expert][rows], new[place])
            for old, new in zip(
                *(numbers(t, f"{at}down_proj", "_blocks", "_scales") for t in (before, after)), strict=True
            ):
                assert torch.equal(old[expert][:, ids], new[place])
            assert torch.equal(before[f"{at}gate_up_proj_bias"][expert][rows], after[f"{at}gate_up_proj_bias"][place])
            assert torch.equal(before[f"{at}down_proj_bias"][expert], after[f"{at}down_proj_bias"][place])


def test_nvfp4_keeps_rows_and_blocks_of_columns(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    folder = quantise(checkpoints("mixtral", intermediate_size=64), tmp_path / "m", "modelopt")
    structure = read_structure(folder)
    assert isinstance(structure.width, Width)
    assert structure.width.group == 16
    plan = in_blocks(structure, 32, 16)
    out = prune(structure, plan, tmp_path / "out")
    assert open_checkpoint(out).num_bytes == structure.num_bytes(plan.kept, width=32)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    for layer in plan.layers:
        at = f"model.layers.{layer.decoder_layer}.block_sparse_moe.experts."
        for place, (expert, ids) in enumerate(zip(layer.kept, layer.channels, strict=True)):
            for leaf, cut in ("w1", np.s_[ids]), ("w3", np.s_[ids]), ("w2", np.s_[:, ids]):
                old = numbers(before, f"{at}{expert}.{leaf}", ".weight", ".weight_scale")
                new = numbers(after, f"{at}{place}.{leaf}", ".weight", ".weight_scale")
                assert all(torch.equal(a[cut], b) for a, b in zip(old, new, strict=True))
                for one in ("weight_scale_2", "input_scale"):
                    assert torch.equal(before[f"{at}{expert}.{leaf}.{one}"], after[f"{at}{place}.{leaf}.{one}"])


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_other_orders_are_refused_with_the_way_out(
    checkpoints: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    structure = read_structure(quantise(checkpoints("qwen2_moe"), tmp_path / "m", method))
    original = read_structure(checkpoints("qwen2_moe"))
    with pytest.raises(InputError, match=rf"quantised \({method}\).*cut the original that it was made from, then"):
        prune(structure, random_shape(original, 8), tmp_path / "out")


def test_parts_of_blocks_are_refused(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoints("qwen2_moe", moe_intermediate_size=64)
    structure = read_structure(quantise(source, tmp_path / "m", "fp8", weight_block_size=[16, 16], **FP8))
    with pytest.raises(InputError, match=r"blocks of 16 channels. Make the plan with .*channel.groups.16"):
        prune(structure, random_shape(structure, 32), tmp_path / "out")
    odd = quantise(source, tmp_path / "odd", "fp8", weight_block_size=[48, 48], **FP8)
    for settings, says in (
        ({"weight_block_size": [48, 48]}, "64 channels in unequal blocks"),
        ({}, "64 channels in unequal blocks"),  # two scales, of 32 or of 48 and 16: nothing tells
        ({"weight_block_size": [[48], 48]}, "are not square"),
    ):
        set_config(odd, quantization_config={"quant_method": "fp8", **settings})
        width = read_structure(odd).width
        assert isinstance(width, str)
        assert says in width


def test_from_the_original_s_profile_to_the_quantised_sibling(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan of the original in groups cuts the sibling; in one shot the groups are known."""
    source = checkpoints("qwen2_moe", dtype=torch.bfloat16, moe_intermediate_size=64)
    folder = quantise(source, tmp_path / "m", "fp8", weight_block_size=[16, 16], **FP8)
    corpora = [random_corpus("a", seed=1), random_corpus("b", seed=2)]
    moecover.profile(source, corpora, output=tmp_path / "profile", progress=False)
    plan = ["plan", str(tmp_path / "profile"), "--keep", "6", "--width", "40", "-o", str(tmp_path / "plan.json")]
    assert main([*plan, "--channel-groups", "16"]) == 0
    assert "--channel-groups 16: 6 experts x 48 channels" in capsys.readouterr().err
    out = moecover.prune(folder, tmp_path / "plan.json", tmp_path / "one", progress=False)
    assert moecover.verify(folder, out, progress=False).equal
    at_once = moecover.prune(folder, output=tmp_path / "two", corpora=corpora, keep=6, retain_width=0.7, progress=False)
    assert (at_once.plan.width, at_once.plan.options["channel_groups"]) == (48, 16)
    by_size = moecover.plan_for_budget(
        tmp_path / "profile", folder, max_size=at_once.num_bytes, shape="6x48", progress=False
    )
    assert by_size.options["channel_groups"] == 16
