"""Experts with fewer channels in the live model: shared experts that the number of channels does not divide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moecover.checkpoints.structure import read_structure
from moecover.checkpoints.topology import Width
from moecover.planning.masking import masked
from moecover.pruning.writer import prune
from moecover.runtime.loading import load_model
from tests.support.proofs import logits_of
from tests.support.thin import random_shape


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
def test_padded_shared_experts_equal_the_checkpoint_to_the_last_bit(
    checkpoints: Callable[..., Path], family: str, tmp_path: Path
) -> None:
    """Three shared experts of 104 channels are stored as five of 64, the last 8 channels of which are zeros.

    At these sizes the products of 312 and of 320 channels are rounded differently on some processors.
    """
    structure = read_structure(checkpoints(family, moe_intermediate_size=104, n_shared_experts=3))
    assert isinstance(structure.width, Width)
    assert structure.width.padding(64) == 8
    chosen = random_shape(structure, 64)
    out = prune(structure, chosen, tmp_path / "out")
    down = load_file(out / "model.safetensors")["model.layers.1.mlp.shared_experts.down_proj.weight"]
    assert down.shape[1] == 320
    assert down[:, :312].any(0).all()
    assert not down[:, 312:].any()
    model = load_model(structure)
    with masked(model, structure, chosen):
        emulated = logits_of(model)
        assert model.model.layers[1].mlp.shared_experts.down_proj.weight.shape == down.shape
    assert torch.equal(emulated, logits_of(load_model(read_structure(out))))
    assert model.model.layers[1].mlp.shared_experts.down_proj.weight.shape == (32, 312)
