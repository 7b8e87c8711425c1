"""Multi-token-prediction layers of a thinner checkpoint: cut as the last MoE layer, whole in size, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecover.checkpoints.source import open_checkpoint
from moecover.checkpoints.structure import read_structure
from moecover.errors import InputError
from moecover.planning.masking import masked
from moecover.pruning.writer import prune
from moecover.runtime import masking
from moecover.runtime.loading import load_model
from tests.support.proofs import logits_of
from tests.support.quantised import MTP, with_mtp, with_mtp_run
from tests.support.thin import channels_zeroed, random_shape

SIZES = {  # three shared experts of 24 channels become five of 16, padded
    "deepseek_v3": {"moe_intermediate_size": 24, "n_shared_experts": 3},
    "qwen2_moe": {"moe_intermediate_size": 24},
}


@pytest.mark.parametrize("family", list(MTP))
def test_what_the_layer_computes(checkpoints: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """Run as one more decoder layer, the cut layer equals the original one with dropped channels zeroed."""
    root, config = MTP[family]
    folder = with_mtp(checkpoints(family, **SIZES[family]), tmp_path / "m", root, **copy.deepcopy(config))
    structure = read_structure(folder)
    plan = random_shape(structure, 16)
    for mtp in ("drop", "prune"):
        out = prune(structure, plan, tmp_path / mtp, mtp=mtp)
        assert open_checkpoint(out).num_bytes == structure.num_bytes(plan.kept, width=16, mtp=mtp)
    whole = read_structure(with_mtp_run(folder, tmp_path / "whole", root))
    cut = read_structure(with_mtp_run(tmp_path / "prune", tmp_path / "cut", root))
    longer = plan.model_copy(
        update={
            "layers": [
                layer.model_copy(update={"decoder_layer": number})
                for number, layer in zip(whole.topology.decoder_layers, [*plan.layers, plan.layers[-1]], strict=True)
            ]
        }
    )
    found, model = logits_of(load_model(cut)), load_model(whole)
    with masked(model, whole, longer):
        assert torch.equal(found, logits_of(model))
    with masking.masked(model, whole, longer.kept), channels_zeroed(model, whole, longer):
        zeroed = logits_of(model)
    assert (found - zeroed).abs().max() <= 2e-5 * zeroed.abs().max()
    with masking.masked(model, whole, longer.kept):
        assert not torch.allclose(logits_of(model), zeroed, rtol=1e-3)


def test_a_layer_that_is_stored_in_another_way(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    root, config = MTP["qwen2_moe"]
    folder = with_mtp(checkpoints("qwen2_moe"), tmp_path / "m", root, **copy.deepcopy(config))
    tensors = load_file(folder / "model.safetensors")
    odd = [name for name in tensors if name.startswith(root) and name.endswith(".experts.3.up_proj.weight")]
    tensors[odd[0]] = tensors[odd[0]].repeat(2, 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    structure = read_structure(folder)
    with pytest.raises(InputError, match=r"cannot keep 8 channels of mtp.*experts.3.up_proj.weight.*give .*drop"):
        prune(structure, random_shape(structure, 8), tmp_path / "out", mtp="prune")
    assert not (tmp_path / "out").exists()
