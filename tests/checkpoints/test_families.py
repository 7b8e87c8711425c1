"""Every proven family: statistics against a naive pass, the golden property, dropped logits at minus infinity.

Nothing here is specific to a family: the naive pass runs the library's eager experts one slot at a time, and minus
infinity is set where the router's own matrix gives its logits.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from moecover.checkpoints.deepseek.registration import ALIASES, TYPE
from moecover.checkpoints.derivation import derive
from moecover.checkpoints.families import PROVEN_FAMILIES, UNSUPPORTED, WHOLE_EXPERTS_ONLY
from moecover.checkpoints.structure import Structure, read_structure
from moecover.checkpoints.structure_cache import recall, remember
from moecover.checkpoints.topology import Width
from moecover.errors import InputError
from moecover.planning.artifact import Plan
from moecover.planning.masking import masked as masked_by
from moecover.planning.run import plan
from moecover.planning.search.routing import describe, observe_calls, recognise
from moecover.profiling.run import profile
from moecover.profiling.wide import CHANNELS
from moecover.pruning.writer import prune
from moecover.runtime import masking
from moecover.runtime.loading import load_model, routers
from moecover.runtime.masking import router_tensors
from moecover.verification.verify import verify
from tests.conftest import random_corpus
from tests.support import zoo
from tests.support.thin import channels_zeroed, random_shape


def naive_statistics(model: torch.nn.Module, structure: Structure, tokens: torch.Tensor) -> list[dict[str, np.ndarray]]:
    """Sums over every (token, slot), the output of the slot from the library's own loop over experts."""
    experts, found, seen = structure.topology.num_experts, [], []
    modules = [model.get_submodule(name) for name in structure.experts_modules]
    watched = [*modules, *routers(model, structure)]
    handles = [m.register_forward_hook(lambda *call: seen.append(call)) for m in watched]
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    calls = {module: (args, output) for module, args, output in seen}
    for module, router in zip(modules, routers(model, structure), strict=True):
        s: dict[str, np.ndarray] = {
            n: np.zeros(experts)
            for n in (
                "count",
                "weight_sum",
                "norm_sum",
                "weighted_norm_sum",
                "weighted_sq_sum",
                "norm_sq_sum",
                "max_abs",
            )
        }
        slots = dense_slots if len(calls[module][0]) == 1 else weighted_slots
        energy: dict[int, np.ndarray] = {}
        for e, weight, factor, output, channels in slots(module, calls[module][0], calls[router][1]):
            norm = float(np.linalg.norm(output))
            s["count"][e] += 1
            s["weight_sum"][e] += weight
            s["norm_sum"][e] += norm
            s["weighted_norm_sum"][e] += factor * norm
            s["weighted_sq_sum"][e] += (factor * norm) ** 2
            s["norm_sq_sum"][e] += norm**2
            s["max_abs"][e] = max(s["max_abs"][e], np.abs(output).max())
            energy[e] = energy.get(e, 0) + factor**2 * channels
        s[CHANNELS] = np.array([energy.get(e, np.zeros_like(channels)) for e in range(experts)])
        found.append(s)
    return found


# Expert, routing weight, factor of the output in the sum, output, squared norm of what every channel adds to it.
Slots = Iterator[tuple[int, float, float, np.ndarray, np.ndarray]]


class Products(TorchFunctionMode):
    """Products with the down projections of a layer: by expert, the squared norms of what every channel adds."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.down, self.seen = module.down_proj, {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("linear", "matmul", "__matmul__", "bmm"):
            h, weight = args[0].double(), args[1].double()
            offset = args[1].data_ptr() - self.down.data_ptr()
            if 0 <= offset < self.down.nbytes:
                norms = weight.square().sum(0 if function.__name__ == "linear" else -1)  # by channel
                expert = offset // (self.down.nbytes // len(self.down))
                self.seen[expert] = (h.square() * (norms if norms.dim() == 1 else norms[:, None])).numpy()
        return function(*args, **(kwargs or {}))


def weighted_slots(module: torch.nn.Module, args: tuple[torch.Tensor, ...], routed: tuple[torch.Tensor, ...]) -> Slots:
    """The class's own loop, without the choice of a kernel, one slot at a time with weight 1."""
    hidden, index, weights = args
    loop = getattr(type(module).forward, "__wrapped__", type(module).forward)
    for slot in range(index.shape[1]):
        with torch.inference_mode(), Products(module) as products:
            outputs = loop(module, hidden, index[:, slot : slot + 1], torch.ones_like(weights[:, slot : slot + 1]))
        rows = {e: iter(channels) for e, channels in products.seen.items()}  # the loop takes tokens in their order
        for token, e in enumerate(index[:, slot].tolist()):
            g = float(weights[token, slot])
            yield e, g, g, outputs[token].double().numpy(), next(rows[e])


def dense_slots(module: torch.nn.Module, args: tuple[torch.Tensor, ...], routed: tuple[torch.Tensor, ...]) -> Slots:
    """What all experts make of one token at a time, where its scores are not 0; they have weighed it before."""
    scores, _ = routed
    entered = args[0].view(scores.shape[1], len(scores), -1)  # [expert, token, hidden]
    for token, row in enumerate(scores):
        with torch.inference_mode(), Products(module) as products:
            outputs = module(entered[:, token])
        for e in row.nonzero().flatten().tolist():
            yield e, float(row[e]), 1.0, outputs[e].double().numpy(), products.seen[0][e, 0]


def naive_table(rows: list[list[int]], kept: list[int]) -> list[list[int]]:
    """Experts by token id without the dropped ones, by their old ids: the least used kept expert takes their place."""
    used = {expert: sum(row.count(expert) for row in rows) for expert in kept}
    rows = [[expert if expert in kept else -1 for expert in row] for row in rows]
    for row in rows:
        for slot, expert in enumerate(row):
            if expert == -1:
                row[slot] = min((one for one in kept if one not in row), key=lambda one: (used[one], one))
                used[row[slot]] += 1
    return rows


class MinusInfinity(TorchFunctionMode):
    """Logits of dropped experts become minus infinity where a router's matrix gives them."""

    def __init__(self, dropped: dict[int, list[int]]) -> None:
        self.dropped, self.hits = dropped, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            key = weight.data_ptr()
            if key in self.dropped:
                self.hits += 1
                out = out.clone()
                out[..., self.dropped[key]] = -torch.inf
        return out


@contextlib.contextmanager
def without(model: torch.nn.Module, structure: Structure, chosen: Plan) -> Iterator[MinusInfinity]:
    """The model with the dropped experts' logits, and correction biases, at minus infinity.

    A table of experts by token id is rewritten, entry by entry.
    """
    state, dropped, undo = dict(model.state_dict()), {}, []
    for layer, row in enumerate(chosen.layers):
        gone = [e for e in range(structure.topology.num_experts) if e not in row.kept]
        for key, axis in router_tensors(structure, layer).items():
            tensor = state[key]
            if tensor.dim() == 2 and min(tensor.shape) > 1:
                dropped[tensor.data_ptr()] = gone
            elif "correction" in key or "expert_bias" in key:
                undo.append((tensor, tensor.clone()))
                tensor.index_fill_(axis, torch.tensor(gone), -torch.inf)
    for table in structure.tables.values():
        tensor = state[table.parameter]
        undo.append((tensor, tensor.clone()))
        tensor.copy_(torch.tensor(naive_table(tensor.tolist(), chosen.layers[table.layer].kept)))
    mode = MinusInfinity(dropped)
    try:
        with mode:
            yield mode
    finally:
        for tensor, value in undo:
            tensor.copy_(value)


def routing_of(model: torch.nn.Module, structure: Structure) -> str:
    """How the last MoE layer routes, in words."""
    torch.manual_seed(0)
    modules = routers(model, structure)
    hidden, last = torch.randn(64, structure.topology.hidden_size), len(modules) - 1
    with torch.inference_mode():
        try:
            few = functools.partial(model, input_ids=torch.arange(4)[None], use_cache=False)
            call = observe_calls(model, structure, modules, few)[0][last]
            return describe(recognise(model, structure, modules[last], call, last, hidden))
        except InputError:
            return "its own"


OWN_TYPES = {TYPE, *ALIASES}
GATELESS = {"nemotron_h", "nemotron_h_omni"}  # their channels have no energy in a profile
RELOAD = """
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

for folder in sorted(Path(sys.argv[1]).iterdir()):
    config = AutoConfig.from_pretrained(folder)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    model = (AutoModelForCausalLM if causal else AutoModelForImageTextToText).from_pretrained(folder).eval()
    expected = load_file(folder / "expected" / "logits.safetensors")
    with torch.inference_mode():
        logits = model(input_ids=expected["tokens"], use_cache=False).logits
    close = (logits - expected["logits"]).abs().max() <= 1e-5 * expected["logits"].abs().max()
    print(folder.name if close else f"{folder.name} differs")
assert "moecover" not in sys.modules
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the pruned checkpoints, one a family, each with what it should give."""
    return tmp_path_factory.mktemp("written")


@pytest.mark.parametrize("family", list(PROVEN_FAMILIES))
def test_family(family: str, written: Path, tmp_path: Path) -> None:
    zoo.make_model(family).save_pretrained(tmp_path / "model", save_original_format=True)
    structure = read_structure(tmp_path / "model")
    layout = derive(structure.checkpoint)
    remember(structure.checkpoint, layout, tmp_path / "remembered.json")
    assert recall(structure.checkpoint, tmp_path / "remembered.json") == layout
    topology, model = structure.topology, load_model(structure)
    corpus = random_corpus("a", sequences=2, length=20, vocab=zoo.SMALL["vocab_size"])
    made = profile(structure, [corpus], model=model, batch_size=2)
    expected = naive_statistics(model, structure, torch.from_numpy(corpus.tokens))
    assert (made.width is None) == (family in GATELESS)
    for layer, naive in enumerate(expected):
        for name, values in naive.items():
            if name == CHANNELS and made.width is None:
                continue
            found = (made.channels["a"] if name == CHANNELS else made.statistics["a"][name])[layer]
            np.testing.assert_allclose(found, values, rtol=2e-4, atol=1e-6, err_msg=f"{name}, MoE layer {layer}")
    assert sum(s["count"].sum() for s in expected) == corpus.num_tokens * topology.top_k * len(topology.decoder_layers)

    chosen = plan(made, method="random", keep=topology.num_experts // 2, seed=1)
    out = prune(structure, chosen, written / family)
    assert verify(tmp_path / "model", out)["equal"]
    assert read_structure(out).checkpoint.num_bytes == structure.num_bytes(chosen.keep)
    assert not [name for name in structure.tensors if "vision" in name], "experts of another part of the model"
    before, after = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "model", out))
    assert after.get("vision_config") == before.get("vision_config")
    pruned = load_model(read_structure(out))
    tokens = torch.from_numpy(corpus.tokens)
    with torch.inference_mode():
        found = pruned(input_ids=tokens, use_cache=False).logits
        with without(model, structure, chosen) as mode:
            masked = model(input_ids=tokens, use_cache=False).logits
        whole = model(input_ids=tokens, use_cache=False).logits
    assert mode.hits == len(routers(model, structure)), "the router's matrix was not met: the check would have no teeth"
    assert (found - masked).abs().max() <= 2e-5 * whole.abs().max()
    assert not torch.allclose(whole, masked, rtol=1e-3)
    assert routing_of(model, structure) == PROVEN_FAMILIES[family]
    (out / "expected").mkdir()
    save_file({"tokens": tokens, "logits": masked}, out / "expected" / "logits.safetensors")
    assert isinstance(structure.width, str) == (family in WHOLE_EXPERTS_ONLY), structure.width
    if isinstance(structure.width, Width):
        check_thin(structure, model, tokens, written / f"{family}, thin")


def check_thin(structure: Structure, model: torch.nn.Module, tokens: torch.Tensor, out: Path) -> None:
    """The checkpoint of half of the experts and half of their channels against the masked original.

    Equal to the last bit where the same channels are cut from the live model, for then all products have the same
    shapes; up to rounding where they are zeroed.
    """
    assert isinstance(structure.width, Width)
    width = max(8, structure.width.channels // 16 * 8)
    chosen = random_shape(structure, width)
    prune(structure, chosen, out)
    cut = read_structure(out)
    assert isinstance(cut.width, Width)
    assert cut.width.channels == width
    assert cut.checkpoint.num_bytes == structure.num_bytes(chosen.kept, width=width)
    with torch.inference_mode():
        found = load_model(cut)(input_ids=tokens, use_cache=False).logits
        with masked_by(model, structure, chosen):
            emulated = model(input_ids=tokens, use_cache=False).logits
        with masking.masked(model, structure, chosen.kept), channels_zeroed(model, structure, chosen):
            zeroed = model(input_ids=tokens, use_cache=False).logits
        with masking.masked(model, structure, chosen.kept):
            whole = model(input_ids=tokens, use_cache=False).logits
    assert torch.equal(found, emulated)
    assert (found - zeroed).abs().max() <= 2e-5 * whole.abs().max()
    assert not torch.allclose(whole, zeroed, rtol=1e-3)
    (out / "expected").mkdir()
    save_file({"tokens": tokens, "logits": zeroed}, out / "expected" / "logits.safetensors")


def test_plain_transformers_reloads_them(written: Path) -> None:
    """A process that never imports this package gives what the masked original gave."""
    there = {path.name for path in written.iterdir()}
    for family in {
        name for name in there if name.partition(",")[0] in OWN_TYPES
    }:  # their classes are registered by this package: see test_deepseek.py
        shutil.rmtree(written / family)
    if not there:
        pytest.skip("no family was tested before")
    done = subprocess.run([sys.executable, "-c", RELOAD, str(written)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split("\n")) - {""} == {name for name in there if name.partition(",")[0] not in OWN_TYPES}


def test_the_types_are_all_looked_at() -> None:
    """A type that a new transformers brings is either proven or known not to be."""
    found = {*zoo.types(), *zoo.other_types()} - {"vitpose_backbone"}  # which sees pictures
    assert found - set(PROVEN_FAMILIES) == set(UNSUPPORTED)
    assert len(PROVEN_FAMILIES) >= 75


@pytest.mark.parametrize("family", list(UNSUPPORTED))
def test_what_is_not_supported_is_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"{family} is not supported: {UNSUPPORTED[family]}"):
        read_structure(tmp_path)
