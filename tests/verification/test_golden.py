"""The golden property: the written checkpoint equals the original with the dropped experts masked; and mutants fail."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moecover.checkpoints.structure import read_structure
from moecover.planning.artifact import Plan
from moecover.planning.masking import masked
from moecover.pruning.writer import prune
from moecover.runtime.loading import load_model, routers
from moecover.verification.verify import verify
from tests.conftest import hand_plan
from tests.support.proofs import logits_of, rehash
from tests.support.tiny import FAMILIES


def router_with_minus_infinity(self: torch.nn.Module, hidden_states: torch.Tensor):
    """The four families' router, with the dropped experts' logits at minus infinity before softmax and top-k."""
    hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = torch.nn.functional.linear(hidden_states, self.weight)
    logits = logits.masked_fill(~self.kept_mask, -torch.inf)
    probabilities = torch.softmax(logits.float(), -1)
    weights, index = probabilities.topk(self.top_k, -1)
    if not hasattr(self, "norm_topk_prob"):  # mixtral: always normalised, and left in float32
        return logits, weights / weights.sum(-1, keepdim=True), index
    if self.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights.to(logits.dtype), index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_checkpoint_equals_the_original_with_masked_logits(
    checkpoints: Callable[..., Path], pruned: Callable[..., Path], family: str, dtype: torch.dtype
) -> None:
    structure = read_structure(checkpoints(family, dtype=dtype))
    cut = pruned(family, dtype=dtype)
    chosen = Plan.model_validate(json.loads((cut / "moecover.json").read_text())["plan"])
    mask = torch.from_numpy(chosen.mask(structure.topology.num_experts))
    assert (~mask).sum() > 0
    original = load_model(structure)
    for layer, router in enumerate(routers(original, structure)):
        router.kept_mask = mask[layer]
        router.forward = types.MethodType(router_with_minus_infinity, router)
    # Loaded as anyone would, without this package.
    plain, info = AutoModelForCausalLM.from_pretrained(cut, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, found = logits_of(original), logits_of(plain.eval())
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 if dtype == torch.float32 else 0)
    assert (logits_of(load_model(structure)) - expected).abs().max() > 1e-3  # the mask does something


def test_masked_model_equals_the_written_checkpoint_bit_for_bit(
    checkpoints: Callable[..., Path], pruned: Callable[..., Path], family: str
) -> None:
    structure, cut = read_structure(checkpoints(family)), pruned(family)
    chosen = Plan.model_validate(json.loads((cut / "moecover.json").read_text())["plan"])
    model = load_model(structure)
    whole = logits_of(model)
    with masked(model, structure, chosen):
        inside = logits_of(model)
    assert torch.equal(inside, logits_of(load_model(read_structure(cut))))
    assert torch.equal(logits_of(model), whole)  # the end of the block restores the model
    assert verify(structure.checkpoint.path, cut)["equal"]


def test_no_dropped_expert_is_ever_chosen(checkpoints: Callable[..., Path], family: str) -> None:
    structure = read_structure(checkpoints(family))
    keep = structure.topology.top_k + 1
    chosen = hand_plan(structure, [list(range(1, keep + 1))] * len(structure.topology.decoder_layers))
    model, seen = load_model(structure), []
    for name in structure.experts_modules:
        model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    with masked(model, structure, chosen):
        logits_of(model)
    assert set(torch.cat(seen).unique().tolist()) <= set(range(1, keep + 1))


def reverse_router_rows(tensors: dict[str, torch.Tensor], layer: str) -> None:
    key = next(k for k in tensors if f"layers.{layer}." in k and k.endswith("gate.weight") and "shared" not in k)
    tensors[key] = tensors[key].flip(0).contiguous()


def swap_two_experts(tensors: dict[str, torch.Tensor], layer: str) -> None:
    for key in [k for k in tensors if f"layers.{layer}." in k and ".experts.0." in k]:
        other = key.replace(".experts.0.", ".experts.1.")
        tensors[key], tensors[other] = tensors[other], tensors[key]


def nudge_one_weight(tensors: dict[str, torch.Tensor], layer: str) -> None:
    key = next(k for k in tensors if f"layers.{layer}." in k and k.endswith("q_proj.weight"))
    tensors[key][0, 0] += 0.01


@pytest.mark.parametrize("mutate", [reverse_router_rows, swap_two_experts, nudge_one_weight])
def test_mutants_fail_at_the_layer_that_was_changed(
    checkpoints: Callable[..., Path], pruned: Callable[..., Path], family: str, mutate, tmp_path: Path
) -> None:
    structure = read_structure(checkpoints(family))
    folder = tmp_path / "mutant"
    shutil.copytree(pruned(family), folder)
    layer = structure.topology.decoder_layers[-1]
    tensors = load_file(folder / "model.safetensors")
    mutate(tensors, str(layer))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = verify(structure.checkpoint.path, folder)
    assert not result["equal"]
    assert result["changed_files"] == ["model.safetensors"]
    rehash(folder, "model.safetensors")
    result = verify(structure.checkpoint.path, folder)
    assert not result["equal"]
    assert result["changed_files"] == []
    assert result["first_difference"] == f"decoder layer {layer}"


def test_wrong_expert_count_in_config_fails(
    checkpoints: Callable[..., Path], pruned: Callable[..., Path], tmp_path: Path
) -> None:
    from moecover.errors import InputError

    folder = tmp_path / "m"
    shutil.copytree(pruned("mixtral"), folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_local_experts": 3', '"num_local_experts": 4'))
    with pytest.raises(InputError, match=r"has shape|needs \d+ numbers"):
        verify(checkpoints("mixtral"), folder)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_sharded_checkpoints_keep_their_layout(checkpoints: Callable[..., Path], family: str, tmp_path: Path) -> None:
    source = checkpoints(family, shards=True)
    structure = read_structure(source)
    assert len(structure.checkpoint.shard_metadata) > 3
    keep = structure.topology.top_k
    chosen = hand_plan(structure, [list(range(keep))] * len(structure.topology.decoder_layers))
    cut = prune(structure, chosen, tmp_path / "cut")
    before, after = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (source, cut))
    for name, shard in after["weight_map"].items():
        assert before["weight_map"][name] == shard  # ids 0 to keep - 1 keep their names here
    assert after["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for s in set(after["weight_map"].values()) for t in load_file(cut / s).values()
    )
    assert verify(source, cut)["equal"]


def test_the_output_loads_where_this_package_is_not_imported(pruned: Callable[..., Path]) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A, AutoTokenizer as T; import torch\n"
        "for p in sys.argv[1:]:\n"
        "    m, info = A.from_pretrained(p, output_loading_info=True); t = T.from_pretrained(p)\n"
        "    assert not info['missing_keys'] and not info['unexpected_keys'], (p, info)\n"
        "    assert torch.isfinite(m(**t('The river rises', return_tensors='pt')).logits).all(), p\n"
        "    print(p)\n"
        "assert 'moecover' not in sys.modules"
    )
    folders = [str(pruned(family)) for family in FAMILIES]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == folders
