"""Keep and prune lists of other tools: what each format means, round trips, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from moecover.checkpoints.structure import Structure, read_structure
from moecover.errors import InputError
from moecover.planning.artifact import Plan
from moecover.planning.exchange import export_plan, import_plan
from moecover.planning.keep_lists import FORMATS
from tests.conftest import hand_plan
from tests.support.command_line import run

# The MoE layers of this model are decoder layers 1 and 2, with 12 experts each, of which a token uses 4.
KEPT = [[0, 1, 2, 3, 4, 11], [1, 3, 5, 7, 9, 10]]
PRUNED = [[5, 6, 7, 8, 9, 10], [0, 2, 4, 6, 8, 11]]
MASK = [[1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1], [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1, 0]]
BEST_FIRST = [[11, 4, 3, 2, 1, 0, 5, 6, 7, 8, 9, 10], [10, 9, 7, 5, 3, 1, 0, 2, 4, 6, 8, 11]]
FOREIGN = {
    "kept": ("kept", json.dumps({"1": KEPT[0], "2": KEPT[1]})),
    "kept, by MoE layer": ("kept", json.dumps({"0": KEPT[0], "1": KEPT[1]})),
    "pruned": ("pruned", json.dumps({"2": PRUNED[1][::-1], "1": PRUNED[0]})),
    "hope": ("hope", json.dumps({"0": PRUNED[0], "1": PRUNED[1]})),
    "llm-compressor": (None, json.dumps({"model.layers.1.mlp": KEPT[0], "model.layers.2.mlp.experts": KEPT[1]})),
    "vllm-ascend": (None, "".join(json.dumps({n: ids}) + "\n" for n, ids in zip("12", BEST_FIRST, strict=True))),
    "vllm-profile": (
        None,
        json.dumps({"version": 1, "pruned_experts": [[n + 1, e] for n in (0, 1) for e in PRUNED[n]]}),
    ),
    "easy-ep": (None, json.dumps([[float(one) for one in row] for row in MASK])),
    "selection": (
        None,
        json.dumps({"source_experts": 12, "retained_experts": 6, "layers": {"1": KEPT[0], "2": KEPT[1]}}),
    ),
}


@pytest.fixture
def model(checkpoints: Callable[..., Path]) -> Structure:
    return read_structure(checkpoints("qwen2_moe"))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_as_its_tool_writes_it(case: str, model: Structure, tmp_path: Path) -> None:
    form, text = FOREIGN[case]
    keep = 6 if case == "vllm-ascend" else None
    plan = import_plan(write(tmp_path / "list", text), model, from_format=form, keep=keep, progress=False)
    assert plan.kept == KEPT
    assert plan.keep == 6
    assert plan.options == {"file": "list", "format": form or case}
    assert Plan.from_json(plan.to_json()) == plan
    if keep:
        assert plan.layers[1].filled == [10, 9, 7, 5, 3, 1]


@pytest.mark.parametrize("form", FORMATS)
def test_round_trip(form: str, model: Structure, tmp_path: Path) -> None:
    plan = hand_plan(model, KEPT)
    path = export_plan(plan, model, tmp_path / "list", export=form, progress=False)
    keep = plan.keep if FORMATS[form].holds == "ranking" else None
    assert import_plan(path, model, from_format=form, keep=keep, progress=False).kept == KEPT
    shown = {"kept", "pruned", "hope"} - {form} if form in ("kept", "pruned", "hope") else set()
    if shown:
        with pytest.raises(InputError, match="kept or pruned. Give from_format=kept or from_format=pruned or"):
            import_plan(path, model, progress=False)
    else:
        assert import_plan(path, model, keep=keep, progress=False).kept == KEPT


def test_every_format_has_a_case() -> None:
    assert {case.partition(",")[0] for case in FOREIGN} == set(FORMATS)


def kept_as(first: object, second: object = KEPT[1]) -> str:
    return json.dumps({"1": first, "2": second})


REFUSED = {
    kept_as([0, 1, 2, 3, 4, 12]): "layer 1 has '12' as an expert. Allowed: ids from 0 to 11",
    kept_as([0, 1, 2, 3, 4, True]): "layer 1 has 'True' as an expert",
    kept_as([0, 1, 2, 3, 4, "5"]): "layer 1 has '5' as an expert",
    kept_as([0, 1, 2, 3, 4, 4]): "layer 1 has expert 4 twice",
    kept_as("0, 1"): "layer 1 has no list",
    kept_as(KEPT[0][:5]): "keeps 5 to 6 experts by layer (6 in decoder layer 2, 5 in 1 of 2)",
    kept_as([], []): "keeps no expert",
    kept_as([0, 1], [0, 1]): "keep=2 leaves fewer experts than the router's top-k of 4",
    json.dumps({"1": KEPT[0]}): "has layers 1. The model has its MoE layers at 1, 2",
    json.dumps({"2": KEPT[0], "3": KEPT[1]}): "has layers 2, 3. The model has its MoE layers at 1, 2",
    json.dumps({"01": KEPT[0], "2": KEPT[1]}): "layer '01' is no number",
    json.dumps([KEPT[0], KEPT[1]]): "is not of format kept",
    '{"1": [0], "2": [0],\n"1": [1]}': "has layer '1' twice in one object. Leave one of the two",
    "[1, 2": "is neither JSON nor JSON lines",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_a_list_may_not_hold(text: str, model: Structure, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        import_plan(write(tmp_path / "list.json", text), model, from_format="kept", progress=False)
    assert REFUSED[text] in str(caught.value)


@pytest.mark.parametrize(
    "text, options, message",
    [
        ('{"a": 1}', {}, "is of no format that is known. Known: kept, pruned, hope, llm-compressor"),
        (FOREIGN["hope"][1], {"from_format": "hop"}, "unknown format in from_format 'hop'. Did you mean hope?"),
        (FOREIGN["kept"][1], {"from_format": "kept", "keep": 6}, "keep has no use here"),
        (FOREIGN["vllm-ascend"][1], {}, "give exactly one of keep"),
        (FOREIGN["vllm-ascend"][1].replace(", 5, 6, 7, 8, 9, 10", ""), {"keep": 7}, "layer 1 ranks fewer than 7 exp"),
        (FOREIGN["vllm-ascend"][1] + FOREIGN["vllm-ascend"][1], {"keep": 6}, "has layer 1 twice"),
        (json.dumps([MASK[0], MASK[1][:11]]), {}, "layer 1 is no row of 12 numbers 0 or 1"),
        (json.dumps([MASK[0], [*MASK[1][:11], 0.5]]), {}, "layer 1 is no row of 12 numbers 0 or 1"),
        ('{"version": 1, "pruned_experts": [[1]]}', {}, "is not of format vllm-profile"),
        ('{"version": 1, "pruned_experts": [[[1], 2]]}', {}, "is not of format vllm-profile"),
        (FOREIGN["selection"][1].replace('experts": 6', 'experts": 5'), {}, "retained_experts is not the number of"),
        (
            FOREIGN["selection"][1].replace('experts": 12', 'experts": 16'),
            {},
            "of a model with 16 experts per layer",
        ),
        (FOREIGN["selection"][1].replace('experts": 12', 'experts": true'), {}, "of a model with True experts per lay"),
        ('{"model.layers.1.mlp": [0], "model.layers.1.mlp": [1]}', {}, "has the key 'model.layers.1.mlp' twice"),
    ],
)
def test_what_a_file_may_not_be(
    text: str, options: dict[str, object], message: str, model: Structure, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        import_plan(write(tmp_path / "list", text), model, progress=False, **options)
    assert message in str(caught.value)


def test_a_pickle_is_not_opened(model: Structure, tmp_path: Path) -> None:
    for name, content in (("mask.pt", b"PK\x03\x04"), ("mask", pickle.dumps([True])), ("mask.pkl", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=r"is a pickle, which can run code .*\(~mask\).int\(\).tolist\(\)"):
            import_plan(tmp_path / name, model, progress=False)


def test_groups_keep_the_same_number(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """Three groups of four experts."""
    grouped = read_structure(checkpoints("deepseek_v3"))
    kept = {"1": [0, 1, 2, 3, 4, 8], "2": [0, 1, 4, 5, 8, 9]}
    path = write(tmp_path / "list.json", json.dumps(kept))
    with pytest.raises(InputError, match="keeps 4, 1, 1 experts of the router's groups"):
        import_plan(path, grouped, from_format="kept", progress=False)


def test_thinner_experts_are_no_list(model: Structure, tmp_path: Path) -> None:
    plan = hand_plan(model, KEPT)
    plan.width = 8
    for layer in plan.layers:
        layer.channels = [list(range(8)) for _ in layer.kept]
    with pytest.raises(InputError, match="keeps 8 channels of every expert, which no list of experts can say"):
        export_plan(plan, model, tmp_path / "list", export="kept", progress=False)


def test_what_a_list_has_no_place_for_is_said(
    model: Structure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = hand_plan(model, KEPT)
    plan.mtp = [plan.layers[-1].model_copy(update={"decoder_layer": 3})]
    path = export_plan(plan, model, tmp_path / "list", export="kept")
    assert "leaves out what the plan keeps of multi-token-prediction layers\n" in capsys.readouterr().err
    assert import_plan(path, model, from_format="kept", progress=False).kept == KEPT


def test_on_the_command_line(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, mine, theirs = checkpoints("qwen2_moe"), tmp_path / "plan.json", tmp_path / "list.jsonl"
    write(theirs, FOREIGN["vllm-ascend"][1])
    status, out, _ = run(capsys, "plan", "--from", theirs, "--model", folder, "--keep", 6, "-o", mine)
    assert status == 0
    assert "imported keeps 6 of 12 experts in 2 layers" in out
    assert Plan.load(mine).kept == KEPT
    back = ["plan", "--from", mine, "--model", folder, "--export", "vllm-ascend", "-o", theirs]
    status, _, err = run(capsys, *back)
    assert status == 0
    assert json.loads(theirs.read_text().splitlines()[0]) == {"1": [*KEPT[0], *PRUNED[0]]}
    assert '"expert_prune_ratio": 0.458333' in err  # int(12 * (1 - 0.458333)) is 6
    for words, message in (
        ([*back, "--method", "pooled"], "--from and --method exclude each other"),
        ([*back, "--budget", "50%"], "--from and --budget exclude each other"),
        ([*back, "--keep", "6"], "--keep has no use here"),
        (["plan", "p", "--keep", 6, "--export", "kept", "-o", mine], "--export goes with --from FILE"),
        (["plan", "--from", mine, "-o", mine], "give --model MODEL"),
    ):
        status, _, err = run(capsys, *words)
        assert status == 2
        assert message in err
