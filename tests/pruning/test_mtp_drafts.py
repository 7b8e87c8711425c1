"""A multi-token-prediction layer that was cut with its checkpoint, run by transformers' own model for such layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecover.checkpoints.structure import read_structure
from moecover.planning.run import plan
from moecover.profiling.run import profile
from moecover.pruning.writer import prune
from moecover.runtime.loading import load_model
from tests.conftest import random_corpus
from tests.support.quantised import MTP, with_mtp

modeling_layers = pytest.importorskip("transformers.modeling_layers")
ROOT, CONFIG = MTP["deepseek_v3"]


def drafted(folder: Path, dropped: list[int]) -> torch.Tensor:
    """Logits ``[1, token, vocabulary]`` of the layer on random tokens and hidden states, some experts never chosen."""
    model = load_model(read_structure(folder))
    model._keys_to_ignore_on_load_unexpected = [rf"{re.escape(ROOT)}\."]  # the library has the numbers of real models
    mtp = modeling_layers.MtpModel.from_pretrained(model).eval()
    draw = torch.Generator().manual_seed(0)
    hidden, tokens = torch.randn(1, 24, 32, generator=draw), torch.randint(0, 300, (1, 24), generator=draw)
    with torch.inference_mode():
        mtp.layers[0].mtp_block.mlp.gate.e_score_correction_bias[dropped] = -torch.inf
        found = mtp.forward_layer(0, hidden, torch.arange(24)[None], None, input_ids=tokens)
        return model.lm_head(found)


def test_the_cut_layer_drafts_what_the_masked_one_does(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_mtp(checkpoints("deepseek_v3"), tmp_path / "m", ROOT, **CONFIG)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    tensors |= {f"{ROOT}.{name}.weight": torch.ones(32) for name in ("hnorm", "shared_head.norm")}
    tensors[f"{ROOT}.eh_proj.weight"] = torch.randn(32, 64) / 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    structure = read_structure(folder)
    chosen = plan(profile(structure, [random_corpus("a")]), method="random", retain=0.5, seed=1)
    out = prune(structure, chosen, tmp_path / "out", mtp="prune")
    dropped = sorted(set(range(structure.topology.num_experts)) - set(chosen.layers[-1].kept))
    expected = drafted(folder, dropped)
    assert (drafted(out, []) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert not torch.allclose(drafted(folder, []), expected, rtol=1e-3)
