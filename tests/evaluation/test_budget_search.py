"""Finding the number of experts: the search against brute force, held-out blocks, and the command as users meet it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecover.checkpoints.structure import read_structure
from moecover.checkpoints.topology import Topology
from moecover.corpora.overlap import overlap
from moecover.corpora.packing import load_corpus, load_unused
from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.budget_search import BELOW, largest_within, parse_percent, possible_keeps, smallest
from moecover.evaluation.perplexity import perplexity
from moecover.evaluation.run import evaluate
from moecover.planning.artifact import Plan
from moecover.planning.keep import allowed_keeps, resolve_keep
from moecover.planning.masking import masked
from moecover.planning.run import plan
from moecover.profiling.artifact import Profile
from moecover.runtime.loading import load_model
from moecover.runtime.memory import parse_size
from tests.conftest import write_rows
from tests.support.command_line import run


@given(st.lists(st.booleans(), min_size=1, max_size=70))
@settings(max_examples=500, deadline=None)
def test_the_smallest_was_measured_and_so_were_its_neighbours(holds: list[bool]) -> None:
    """Whatever the curve: nothing is measured twice, the answer holds, its neighbours below do not."""
    keeps = [3 * i + 4 for i in range(len(holds))]
    truth, asked = dict(zip(keeps, holds, strict=True)), list[int]()

    def measure(some: list[int]) -> list[bool]:
        asked.extend(some)
        return [truth[k] for k in some]

    found = smallest(keeps, measure)
    assert len(asked) == len(set(asked))
    assert found == min((k for k in asked if truth[k]), default=None)
    place = len(keeps) if found is None else keeps.index(found)
    assert set(keeps[max(0, place - 1 - BELOW) : place]) <= set(asked)
    if holds == sorted(holds):  # never better with fewer experts: then it is the smallest of all, at few measurements
        assert found == min((k for k in keeps if truth[k]), default=None)
        assert len(asked) <= 4 * math.ceil(math.log(len(holds) + 1, 4.5)) + 2 + BELOW


def test_allowed_numbers_are_those_that_resolve_keep_takes() -> None:
    for groups, top in ((1, 1), (3, 2), (4, 1)):
        topology = Topology("m", (0, 1), 24, 5, 8, 2, groups, top)

        def taken(keep: int, topology: Topology = topology) -> bool:
            try:
                return resolve_keep(topology, keep=keep, retain=None) == keep
            except InputError:
                return False

        assert allowed_keeps(topology) == [k for k in range(1, 25) if taken(k)]
        assert allowed_keeps(topology, 8) == [k for k in range(8, 25, 8) if k % groups == 0 and taken(k)]


@pytest.mark.parametrize("text", ["10", "0.1", "-1%", "ten%", "%", "10%%", ""])
def test_what_is_no_percentage(text: str) -> None:
    with pytest.raises(InputError, match="give a percentage"):
        parse_percent(text, "--max-perplexity-increase")
    assert [parse_percent(t, "") for t in ("10%", " 2.5 % ", "0%")] == [0.1, 0.025, 0.0]


def text_of(seed: int, lines: int = 400) -> str:
    rng = np.random.default_rng(seed)
    words = ["river", "mill", "hills", "sea", "south", "old", "falls", "turns", "rises", "past"]
    return "".join(" ".join(rng.choice(words, 8)) + f" {seed}-{i}.\n" for i in range(lines))


@pytest.fixture
def story(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "story.jsonl", [{"text": text_of(i, 30)} for i in range(20)])


@pytest.mark.parametrize("kind", ["text", "rows"])
def test_unused_blocks_are_all_that_the_sample_left(
    checkpoints: Callable[..., Path], story: Path, tmp_path: Path, kind: str
) -> None:
    """Sample and rest together are the whole: no block is in both, none is missing, and the sketch sees no overlap."""
    structure, path = read_structure(checkpoints("qwen2_moe")), story
    if kind == "rows":
        rng = np.random.default_rng(0)
        rows = [{"input_ids": rng.integers(0, 300, size=int(n)).tolist()} for n in rng.integers(20, 64, size=40)]
        path = write_rows(tmp_path / "rows.jsonl", rows)
    options = {"structure": structure, "sequences": 12, "seed": 3} | ({"length": 48} if kind == "text" else {})
    sample = load_corpus("s", path, **options)
    unused = load_unused("s", path, sample.record, structure=structure, blocks=10**6)
    available = sample.record["blocks_available"]
    both = [tuple(row[keep].tolist()) for c in (sample, unused) for row, keep in zip(c.tokens, c.mask, strict=True)]
    assert len(both) == len(set(both)) == available > 24
    whole = load_corpus("s", path, **{**options, "sequences": available}) if kind == "rows" else None
    if whole is not None:
        assert set(both) == {tuple(r[m].tolist()) for r, m in zip(whole.tokens, whole.mask, strict=True)}
    assert overlap(unused.tokens, unused.mask, [sample.record]) < 0.01
    assert overlap(sample.tokens, sample.mask, [sample.record]) == 1
    fewer = load_unused("s", path, sample.record, structure=structure, blocks=5)
    rows_of = {row.tobytes() for row in unused.tokens[:, : fewer.tokens.shape[1]]}
    assert len(fewer.tokens) == 5
    assert all(row.tobytes() in rows_of for row in fewer.tokens)
    with pytest.raises(InputError, match="another hash"):
        load_unused("s", path, {**sample.record, "seed": 4}, structure=structure, blocks=5)


@pytest.fixture
def own_text(checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    """Sequences that the model itself draws, so that fewer experts predict them worse."""
    model = load_model(read_structure(checkpoints("qwen2_moe")))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 300, (60, 1), generator=generator)
    with torch.inference_mode():
        for _ in range(39):
            shares = (3 * model(tokens, use_cache=False).logits[:, -1]).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(shares, 1, generator=generator)], 1)
    return write_rows(tmp_path / "own.jsonl", [{"input_ids": row} for row in tokens.tolist()])


@pytest.fixture
def profiled(checkpoints: Callable[..., Path], own_text: Path, tmp_path: Path, capsys) -> tuple[Path, Path]:
    model = checkpoints("qwen2_moe")
    options = ["--corpus", f"s={own_text}", "--sequences", 20, "--keep-inputs", 200]
    status, _, err = run(capsys, "profile", model, *options, "-o", tmp_path / "p")
    assert status == 0, err
    return model, tmp_path / "p"


def test_the_found_plan_is_the_smallest_that_holds(
    profiled: tuple[Path, Path], own_text: Path, tmp_path: Path, capsys
) -> None:
    """Every point of the curve equals a perplexity measured plan by plan on blocks that the profile did not use."""
    model, folder = profiled
    common = ["plan", folder, "--model", model, "--corpus", f"s={own_text}", "--windows", 30]
    profile, structure = Profile.load(folder), read_structure(model)
    text = load_unused("s", own_text, profile.corpora["s"][0], structure=structure, blocks=30)
    live = load_model(structure)
    own = perplexity(live, text)
    increase = {}
    for keep in range(4, 12):
        with masked(live, structure, plan(profile, keep=keep)):
            increase[keep] = perplexity(live, text) / own - 1
    most = sorted(increase.values())[3]  # four of the eight hold
    assert most > 0
    bound = ["--max-perplexity-increase", f"{100 * most + 1e-6:.9f}%"]
    status, out, err = run(capsys, *common, *bound, "-o", tmp_path / "a.json", "--json")
    assert status == 0, err
    found = json.loads(out)["found"]
    measured = {point["keep"]: point for point in found["curve"]}
    assert {k: p["increase"]["s"] for k, p in measured.items()} == pytest.approx({k: increase[k] for k in measured})
    assert all(p["holds"] == (increase[k] <= most + 1e-6) for k, p in measured.items())
    assert json.loads(out)["keep"] == min(k for k, p in measured.items() if p["holds"])
    assert all(p["num_bytes"] == structure.num_bytes(k) for k, p in measured.items())
    assert found["full"]["s"] == pytest.approx(own)
    assert found["texts"]["s"]["left_by"] == profile.corpora["s"][0]["sha256"]
    saved = Plan.load(tmp_path / "a.json")
    assert (saved.keep, saved.found) == (json.loads(out)["keep"], found)
    alone = plan(profile, keep=saved.keep)
    assert (saved.layers, saved.options, alone.found) == (alone.layers, alone.options, {})


def test_on_given_text_with_a_method_that_searches(profiled: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    """The result as a table."""
    model, folder = profiled
    given = tmp_path / "given.txt"
    given.write_text(text_of(99))
    bound = ["--perplexity", f"g={given}", "--windows", 4, "--max-perplexity-increase", "1000%", "--multiple-of", 4]
    method = ["--method", "expert-sparsity", "-o", tmp_path / "b.json"]
    status, out, err = run(capsys, "plan", folder, "--model", model, *bound, *method)
    assert status == 0, err
    assert "chosen" in out
    assert Plan.load(tmp_path / "b.json").keep == 4
    assert [p["keep"] for p in Plan.load(tmp_path / "b.json").found["curve"]] == [4, 8]


def test_nothing_holds(profiled: tuple[Path, Path], own_text: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """The error names the nearest number that was measured, and no plan is written."""
    model, folder = profiled

    def worse(*args: Any, **options: Any) -> Evaluation:
        """Every plan has twice its perplexity."""
        found = evaluate(*args, **options)
        for row in found.rows:
            if row.plan is not None:
                row.perplexity["s"] = replace(row.perplexity["s"], perplexity=2 * row.perplexity["s"].perplexity)
        return found

    monkeypatch.setattr("moecover.evaluation.budget_search.evaluate", worse)
    bound = ["--corpus", f"s={own_text}", "--max-perplexity-increase", "0.5%"]
    status, _, err = run(capsys, "plan", folder, "--model", model, *bound, "-o", tmp_path / "x.json")
    assert (status, (tmp_path / "x.json").exists()) == (1, False)
    assert (
        "no number of experts below 12 keeps every perplexity within 0.5% of the model's own: the nearest of the" in err
    )


def test_the_largest_that_fits(
    profiled: tuple[Path, Path], checkpoints: Callable[..., Path], tmp_path: Path, capsys
) -> None:
    model, folder = profiled
    structure = read_structure(model)
    for keep, size in ((6, structure.num_bytes(6)), (6, structure.num_bytes(7) - 1), (7, structure.num_bytes(7))):
        assert largest_within(structure, size) == keep
        bound = ["--model", model, "--max-size", f"{size}B"]
        status, _, err = run(capsys, "plan", folder, *bound, "-o", tmp_path / "s.json")
        assert (status, Plan.load(tmp_path / "s.json").keep) == (0, keep), err
    assert largest_within(structure, structure.num_bytes(7), multiple_of=3) == 6
    status, _, err = run(capsys, "prune", model, "--plan", tmp_path / "s.json", "-o", tmp_path / "out", "--json")
    assert status == 0, err
    assert read_structure(tmp_path / "out").checkpoint.num_bytes == structure.num_bytes(7)
    assert parse_size("12GB") == 12 * 10**9
    for size, message in (
        ("1kB", "the fewest allowed, leave"),
        ("1GB", "nothing is to be removed"),
        ("big", "is no size"),
    ):
        status, _, err = run(capsys, "plan", folder, "--model", model, "--max-size", size, "-o", tmp_path / "n.json")
        assert (status, message in err, (tmp_path / "n.json").exists()) == (2, True, False), err
    other = ["--model", checkpoints("olmoe"), "--max-size", "50kB"]
    status, _, err = run(capsys, "plan", folder, *other, "-o", tmp_path / "n.json")
    assert (status, "of another model" in err) == (2, True)


def test_refused_before_the_model_is_loaded(
    profiled: tuple[Path, Path], checkpoints: Callable[..., Path], own_text: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    from moecover.runtime import memory as fitting

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(fitting, "load_model", never)
    model, folder = profiled
    (tmp_path / "other.jsonl").write_text(own_text.read_text().replace("7", "8"))
    bound, own = ["--max-perplexity-increase", "10%"], f"s={own_text}"
    ten = [*bound, "--model", model]
    cases = [
        (bound, "give --model MODEL"),
        (["--max-size", "50kB"], "give --model MODEL"),
        (["--keep", "6", *bound], "give exactly one of"),
        (["--max-size", "50kB", *bound], "give exactly one of"),
        (["--keep", "6", "--windows", "3"], "--windows goes with --max-perplexity-increase"),
        (
            ["--max-size", "50kB", "--model", model, "--perplexity", "c4"],
            "--perplexity goes with --max-perplexity-increase",
        ),
        (["--max-perplexity-increase", "10", "--model", model], "give a percentage with its sign"),
        (ten, "the profile read s from the file own.jsonl"),
        ([*ten, "--corpus", f"t={own_text}"], "--corpus t is none of the profile's"),
        ([*ten, "--corpus", own, "--perplexity", "c4"], "exclude each other"),
        ([*ten, "--corpus", f"s={tmp_path}/other.jsonl"], "is not what the profile read"),
        ([*ten, "--perplexity", "web"], "is calibration text"),
        ([*bound, "--model", checkpoints("olmoe"), "--corpus", own], "of another model"),
        ([*ten, "--corpus", own, "--windows", "0"], "--windows 0 is out"),
        ([*ten, "--corpus", own, "--multiple-of", "12"], "nothing to search"),
    ]
    for extra, message in cases:
        status, _, err = run(capsys, "plan", folder, *extra, "-o", tmp_path / "n.json")
        assert (status, message in err, (tmp_path / "n.json").exists()) == (2, True, False), (extra, err)
    for record, message in (
        ({"blocks_available": 20}, "took all 20 blocks"),
        ({"rows": "slice(0, 4)"}, "is not one sample of one text"),
    ):
        profile = Profile.load(folder)
        profile.corpora["s"][0].update(record)
        profile.save(tmp_path / "changed")
        bound = ["--max-perplexity-increase", "10%", "--corpus", f"s={own_text}"]
        status, _, err = run(capsys, "plan", tmp_path / "changed", "--model", model, *bound, "-o", tmp_path / "n.json")
        assert (status, message in err) == (2, True), err


def test_super_experts_set_the_lowest_number(profiled: tuple[Path, Path]) -> None:
    profile = Profile.load(profiled[1])
    assert possible_keeps(profile) == list(range(4, 12))
    for statistics in profile.statistics.values():
        statistics["max_abs"][:] = 1.0
        statistics["max_abs"][0, :6] = 100.0
    import moecover.planning.run as planning

    needed = max(len(ids) for ids in planning.super_experts(profile))
    assert possible_keeps(profile, protect_super_experts=True) == list(range(max(4, needed), 12))
