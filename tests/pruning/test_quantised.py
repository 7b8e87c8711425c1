"""Quantised checkpoints and multi-token-prediction layers through the files: byte for byte, settings renumbered."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecover.checkpoints.config_edit import without_mtp
from moecover.checkpoints.inspection import inspect
from moecover.checkpoints.structure import Structure, read_structure
from moecover.cli import main as cli
from moecover.errors import InputError
from moecover.planning.artifact import LayerPlan, Plan
from moecover.pruning.writer import prune
from moecover.verification.verify import verify
from tests.support.quantised import EXPERT, LAYOUTS, MTP, Tensors, mxfp4, quantise, set_config, some_bytes, with_mtp

KEPT = {  # by experts of a layer; as many of every third, for routers with three groups
    6: ([0, 2, 5], [1, 2, 4]),
    8: ([0, 3, 5, 6], [1, 2, 6, 7]),
    12: ([0, 3, 5, 6, 8, 11], [1, 2, 4, 6, 9, 10]),
}


def some_plan(structure: Structure) -> Plan:
    """Half of the experts, others in every layer."""
    layers, chosen = structure.topology.decoder_layers, KEPT[structure.topology.num_experts]
    rows = [LayerPlan(decoder_layer=d, kept=list(chosen[i % 2])) for i, d in enumerate(layers)]
    return Plan(schema=1, keep=len(chosen[0]), layers=rows)


def raw(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def expected_bytes(source: Path, plan: Plan) -> dict[str, Any]:
    """What a pruned checkpoint with per-expert names must hold, from the names alone; routers by their first axis."""
    found, kept = {}, {layer.decoder_layer: layer.kept for layer in plan.layers}
    for name, tensor in load_file(source / "model.safetensors").items():
        number = re.search(r"\.layers\.(\d+)\.", name)
        ids = kept.get(int(number[1])) if number else None
        if ids is not None and (one := EXPERT.search(name)):
            if int(one[1]) in ids:
                found[EXPERT.sub(f".experts.{ids.index(int(one[1]))}.", name)] = raw(tensor)
        elif ids is not None and re.search(r"\.gate\.(weight|e_score_correction_bias)$", name):
            found[name] = raw(tensor[ids])
        else:
            found[name] = raw(tensor)
    return found


def written(folder: Path) -> dict[str, Any]:
    return {name: raw(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("method", list(LAYOUTS))
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_quantised_experts_are_copied_byte_for_byte(
    checkpoints: Callable[..., Path], family: str, method: str, tmp_path: Path
) -> None:
    original = read_structure(checkpoints(family))
    folder = quantise(checkpoints(family), tmp_path / "m", method)
    structure = read_structure(folder)
    assert structure.topology == original.topology
    assert structure.quantised == method
    plan = some_plan(original)
    out = prune(structure, plan, tmp_path / "out")
    assert written(out) == expected_bytes(folder, plan)
    assert read_structure(out).topology.num_experts == plan.keep
    assert json.loads((out / "config.json").read_text())["quantization_config"] == {"quant_method": method}


@pytest.mark.parametrize("quantised_names", [True, False])
def test_mxfp4(checkpoints: Callable[..., Path], tmp_path: Path, quantised_names: bool) -> None:
    folder = mxfp4(checkpoints("gpt_oss", intermediate_size=32), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    if quantised_names:
        settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]}
        set_config(folder, quantization_config=settings)
    else:
        with pytest.raises(InputError, match="nothing in the files fills"):
            read_structure(folder)
        return
    structure = read_structure(folder)
    plan = some_plan(structure)
    out = prune(structure, plan, tmp_path / "out")
    found = written(out)
    for name, tensor in tensors.items():
        number = re.search(r"\.layers\.(\d+)\.", name)
        cut = number and re.search(r"\.experts\.|\.router\.", name)
        assert found[name] == raw(tensor[plan.layers[int(number[1])].kept] if cut and number else tensor)
    assert found.keys() == tensors.keys()


def test_a_plan_of_the_original_applies_to_its_quantised_sibling(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoints("qwen2_moe")
    original = read_structure(source)
    plan = some_plan(original).model_copy(
        update={"model_fingerprint": original.model_fingerprint, "topology_fingerprint": original.topology.fingerprint}
    )
    plan.save(tmp_path / "plan.json")
    folder = quantise(source, tmp_path / "m", "gptq")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.half() if ".gate.weight" in k else v for k, v in tensors.items()}, folder / "model.safetensors")
    command = ["prune", str(folder), "--plan", str(tmp_path / "plan.json"), "-o", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert read_structure(tmp_path / "out").topology.num_experts == plan.keep
    capsys.readouterr()
    # Calibration needs the weights as numbers: said in a line with the way out.
    assert cli.main(["profile", str(folder), "--corpus", "web", "-o", str(tmp_path / "p")]) == 2
    assert "profile the original that it was made from" in capsys.readouterr().err


def test_fp8_runs(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """A quantised checkpoint that transformers can run is verified like any other: scales move with their experts."""
    settings = {
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head", "gate", "q_proj", "k_proj", "v_proj"],
    }
    folder = quantise(checkpoints("qwen2_moe", dtype=torch.bfloat16), tmp_path / "m", "fp8", **settings)
    structure = read_structure(folder)
    out = prune(structure, some_plan(structure), tmp_path / "out")
    assert verify(folder, out)["equal"]
    tensors = load_file(out / "model.safetensors")
    one, two = (f"model.layers.1.mlp.experts.{e}.down_proj.weight_scale_inv" for e in (0, 1))
    tensors[one], tensors[two] = tensors[two], tensors[one]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert verify(folder, out)["first_difference"] == "decoder layer 1"


def test_names_of_experts_in_the_settings_are_renumbered(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    kept, gone = "model.layers.1.mlp.experts.5", "model.layers.1.mlp.experts.1"
    settings = {
        "ignore": ["lm_head", f"{kept}.down_proj", f"{gone}.down_proj", r"re:.*layers\.2\.mlp\.experts\.6\..*"],
        "dynamic": {f"-:{gone}.up_proj": {}, f"+:{kept}.up_proj": {"bits": 8, "none": None}},
        "modules_to_not_convert": None,
    }
    folder = quantise(checkpoints("qwen2_moe"), tmp_path / "m", "gptq", **settings)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"exclude_modules": [f"{kept}*", gone]}}))
    (folder / "quantize_config.json").write_text('{"bits":  4}')
    structure = read_structure(folder)
    plan = some_plan(structure)
    out = prune(structure, plan, tmp_path / "out")
    new, other = plan.layers[0].kept.index(5), plan.layers[1].kept.index(6)
    name = f"model.layers.1.mlp.experts.{new}"
    assert json.loads((out / "config.json").read_text())["quantization_config"] == {
        "quant_method": "gptq",
        "ignore": ["lm_head", f"{name}.down_proj", rf"re:.*layers\.2\.mlp\.experts\.{other}\..*"],
        "dynamic": {f"+:{name}.up_proj": {"bits": 8, "none": None}},
        "modules_to_not_convert": None,
    }
    assert json.loads((out / "hf_quant_config.json").read_text()) == {"quantization": {"exclude_modules": [f"{name}*"]}}
    assert (out / "quantize_config.json").read_text() == '{"bits":  4}'


def block_of(experts: list[int]) -> list[list[str]]:
    """The modules of a decoder layer, as GPTQ's settings list them."""
    return [["self_attn.k_proj"], *([f"mlp.experts.{e}.{leaf}" for e in experts] for leaf in ("up_proj", "down_proj"))]


def test_names_of_a_block_are_kept_or_refused_before_the_work(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other experts stay in every layer: a list of all of them loses the last ids, a part has none that fit."""
    settings = {"quant_method": "gptq", "modules_in_block_to_quantize": block_of(list(range(12)))}
    folder = quantise(checkpoints("qwen2_moe"), tmp_path / "m", "gptq")
    set_config(folder, quantization_config=settings)
    structure = read_structure(folder)
    out = prune(structure, some_plan(structure), tmp_path / "out")
    after = json.loads((out / "config.json").read_text())["quantization_config"]
    assert after == {**settings, "modules_in_block_to_quantize": block_of(list(range(6)))}
    plain = tmp_path / "plain"
    shutil.copytree(checkpoints("qwen2_moe"), plain)
    (plain / "quantize_config.json").write_text(json.dumps({"modules_in_block_to_quantize": block_of([0, 5])}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": list(range(40))}) + "\n")
    command = [
        "prune",
        plain,
        "--corpus",
        f"r={rows}",
        "--keep",
        6,
        "-o",
        tmp_path / "o",
        "--save-profile",
        tmp_path / "p",
    ]
    assert cli.main([str(part) for part in command]) == 2
    assert "'mlp.experts.0.up_proj', which cannot be renumbered" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
    with pytest.raises(InputError, match="which cannot be renumbered"):
        prune(read_structure(plain), some_plan(structure), tmp_path / "o")
    assert not (tmp_path / "o").exists()


Change = Callable[[Tensors], object]
LAYER = "model.layers.1.mlp"
MISFITS: dict[str, tuple[Change, str]] = {
    "a quantised router": (
        lambda t: t.update({f"{LAYER}.gate.weight": t[f"{LAYER}.gate.weight"].to(torch.float8_e4m3fn)}),
        r"the router is quantised \(model.layers.1.mlp.gate.weight of F8_E4M3\)",
    ),
    "packed router weights": (
        lambda t: t.update({f"{LAYER}.gate.qweight": some_bytes(4, 12, dtype=torch.int32)}),
        "belongs to the router in an unknown way",
    ),
    "a missing expert": (
        lambda t: [t.pop(k) for k in list(t) if ".layers.2.mlp.experts.7." in k],
        "nothing in the files belongs to expert 7 of model.layers.2.mlp.experts",
    ),
    "scales of too few experts": (
        lambda t: t.update({f"{LAYER}.experts.gate_up_proj_scales": some_bytes(5, 2)}),
        r"gate_up_proj_scales of shape \[5, 2\] belongs to the 12 experts",
    ),
    "no router": (
        lambda t: t.pop(f"{LAYER}.gate.weight"),
        "nothing in the files fills model.layers.1.mlp.gate.weight",
    ),
    "an expert too many": (
        lambda t: t.update({f"{LAYER}.experts.12.down_proj.qweight": some_bytes(2, 2, dtype=torch.int32)}),
        "is of expert 12, config.json has 12",
    ),
    "experts in a dense layer": (
        lambda t: t.update({"model.layers.0.mlp.experts.1.down_proj.qweight": some_bytes(2, 2, dtype=torch.int32)}),
        "experts that the model class does not have",
    ),
}


@pytest.mark.parametrize("what", list(MISFITS))
def test_quantised_files_that_do_not_fit(checkpoints: Callable[..., Path], tmp_path: Path, what: str) -> None:
    change, message = MISFITS[what]
    folder = quantise(checkpoints("qwen2_moe"), tmp_path / "m", "gptq")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        read_structure(folder)


# ----------------------------------------------------------------------------------------- multi-token prediction
@pytest.mark.parametrize("family", list(MTP))
@pytest.mark.parametrize("mtp", ["drop", "prune"])
def test_mtp_layers(checkpoints: Callable[..., Path], tmp_path: Path, family: str, mtp: str) -> None:
    root, config = MTP[family]
    folder = with_mtp(checkpoints(family), tmp_path / "m", root, **copy.deepcopy(config))
    structure = read_structure(folder)
    assert all(name.startswith(root) for name in structure.mtp)
    assert any("multi-token-prediction" in warning for warning in structure.warnings)
    assert structure.tensors.keys() == read_structure(checkpoints(family)).tensors.keys()
    plan = some_plan(structure)
    out = prune(structure, plan, tmp_path / "out", mtp=mtp)
    source, expected = load_file(folder / "model.safetensors"), expected_bytes(folder, plan)
    main = {k: v for k, v in expected.items() if not k.startswith(root)}
    after = json.loads((out / "config.json").read_text())
    if mtp == "drop":
        assert written(out) == main
        values = {k: after[k] for k in config}
        assert values in (
            {"num_nextn_predict_layers": 0},
            {"mtp_num_hidden_layers": 0, "mtp_layer_types": [], "use_mtp": False},
        )
        size = sum(len(v[2]) for v in main.values())
        facts = inspect(folder)
        assert facts["mtp_bytes"] == sum(len(raw(v)[2]) for k, v in source.items() if k.startswith(root))
        assert structure.num_bytes(6) == size
        assert read_structure(out).mtp == {}
    else:
        kept, twins = plan.layers[-1].kept, {}
        for name, tensor in source.items():
            if not name.startswith(root):
                continue
            one = EXPERT.search(name)
            if one and int(one[1]) in kept:
                twins[EXPERT.sub(f".experts.{kept.index(int(one[1]))}.", name)] = raw(tensor)
            elif not one:
                cut = name.endswith((".gate.weight", "e_score_correction_bias"))
                twins[name] = raw(tensor[kept] if cut else tensor)
        assert written(out) == main | twins
        assert {k: after[k] for k in config} == config
        assert read_structure(out).mtp.keys() == twins.keys()
    assert json.loads((out / "moecover.json").read_text())["mtp"] == mtp


def test_mtp_layers_without_experts_stay(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(checkpoints("mixtral"), folder)
    tensors = load_file(folder / "model.safetensors") | {"model.mtp.0.mlp.up_proj.weight": torch.rand(4, 4)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, num_nextn_predict_layers=1)
    structure = read_structure(folder)
    assert structure.mtp == {}
    out = prune(structure, some_plan(structure), tmp_path / "out")
    assert raw(tensors["model.mtp.0.mlp.up_proj.weight"]) == written(out)["model.mtp.0.mlp.up_proj.weight"]
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_the_flag(checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, config = MTP["deepseek_v3"]
    folder = with_mtp(checkpoints("deepseek_v3"), tmp_path / "m", root, **config)
    some_plan(read_structure(folder)).save(tmp_path / "plan.json")
    command = ["prune", str(folder), "--plan", str(tmp_path / "plan.json"), "-o", str(tmp_path / "out")]
    assert cli.main([*command, "--mtp", "prune"]) == 0
    assert "multi-token-prediction" in capsys.readouterr().err
    assert any(name.startswith(root) for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert cli.main([*command, "--overwrite"]) == 0
    assert not any(name.startswith(root) for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert cli.main(["verify", str(folder), str(tmp_path / "out")]) == 0


def test_no_other_setting_is_switched_off() -> None:
    config = {
        "num_mtp_modules": 3,
        "mtp_loss_scaling_factor": 0.1,
        "num_hidden_layers": 4,
        "text_config": {"mtp_num_layers": 2},
        "mtp_config": {"x": 1},
    }
    assert without_mtp(config) == {**config, "num_mtp_modules": 0, "text_config": {"mtp_num_layers": 0}}
