"""Merges of live layers: statistics against plain passes, written checkpoints, channels, interrupts, refusals."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import moecover
from moecover.checkpoints.structure import Structure, read_structure
from moecover.cli import main as cli
from moecover.errors import InputError
from moecover.merging.facts import Groups, LayerFacts
from moecover.merging.method import GATED, MERGES, OUTPUTS, ROUTER, SALIENCY, Pair
from moecover.planning.artifact import Plan
from moecover.planning.masking import masked
from moecover.pruning.writer import prune
from moecover.repairing.applied import repaired
from moecover.repairing.layers import repair_layers
from moecover.repairing.merged import check_merged
from moecover.repairing.targets import places_on_disk
from moecover.runtime.loading import load_model
from moecover.runtime.streaming import streamed
from moecover.verification.verify import verify
from tests.conftest import hand_plan, random_corpus
from tests.support import zoo
from tests.support.repairs import CORPORA, half, manifest_of, mended, outputs, written
from tests.support.thin import random_shape

ALL = (SALIENCY, ROUTER, OUTPUTS, GATED)
TOKENS = torch.cat([torch.from_numpy(corpus.tokens) for corpus in CORPORA])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def of_groups(structure: Structure) -> Plan:
    """A plan that keeps as many experts of each of deepseek_v3's three groups."""
    return hand_plan(structure, [[0, 1, 4, 5, 8, 9]] * len(structure.topology.decoder_layers))


@torch.no_grad()
@pytest.mark.parametrize("sequential", [False, True])
def test_the_statistics_are_those_of_plain_passes(checkpoints: Callable[..., Path], sequential: bool) -> None:
    """Of the second layer, whose inputs are the original's, or what the merged first layer leads to."""
    structure = read_structure(checkpoints("qwen2_moe"))
    model, plan, seen = load_model(structure), half(structure), list[LayerFacts]()
    pairs = list[Pair]()

    def cost(pair: Pair) -> torch.Tensor:
        pairs.append(pair)
        return -torch.eye(len(pair.centre))

    with MERGES.restored():

        @MERGES("all", label="All", paper="", needs=ALL, sequential=sequential, cost=cost, by_activations=True)
        def everything(facts: LayerFacts) -> Groups:
            seen.append(facts)
            centre_of = np.full(12, -1)
            centre_of[list(facts.kept)] = facts.kept
            centre_of[3] = 4
            return Groups(centre_of, np.ones(12))

        made = [*repair_layers(model, structure, plan, CORPORA, kind="none", merge="all", batch_size=3)]
    assert [one.merged for one in made] == [{4: [3]}] * 2
    within = contextlib.ExitStack()
    if sequential:
        within.enter_context(masked(model, structure, plan))
        within.enter_context(repaired(model, structure, made))
    module, called = structure.experts_modules[1], list[tuple[torch.Tensor, ...]]()
    with within, torch.inference_mode():
        first = model.get_submodule(module.rpartition(".")[0])
        handle = first.register_forward_pre_hook(lambda m, args: called.append(args))
        model(TOKENS)
        handle.remove()
    hidden = called[0][0].flatten(0, -2).double()
    experts, router = model.get_submodule(module), model.get_submodule(module.rpartition(".")[0]).gate
    scores = hidden @ router.weight.T.double()
    weights, chosen = scores.softmax(1).topk(4, dim=1)  # not renormalised
    outs, acts = [], []
    for up, down in zip(experts.gate_up_proj.double(), experts.down_proj.double(), strict=True):
        gate, value = (hidden @ up.T).chunk(2, dim=1)
        acts.append(torch.nn.functional.silu(gate) * value)
        outs.append(acts[-1] @ down.T)
    facts = seen[1]
    routed = [(chosen == expert).nonzero(as_tuple=True) for expert in range(12)]
    assert facts.counts.tolist() == [len(token) for token, _ in routed]
    sums = [float((outs[e][token].norm(dim=1) * weights[token, slot]).sum()) for e, (token, slot) in enumerate(routed)]
    reap = np.array(sums) / np.maximum(facts.counts, 1)
    unit = scores / scores.norm(dim=0)
    gated = [(out * scores.softmax(1)[:, e, None]).mean(0) for e, out in enumerate(outs)]
    wanted = (reap, unit.T @ unit, torch.stack([out.mean(0) for out in outs]), torch.stack(gated))
    for name, value in zip(ALL, wanted, strict=True):
        np.testing.assert_allclose(getattr(facts, name), value, rtol=1e-4, atol=1e-6, err_msg=name)
    a, b = acts[4] / acts[4].norm(dim=0), acts[3] / acts[3].norm(dim=0)
    assert pairs[1].activations is not None
    torch.testing.assert_close(pairs[1].activations, a.T @ b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "name"), [("mixtral", "ream"), ("qwen2_moe", "m-smoe"), ("deepseek_v3", "hc-smoe")])
def test_a_written_checkpoint_is_the_same_merge_in_memory(
    checkpoints: Callable[..., Path], tmp_path: Path, family: str, name: str
) -> None:
    """Experts without shared ones, with a gated one, and with router groups and a shared one; a tensor an expert."""
    structure = read_structure(checkpoints(family))
    plan = of_groups(structure) if family == "deepseek_v3" else half(structure)
    model = load_model(structure)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = [*repair_layers(model, structure, plan, CORPORA, kind="none", merge=name)]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key  # the model is left as it was
    dropped = set(range(structure.topology.num_experts)) - set(plan.layers[0].kept)
    assert all({e for others in one.merged.values() for e in others} == dropped for one in made)
    cut = written(structure, plan, tmp_path, kind="none", merge=name)
    with masked(model, structure, plan), repaired(model, structure, made):
        inside = logits(model)
        blocks = outputs(model, structure, CORPORA[0])
    assert torch.equal(logits(load_model(read_structure(cut))), inside)
    for row, one, a, b in zip(
        manifest_of(cut)["layers"], made, outputs(model, structure, CORPORA[0]), blocks, strict=True
    ):
        assert row["merged"] == {str(centre): others for centre, others in one.merged.items()}
        assert float((a - b).square().sum() / a.square().sum()) == pytest.approx(row["after"]["a"], rel=1e-3)
    assert manifest_of(cut)["merge"] == name
    for one, of_layer in zip(made, plan.layers, strict=True):  # a kept expert that took none in is the original's
        names = [n for n in manifest_of(cut)["tensors"] if f".layers.{one.decoder_layer}." in n]
        changed = {int(n.partition(".experts.")[2].partition(".")[0]) for n in names}
        assert changed == {of_layer.kept.index(centre) for centre in one.merged}
    assert any(len(one.merged) < plan.keep for one in made)
    assert verify(structure.checkpoint.path, cut)["equal"]
    groups = [others for one in made for others in one.merged.values()]
    took, removed = len(groups), sum(map(len, groups))
    said = f"{took} of the experts that stay are averages of themselves and of {removed} removed ones (merge: {name})"
    assert said in (cut / "README.md").read_text()


def test_experts_in_one_tensor_on_disk(tmp_path: Path) -> None:
    """Gate and up projections of all experts are one tensor, down projections another; ridge refits merged experts."""
    zoo.make_model("granitemoe").save_pretrained(tmp_path / "model", save_original_format=True)
    structure = read_structure(tmp_path / "model")
    assert {t.axis for t in structure.tensors.values()} == {0}
    corpora = [random_corpus("a", sequences=6, length=20, vocab=zoo.SMALL["vocab_size"])]
    plan = half(structure)
    made = mended(structure, plan, tmp_path / "state", corpora=corpora, kind="ridge", merge="ream")
    cut = prune(structure, plan, tmp_path / "out", repaired=made)
    assert verify(structure.checkpoint.path, cut)["equal"]
    tensors = load_file(cut / "model.safetensors")
    assert made.what == "ream + ridge"
    for shown, row in zip(made.rows_shown(), made.layers, strict=True):
        assert shown["experts refitted"] == plan.keep - len(row["kept"]) > 0
    assert made.hashes.keys() < tensors.keys()
    alone = mended(structure, plan, tmp_path / "alone", corpora=corpora, kind="none", merge="ream")
    assert made.layers[0]["merged"] == alone.layers[0]["merged"]
    assert made.layers[0]["before"] == alone.layers[0]["before"]
    assert made.layers[0]["after"]["a"] < alone.layers[0]["after"]["a"]


def test_whole_experts_are_merged_and_then_cut(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """A kept channel is that of the kept expert, averaged with those that were matched with it."""
    structure = read_structure(checkpoints("qwen2_moe"))
    thin = random_shape(structure, 8)
    whole = hand_plan(structure, [layer.kept for layer in thin.layers])
    model = load_model(structure)
    first = next(iter(repair_layers(model, structure, whole, CORPORA, kind="none", merge="m-smoe")))
    cut = next(iter(repair_layers(model, structure, thin, CORPORA, kind="none", merge="m-smoe")))
    assert cut.merged == first.merged
    name = f"{structure.experts_modules[0]}.down_proj"
    for row, (full, narrow) in enumerate(zip(first.parameters[name], cut.parameters[name], strict=True)):
        assert torch.equal(full[:, thin.layers[0].channels[row]], narrow)
    made = mended(structure, thin, tmp_path / "state", kind="ridge", merge="m-smoe")
    assert verify(structure.checkpoint.path, prune(structure, thin, tmp_path / "out", repaired=made))["equal"]


def test_layer_by_layer_and_after_an_interrupt_it_is_the_same(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    structure = read_structure(checkpoints("mixtral"))
    plan = half(structure)
    once = mended(structure, plan, tmp_path / "once", kind="scale", merge="ream")
    parts = mended(structure, plan, tmp_path / "parts", kind="scale", merge="ream", model=streamed(structure))
    assert parts.manifest() == once.manifest()
    last = tmp_path / "parts" / f"layer-{plan.layers[-1].decoder_layer}.safetensors"
    last.unlink()
    said: list[str] = []
    again = mended(structure, plan, tmp_path / "parts", kind="scale", merge="ream", say=said.append)
    assert said == [f"resuming: {len(plan.layers) - 1} of {len(plan.layers)} layers are repaired"]
    assert again.manifest() == once.manifest()
    mended(structure, plan, tmp_path / "parts", kind="scale", merge="m-smoe", say=said.append)
    assert "--merge differs" in said[1]


def test_gradient_steps_start_from_merged_experts(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("mixtral"))
    model, plan = load_model(structure), half(structure)
    merged, refitted = (
        [*repair_layers(model, structure, plan, CORPORA, kind=kind, merge="hc-smoe")] for kind in ("none", "refit")
    )
    assert refitted[0].merged == merged[0].merged
    assert refitted[0].held is not None
    assert refitted[0].fit.before == merged[0].fit.before
    assert sum(refitted[0].fit.after) < sum(merged[0].fit.after)


def test_nothing_is_merged_where_all_experts_stay(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("mixtral"))
    every = hand_plan(structure, [[*range(6)]] * 2)
    for one in repair_layers(load_model(structure), structure, every, CORPORA, kind="none", merge="ream"):
        assert (one.parameters, one.merged) == ({}, {})
        assert one.fit.after == one.fit.before


def test_what_cannot_be_merged_is_refused_in_one_line(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("mixtral"))
    where = places_on_disk(structure)
    object.__setattr__(where[0], "parameters", "odd is not stored as it is used")
    with pytest.raises(InputError, match=r"merge=hc-smoe does not run on mixtral: odd is not.* Use merge=none"):
        check_merged(structure, where, MERGES["hc-smoe"])


@pytest.mark.parametrize(
    ("centre", "weight", "message"),
    [
        (1, 1.0, r"merge odd: expert 3 joins 1\. Allowed: a kept expert, which joins itself, or -1"),
        (0, -1.0, r"merge odd: the weight of expert 3 is -1\.0\. Give 0 or more"),
        (0, np.nan, "merge odd: the weight of expert 3 is nan"),
    ],
)
def test_groups_of_a_plugin_are_checked(
    checkpoints: Callable[..., Path], centre: int, weight: float, message: str
) -> None:
    structure = read_structure(checkpoints("mixtral"))
    with MERGES.restored():

        @MERGES("odd", label="Odd", paper="")
        def odd(facts: LayerFacts) -> Groups:
            return Groups(np.array([0, -1, 2, centre, 4, -1]), np.array([1, 1, 1, weight, 1, 1]))

        with pytest.raises(InputError, match=message):
            [*repair_layers(load_model(structure), structure, half(structure), CORPORA, kind="none", merge="odd")]


def test_requests_that_cannot_be_met_are_refused(
    checkpoints: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moecover.runtime.memory.load_model", None)  # nothing is loaded
    structure = read_structure(checkpoints("mixtral"))
    half(structure).save(tmp_path / "plan.json")
    text = tmp_path / "mine.jsonl"
    text.write_text('{"text": "one two three"}\n')
    by_plan = ["--plan", str(tmp_path / "plan.json")]
    corpus = ["--corpus", f"mine={text}"]
    gpt = str(checkpoints("gpt_oss"))
    for model, arguments, message in (
        ("", [*by_plan, "--merge", "ream"], "--merge ream fits weights on calibration text: give --corpus NAME[=PATH]"),
        ("", [*by_plan, *corpus, "--merge", "ream", "--evaluation", "cell"], "without merge and repair"),
        ("", [*by_plan, *corpus, "--merge", "ream", "--retain", "0.5"], "--plan and --retain exclude each other"),
        (
            gpt,
            [*corpus, "--retain", "0.5", "--merge", "m-smoe"],
            "--merge and --repair do not run on gpt_oss: its experts",
        ),
    ):
        status = cli.main(["prune", model or str(checkpoints("mixtral")), *arguments, "-o", str(tmp_path / "out")])
        assert status == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(InputError, match=r"unknown merge 'reem'\. Did you mean ream\?"):
        moecover.prune(structure, tmp_path / "plan.json", tmp_path / "out", merge="reem", corpora=[f"mine={text}"])
    with pytest.raises(InputError, match="give merge or repaired, not both"):
        moecover.prune(
            structure, tmp_path / "plan.json", tmp_path / "out", merge="ream", corpora=["c4"], repaired=object()
        )
