"""Multi-token-prediction layers that were cut with their checkpoint, run by transformers' own model for such layers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moecover.checkpoints.structure import Structure, read_structure
from moecover.errors import InputError
from moecover.planning.artifact import Plan
from moecover.planning.explaining.facts import explain
from moecover.planning.fitting import check_plan
from moecover.planning.run import plan
from moecover.planning.selection import ranked
from moecover.profiling.artifact import Profile
from moecover.profiling.run import profile
from moecover.profiling.wide import num_bytes
from moecover.pruning.job import prune as prune_job
from moecover.pruning.writer import prune
from moecover.runtime.drafting import load_drafts
from moecover.runtime.loading import load_model
from tests.conftest import random_corpus
from tests.support.command_line import run
from tests.support.passes import limit_between
from tests.support.quantised import set_config, with_mtp_that_drafts

pytest.importorskip("transformers.modeling_layers")
ROOT = "model.layers.3"


@pytest.fixture(scope="module")
def structure(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Structure:
    return read_structure(with_mtp_that_drafts(checkpoints("deepseek_v3"), tmp_path_factory.mktemp("mtp") / "m"))


@pytest.fixture(scope="module")
def made(structure: Structure) -> Profile:
    return profile(structure, [random_corpus("a", seed=1), random_corpus("b", seed=2)], mtp=True)


def drafted(folder: Path, dropped: list[int]) -> torch.Tensor:
    """Outputs of the layer on random tokens and hidden states, some experts never chosen; the trunk takes no part."""
    structure = read_structure(folder)
    drafts = load_drafts(load_model(structure), structure)
    draw = torch.Generator().manual_seed(0)
    hidden, tokens = torch.randn(1, 24, 32, generator=draw), torch.randint(0, 300, (1, 24), generator=draw)
    with torch.inference_mode():
        drafts.module.layers["3"].mlp.gate.e_score_correction_bias[dropped] = -torch.inf
        (found,) = drafts.run(hidden, tokens)
        return found


def others(kept: list[int]) -> list[int]:
    return sorted(set(range(12)) - set(kept))


@pytest.mark.parametrize("rated", [True, False])
def test_the_cut_layer_drafts_what_the_masked_one_does(
    structure: Structure, made: Profile, tmp_path: Path, rated: bool
) -> None:
    """By ids of its own, or by those of the last MoE layer, which are others; the other choice drafts otherwise."""
    chosen = plan(made, retain=0.5)
    own, last = chosen.mtp[0].kept, chosen.layers[-1].kept
    assert own != last
    said: list[str] = []
    used = chosen if rated else chosen.model_copy(update={"mtp": []})
    out = prune(structure, used, tmp_path / "out", mtp="prune", say=said.append)
    assert (
        any("does not rate the experts of multi-token" in line and line.endswith("layer 2") for line in said) != rated
    )
    source = structure.checkpoint.path
    expected, mutant = drafted(source, others(own if rated else last)), drafted(source, others(last if rated else own))
    found = drafted(out, [])
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert not torch.allclose(found, mutant, rtol=1e-3)


def test_the_layer_keeps_what_its_own_statistics_say(structure: Structure, made: Profile) -> None:
    """The method's rule on the layer's statistics, every corpus's best among it; other methods say what they do."""
    assert made.mtp is not None
    (row,) = plan(made, retain=0.5, method="pooled", saliency="frequency").mtp
    counts = np.sum([s["count"][0] for s in made.mtp.statistics.values()], axis=0)
    best = [int(e) + 4 * g for g in range(3) for e in ranked(counts[4 * g : 4 * g + 4])[:2]]
    assert row.kept == sorted(best)
    (row,) = plan(made, retain=0.5, protect=1.0, saliency="frequency").mtp
    for corpus, statistics in made.mtp.statistics.items():
        assert int(ranked(statistics["count"][0])[0]) in row.kept, corpus
    assert plan(made, retain=0.5, method="global").mtp == []
    read = Plan.from_json((chosen := plan(made, retain=0.5)).to_json())
    assert read == chosen
    assert check_plan(read, structure) is None
    for change in ({"decoder_layer": 4}, {"kept": [0, 1, 4, 5, 8]}):
        wrong = chosen.model_copy(update={"mtp": [chosen.mtp[0].model_copy(update=change)]})
        with pytest.raises(
            InputError, match="multi-token-prediction layers 4, .* has 3|decoder layer 3 keeps 5 experts"
        ):
            check_plan(wrong, structure)


def test_thinner_experts_keep_channels_of_their_own(structure: Structure, made: Profile, tmp_path: Path) -> None:
    chosen = plan(made, retain=0.5, width=8)
    out = prune(structure, chosen, tmp_path / "out", mtp="prune")
    before, after = load_file(structure.checkpoint.path / "model.safetensors"), load_file(out / "model.safetensors")
    (row,) = chosen.mtp
    for new, (old, channels) in enumerate(zip(row.kept, row.channels, strict=True)):
        whole = before[f"{ROOT}.mlp.experts.{old}.down_proj.weight"]
        assert torch.equal(after[f"{ROOT}.mlp.experts.{new}.down_proj.weight"], whole[:, channels])
    assert json.loads((out / "moecover.json").read_text())["plan"]["mtp"][0]["kept"] == row.kept


def test_explained(structure: Structure, made: Profile) -> None:
    chosen = plan(made, retain=0.5)
    (row,) = explain(chosen, profile=made)["mtp"]
    assert row["decoder_layer"] == 3
    assert row["guarantee"] >= 1
    assert row["as_last"] == len(set(row["kept"]) & set(chosen.layers[-1].kept)) < 6
    text = explain(chosen).text()
    assert f"Of its 6 ids decoder layer 2 keeps {row['as_last']}." in text
    assert re.search(r"Multi-token prediction, layer 3, by its own statistics: utility kept a \d\d\.\d%, b \d\d", text)


def test_ids_that_the_model_does_not_have_are_refused(made: Profile) -> None:
    chosen = plan(made, retain=0.5)
    chosen.mtp[0].kept[-1] = 99
    with pytest.raises(InputError, match="keeps experts above the 11 of the profile"):
        explain(chosen, profile=made)


@pytest.mark.parametrize("dense", [False, True])
def test_each_of_two_layers_is_cut_by_its_own_ids(
    structure: Structure, made: Profile, checkpoints: Callable[..., Path], tmp_path: Path, dense: bool
) -> None:
    """Also where the first has no experts."""
    source = with_mtp_that_drafts(checkpoints("deepseek_v3"), tmp_path / "m", layers=2)
    before = load_file(source / "model.safetensors")
    if dense:
        before = {name: tensor for name, tensor in before.items() if not name.startswith(f"{ROOT}.mlp.")}
        save_file(before, source / "model.safetensors", metadata={"format": "pt"})
    kept = {3: [0, 3, 4, 7, 9, 11], 4: [1, 2, 5, 6, 8, 10]}
    if dense:
        del kept[3]
    chosen = plan(made, retain=0.5)
    rows = [chosen.mtp[0].model_copy(update={"decoder_layer": n, "kept": ids}) for n, ids in kept.items()]
    two = chosen.model_copy(update={"mtp": rows, "model_fingerprint": None, "weight_files": {}})
    out = prune(read_structure(source), two, tmp_path / "out", mtp="prune")
    after = load_file(out / "model.safetensors")
    for number, ids in kept.items():
        for new, old in enumerate(ids):
            name = f"model.layers.{number}.mlp.experts.{{}}.down_proj.weight"
            assert torch.equal(after[name.format(new)], before[name.format(old)])


def test_one_shot_rates_the_layer_where_it_can_run(
    structure: Structure,
    made: Profile,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In memory it does; layer by layer it says that it cannot, and keeps the ids of the last layer as before."""
    corpora, source = [random_corpus("a", seed=1), random_corpus("b", seed=2)], structure.checkpoint.path
    whole = prune_job(source, output=tmp_path / "whole", corpora=corpora, retain=0.5, mtp="prune", progress=False)
    assert whole.plan.mtp == plan(made, retain=0.5).mtp
    dropped = prune_job(source, output=tmp_path / "dropped", corpora=corpora, retain=0.5, progress=False)
    assert dropped.plan.mtp == []
    monkeypatch.setattr("moecover.runtime.cost.OVERHEAD", 0)
    limit = limit_between(structure, tokens=288, batch_tokens=96, head=False) + num_bytes(structure, 2)
    short = prune_job(
        source, output=tmp_path / "short", corpora=corpora, retain=0.5, mtp="prune", memory_limit=f"{limit}"
    )
    assert short.plan.mtp == []
    assert re.search(r"multi-token-prediction layers are not profiled: \S+ does not fit", capsys.readouterr().err)


def test_a_kept_profile_without_the_layers_is_said_to_be_so(
    structure: Structure, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does a profile for a method that does not rate them: it does not even load them."""
    monkeypatch.setattr("moecover.profiling.run.load_drafts", lambda *given: pytest.fail("loaded"))
    source, common = structure.checkpoint.path, {"corpora": [random_corpus("a")], "retain": 0.5, "mtp": "prune"}
    common["save_profile"] = tmp_path / "p"
    out = prune_job(source, output=tmp_path / "one", method="aimer", **common)
    assert out.plan.mtp == []
    assert "are not profiled" not in capsys.readouterr().err
    prune_job(source, output=tmp_path / "two", **common)
    assert re.search(
        r"note: the profile in \S+ was made without multi-token-prediction layers\n", capsys.readouterr().err
    )


def test_super_experts_are_those_of_other_layers(made: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is required of the layers, whatever the first MoE layer must keep."""
    (row,) = plan(made, retain=0.5).mtp
    dropped = next(iter(others(row.kept)))
    monkeypatch.setattr("moecover.planning.run.super_experts", lambda profile: (frozenset({dropped}),) * 2)
    protected = plan(made, retain=0.5, protect_super_experts=True)
    assert dropped in protected.layers[0].kept
    assert protected.mtp[0].kept == row.kept


def test_by_command(structure: Structure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": [*range(i, i + 20)]}) + "\n" for i in range(8)))
    given = [structure.checkpoint.path, "--corpus", f"rows={rows}", "-o", tmp_path / "p", "--mtp"]
    status, out, _ = run(capsys, "profile", *given)
    assert status == 0
    assert "statistics of 2 layers x 12 experts, and of 1 multi-token-prediction layer\n" in out
    status, out, _ = run(capsys, "plan", tmp_path / "p", "--keep", 6, "-o", tmp_path / "plan.json")
    assert status == 0
    assert "in 1 of multi-token prediction by their own statistics" in out


def test_settings_name_experts_by_the_new_ids_of_their_layer(
    structure: Structure, made: Profile, tmp_path: Path
) -> None:
    chosen = plan(made, retain=0.5)
    kept = {2: chosen.layers[-1].kept, 3: chosen.mtp[0].kept}
    expert = next(e for e in kept[2] if e in kept[3] and kept[2].index(e) != kept[3].index(e))
    shutil.copytree(structure.checkpoint.path, tmp_path / "m")
    names = {number: f"model.layers.{number}.mlp.experts.{{}}.down_proj" for number in kept}
    apart = [name.format(expert) for name in names.values()]
    set_config(tmp_path / "m", quantization_config={"quant_method": "fp8", "modules_to_not_convert": apart})
    out = prune(read_structure(tmp_path / "m"), chosen, tmp_path / "out", mtp="prune")
    found = json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert found == [name.format(kept[number].index(expert)) for number, name in names.items()]
