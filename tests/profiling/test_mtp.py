"""Statistics of multi-token-prediction layers: against loops over tokens, in the file and in sums; refusals."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.packing import Corpus, make_corpus
from moecover.errors import InputError
from moecover.profiling.artifact import Profile
from moecover.profiling.merging import lost
from moecover.profiling.run import profile
from moecover.runtime import cost, memory
from moecover.runtime.drafting import load_drafts, not_run
from moecover.runtime.loading import load_model
from moecover.runtime.running import running
from moecover.runtime.streaming import streamed
from moecover.runtime.world import World
from tests.conftest import random_corpus
from tests.support import zoo
from tests.support.command_line import run
from tests.support.passes import Stop, limit_between, same, stop_after
from tests.support.quantised import set_config, with_mtp_that_drafts
from tests.support.ranks import in_ranks


@pytest.fixture(scope="module")
def folder(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3 with two multi-token-prediction layers."""
    return with_mtp_that_drafts(checkpoints("deepseek_v3"), tmp_path_factory.mktemp("mtp") / "m", layers=2)


def padded(lengths: tuple[int, ...], side: str) -> Corpus:
    """Random tokens with padding."""
    rng, most = np.random.default_rng(3), max(lengths)
    tokens, mask = np.zeros((len(lengths), most), dtype=np.int64), np.zeros((len(lengths), most), dtype=bool)
    for row, length in enumerate(lengths):
        place = slice(most - length, most) if side == "left" else slice(length)
        tokens[row, place], mask[row, place] = rng.integers(1, 300, size=length), True
    return make_corpus("a", tokens, mask, {"source": "random"})


def decoded(
    model: torch.nn.Module, w: dict[str, torch.Tensor], states: torch.Tensor, seen: list[torch.Tensor]
) -> torch.Tensor:
    """The output of a decoder layer with given weights, at positions ``len(seen)`` + 1 on; notes its block's input."""
    layer = type(model.model.layers[-1])(model.config, len(model.model.layers) - 1).eval()
    stacked = {k: v for k, v in w.items() if ".experts." not in k}
    experts = range(model.config.n_routed_experts)
    both = [torch.cat([w[f"mlp.experts.{e}.{p}_proj.weight"] for p in ("gate", "up")]) for e in experts]
    stacked["mlp.experts.gate_up_proj"] = torch.stack(both)
    stacked["mlp.experts.down_proj"] = torch.stack([w[f"mlp.experts.{e}.down_proj.weight"] for e in experts])
    layer.load_state_dict(stacked)
    layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    positions = torch.arange(len(seen) + 1, len(seen) + 1 + states.shape[1])[None]
    mask = torch.full((states.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    return layer(states, attention_mask=mask, position_embeddings=model.model.rotary_emb(states, positions))


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def routed(x: torch.Tensor, w: dict[str, torch.Tensor], config) -> dict[int, float]:
    """The experts of a token and their weights, by DeepSeek-V3's rules in words: groups by their two best experts."""
    score = torch.sigmoid(w["mlp.gate.weight"].double() @ x)
    choice = (score + w["mlp.gate.e_score_correction_bias"].double()).tolist()
    size = len(choice) // config.n_group
    groups = [sorted(choice[g * size : (g + 1) * size])[-2:] for g in range(config.n_group)]
    best = sorted(range(config.n_group), key=lambda g: -sum(groups[g]))[: config.topk_group]
    allowed = [e for e in range(len(choice)) if e // size in best]
    chosen = sorted(allowed, key=lambda e: -choice[e])[: config.num_experts_per_tok]
    total = sum(score[e].item() for e in chosen)
    return {e: score[e].item() / total * config.routed_scaling_factor for e in chosen}


def naive(model, folder: Path, corpus: Corpus, layers: int) -> dict[str, np.ndarray]:
    """Sequence by sequence, token by token, expert by expert, from the tensors on disk."""
    tensors, config = load_file(folder / "model.safetensors"), model.config
    names = ("count", "num_tokens", "weight_sum", "norm_sum", "weighted_norm_sum", "norm_sq_sum")
    out = {name: np.zeros((layers, config.n_routed_experts)) for name in names}
    for row, kept in zip(corpus.tokens, corpus.mask, strict=True):
        ids, seen = torch.from_numpy(row[kept]), list[torch.Tensor]()
        states = model.model(ids[None], use_cache=False).last_hidden_state
        for k in range(min(layers, len(ids) - 1)):
            root = f"model.layers.{config.num_hidden_layers + k}."
            w = {n.removeprefix(root): v for n, v in tensors.items() if n.startswith(root)}
            own = {n: w.pop(f"{n}.weight") for n in ("enorm", "hnorm", "eh_proj", "shared_head.norm")}
            after = tensors["model.embed_tokens.weight"][ids[k + 1 :]]
            both = torch.cat([normed(after, own["enorm"]), normed(states[0, :-1], own["hnorm"])], -1)
            states = normed(decoded(model, w, (both @ own["eh_proj"].T)[None], seen), own["shared_head.norm"])
            for x in seen[k].double():
                out["num_tokens"][k] += 1
                for e, g in routed(x, w, config).items():
                    gate, up, down = (w[f"mlp.experts.{e}.{p}_proj.weight"].double() for p in ("gate", "up", "down"))
                    norm = (down @ (torch.nn.functional.silu(gate @ x) * (up @ x))).norm().item()
                    added = {"count": 1, "weight_sum": g, "norm_sum": norm, "weighted_norm_sum": g * norm}
                    for name, value in {**added, "norm_sq_sum": norm**2}.items():
                        out[name][k, e] += value
    return out


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_statistics_equal_loops_over_tokens(folder: Path, side: str) -> None:
    """Two layers, of which the second does not see the second token either; a row of one token has nothing to draft."""
    corpus = random_corpus("a", sequences=3, length=12) if side == "none" else padded((9, 2, 12, 1), side)
    structure = read_structure(folder)
    model = load_model(structure, dtype="float32")
    plain = profile(structure, [corpus], model=model, batch_size=2)
    made = profile(structure, [corpus], model=model, batch_size=2, mtp=True)
    assert made.mtp is not None
    assert made.mtp.topology.decoder_layers == (3, 4)
    with torch.inference_mode():
        expected = naive(model, folder, corpus, 2)
    assert (expected["count"] > 0).sum() > 12
    for name, values in expected.items():
        np.testing.assert_allclose(made.mtp.statistics["a"][name], values, rtol=2e-5, err_msg=name)
    assert made.mtp.channels.keys() == made.mtp.pairs.keys() == {"a"}
    for name, values in plain.statistics["a"].items():
        np.testing.assert_array_equal(made.statistics["a"][name], values)


def test_file_and_sums(folder: Path, tmp_path: Path) -> None:
    structure, corpora = read_structure(folder), [random_corpus(name, seed=seed) for seed, name in enumerate("aab")]
    one, two, other = (profile(structure, [corpus], batch_size=2, mtp=True) for corpus in corpora)
    whole = one + two + other
    read = Profile.load(whole.save(tmp_path / "p"))
    assert read.mtp is not None
    assert whole.mtp is not None
    assert read.fingerprint == whole.fingerprint != profile(structure, [corpora[0]]).fingerprint
    for name, values in whole.mtp.statistics["a"].items():
        np.testing.assert_array_equal(read.mtp.statistics["a"][name], values)
    np.testing.assert_array_equal(read.mtp.channels["b"], whole.mtp.channels["b"])
    np.testing.assert_array_equal(read.mtp.parts["a"]["count"], whole.mtp.parts["a"]["count"])
    assert one.mtp is not None
    assert two.mtp is not None
    assert (whole.mtp.statistics["a"]["count"] == 2 * one.mtp.statistics["a"]["count"]).any()
    without = profile(structure, [corpora[2]])
    assert (one + without).mtp is None
    assert lost(one + without, [one, without]) == {"statistics of multi-token-prediction layers": ["b"]}


def test_an_interrupted_pass_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structure, corpus = read_structure(folder), random_corpus("a")
    model, state = load_model(structure), tmp_path / "state"
    expected = profile(structure, [corpus], model=model, batch_size=1, mtp=True).mtp
    with monkeypatch.context() as patched, pytest.raises(Stop):
        stop_after(patched, 2)
        profile(structure, [corpus], model=model, batch_size=1, mtp=True, state=state)
    said: list[str] = []
    made = profile(structure, [corpus], model=model, batch_size=1, mtp=True, state=state, say=said.append)
    assert said == ["resuming: 2 of 6 batches are done"]
    assert expected is not None
    assert made.mtp is not None
    same(made.mtp, expected)


def test_a_pass_without_the_layers_is_not_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    structure, corpus = read_structure(folder), random_corpus("a")
    given: Any = {"model": load_model(structure), "batch_size": 1, "state": tmp_path / "state"}
    with monkeypatch.context() as patched, pytest.raises(Stop):
        stop_after(patched, 2)
        profile(structure, [corpus], **given)
    said: list[str] = []
    made = profile(structure, [corpus], **given, mtp=True, say=said.append)
    assert made.mtp is not None
    assert re.fullmatch("starting over: .* other inputs, multi-token-prediction layers differs", said[0])


def refusals(folder: Path, tmp_path: Path, checkpoints: Callable[..., Path]) -> dict[str, Structure]:
    """By the reason, checkpoints whose layers cannot run."""
    shutil.copytree(folder, tmp_path / "quantised")
    set_config(tmp_path / "quantised", quantization_config={"quant_method": "fp8"})
    shutil.copytree(folder, tmp_path / "fewer")
    set_config(tmp_path / "fewer", num_nextn_predict_layers=1)
    unknown = with_mtp_that_drafts(checkpoints("qwen2_moe"), tmp_path / "unknown")
    found = {
        "has no multi-token-prediction layers with experts": checkpoints("deepseek_v3"),
        "is quantised, and transformers runs these layers unquantised only: profile the original": tmp_path
        / "quantised",
        "does not run these layers of qwen2_moe": unknown,
        "has 1 of these layers, its files have experts in 2": tmp_path / "fewer",
    }
    return {reason: read_structure(path) for reason, path in found.items()}


def test_what_cannot_run_is_refused(
    folder: Path,
    tmp_path: Path,
    checkpoints: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for reason, structure in refusals(folder, tmp_path, checkpoints).items():
        assert reason in str(not_run(structure))
        text = tmp_path / "rows.jsonl"
        text.write_text('{"input_ids": [1, 2, 3]}\n')
        given = [structure.checkpoint.path, "--corpus", f"rows={text}", "-o", tmp_path / "p", "--mtp"]
        status, _, err = run(capsys, "profile", *given)
        assert status == 2
        assert re.fullmatch(rf"moecover: --mtp has nothing to profile: .*{reason}", err.splitlines()[-1])
    assert not (tmp_path / "p").exists()
    structure = read_structure(folder)
    with streamed(structure) as stream, pytest.raises(InputError, match="does not fit into memory, and these layers"):
        profile(structure, [random_corpus("a")], model=stream, mtp=True)
    monkeypatch.setattr(cost, "OVERHEAD", 0)
    monkeypatch.setattr(memory, "_resident", lambda: 0)
    limit = limit_between(structure, tokens=3, batch_tokens=3, head=False)
    given = ["profile", folder, "--corpus", f"rows={text}", "-o", tmp_path / "p", "--mtp", "--memory-limit", limit]
    (status, _, err) = found = run(capsys, *given, "-q", "--dry-run")
    assert (status, "does not fit into memory, and these layers" in err) == (2, True)
    assert found == run(capsys, *given, "-q")


def test_several_devices(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is loaded; the live model says it by itself."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [1, 2, 3]}\n')
    given = [folder, "--corpus", f"rows={rows}", "-o", tmp_path / "p", "--mtp", "--device-map", "auto"]
    status, _, err = run(capsys, "profile", *given)
    assert status == 2
    assert err == "moecover: --mtp runs beside a model on one device only: leave --device-map out\n"
    structure = read_structure(folder)
    model = load_model(structure)
    assert not_run(structure, running(model, structure)) is None
    model.lm_head.to("meta")
    assert "is on several devices" in str(not_run(structure, running(model, structure)))


def test_whatever_the_library_raises_is_a_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = read_structure(folder)

    def fails(config: object) -> None:
        raise error

    monkeypatch.setattr("moecover.runtime.drafting.parsed_config", fails)
    error: Exception = TypeError("int")
    assert "does not run these layers of deepseek_v3" in str(not_run(structure))
    error = MemoryError()
    with pytest.raises(MemoryError):
        not_run(structure)


def test_what_fails_when_it_runs_is_said_before_the_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused where it is asked for; left out, with a line, where it is taken if it can be had."""
    structure, said = read_structure(folder), list[str]()
    model = load_model(structure)

    def fails(*args: object, **kwargs: object) -> None:
        raise KeyError("sliding_attention")

    monkeypatch.setattr("transformers.modeling_layers.MtpModel.forward_layer", fails)
    why = r"transformers .* cannot run the multi-token-prediction layers of .*: KeyError: 'sliding_attention'"
    with pytest.raises(InputError, match=why):
        profile(structure, [random_corpus("a")], model=model, mtp=True)
    assert profile(structure, [random_corpus("a")], model=model, mtp=None, say=said.append).mtp is None
    assert re.fullmatch(rf"note: multi-token-prediction layers are not profiled: {why}", said[0])


def test_another_family(tmp_path: Path) -> None:
    """GLM-4.5: attention and names of its own."""
    zoo.make_model("glm4_moe").save_pretrained(tmp_path / "whole", save_original_format=True)
    structure = read_structure(with_mtp_that_drafts(tmp_path / "whole", tmp_path / "m"))
    made = profile(structure, [random_corpus("a", vocab=128)], mtp=True).mtp
    assert made is not None
    assert made.statistics["a"]["num_tokens"].max() == 6 * 23
    assert made.statistics["a"]["count"].sum() == 6 * 23 * zoo.TOP_K


def test_what_the_model_keeps_in_float32_stays_so(folder: Path) -> None:
    """The biases that experts are selected by, which bfloat16 would round."""
    structure, stored = read_structure(folder), load_file(folder / "model.safetensors")
    model = load_model(structure, dtype="bfloat16")
    drafts = load_drafts(model, structure)
    for number, layers in [(2, model.model.layers[2]), *((n, drafts.module.layers[str(n)]) for n in (3, 4))]:
        bias = stored[f"model.layers.{number}.mlp.gate.e_score_correction_bias"]
        assert not torch.equal(bias.bfloat16().float(), bias)
        assert layers.mlp.gate.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(layers.mlp.gate.e_score_correction_bias, bias)
    assert drafts.module.layers["3"].mlp.gate.weight.dtype == torch.bfloat16


def test_processes_agree_on_the_layers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that runs layer by layer has none: then neither profiles them, and both say why."""
    structure, said = read_structure(folder), list[str]()

    def work(here: World) -> Profile:
        with streamed(structure) if here.rank else contextlib.nullcontext() as model:
            return profile(structure, [random_corpus("a")], model=model, mtp=None, here=here, say=said.append)

    for made in in_ranks(monkeypatch, work):
        assert isinstance(made, Profile), made
        assert made.mtp is None
    assert len(said) == 2
    assert all("are not profiled: " in line and "does not fit into memory" in line for line in said)


def test_processes_share_the_layers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch a process, one of which has none of the second corpus."""
    structure, corpora = read_structure(folder), [random_corpus("a"), random_corpus("b", sequences=1)]
    expected = profile(structure, corpora, batch_size=6, mtp=True).mtp
    for made in in_ranks(monkeypatch, lambda here: profile(structure, corpora, batch_size=6, mtp=True, here=here)):
        assert isinstance(made, Profile), made
        same(made.mtp, expected)
