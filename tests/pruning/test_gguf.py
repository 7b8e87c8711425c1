"""Pruned GGUF files: kept experts' bytes and everything else are the original's, as the `gguf` package reads them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from moecover.checkpoints.gguf_layout import ARCHITECTURES
from moecover.checkpoints.structure import read_structure
from moecover.checkpoints.topology import Topology
from moecover.errors import InputError, MoecoverError
from moecover.files.resumable import partial_folder
from moecover.gguf.parts import open_gguf
from moecover.gguf.types import BLOCK_TYPES
from moecover.planning.artifact import Plan
from moecover.pruning import shards as shards_module
from moecover.pruning.job import prune
from moecover.verification.job import verify
from tests.support.command_line import run
from tests.support.gguf_files import (
    BIASES,
    EXPERTS,
    HIDDEN,
    LAYERS,
    TOP_K,
    fields_of,
    plan_for,
    shapes_of,
    tensors_of,
    write_gguf,
)

KEPT = [[0, 2, 5], [1, 3, 4]]
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def cut_by_hand(before: Tensors, kept: Sequence[Sequence[int]] = KEPT, layers: Sequence[int] = LAYERS) -> Tensors:
    """What should be left: rows of the first axis, by numpy."""
    after = dict(before)
    for name, (kind, shape, raw) in before.items():
        part = name.split(".", 2)
        of_experts = part[0] == "blk" and ("_exps." in part[2] or part[2].startswith(("ffn_gate_inp.", "exp_probs_b")))
        if of_experts and "norm" not in name:
            ids = kept[layers.index(int(part[1]))]
            rows = np.frombuffer(raw, np.uint8).reshape(shape[0], -1)[list(ids)]
            after[name] = (kind, (len(ids), *shape[1:]), rows.tobytes())
    return after


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_architecture_by_its_own_table(tmp_path: Path, arch: str) -> None:
    model = write_gguf(tmp_path / "m.gguf", arch, shapes_of(arch))
    out = prune(model, plan_for(KEPT), tmp_path / "half.gguf", progress=False).output
    assert tensors_of(out) == cut_by_hand(tensors_of(model))
    before, after = fields_of(model), fields_of(out)
    changed = {key for key in before if before[key] != after.get(key)}
    assert changed == {f"{arch}.expert_count"}
    assert after[f"{arch}.expert_count"] == 3
    assert after.keys() - before.keys() == {
        "moecover.version",
        "moecover.source.name",
        "moecover.source.expert_count",
        "moecover.plan",
        "moecover.kept",
    }
    assert json.loads(after["moecover.kept"]) == [[1, KEPT[0]], [2, KEPT[1]]]
    found = verify(model, out, progress=False)
    assert (found.equal, found.changed_tensors) == (True, [])


@pytest.mark.parametrize("kind", [kind for kind in BLOCK_TYPES.values() if kind.name not in ("F64", "I64")])
def test_every_block_type_is_cut_as_stored(tmp_path: Path, kind: tuple[str, int, int]) -> None:
    """Three experts of odd sizes, so that data must be padded; an alignment of 64 is kept."""
    name, block, _ = kind
    shapes = {f"blk.1.{part}.weight": (EXPERTS, 3, block) for part in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")}
    shapes = {**shapes, "blk.1.ffn_gate_inp.weight": (EXPERTS, HIDDEN), "output_norm.weight": (HIDDEN,)}
    model = write_gguf(tmp_path / "m.gguf", "olmoe", shapes, types={"_exps": name}, alignment=64)
    plan = plan_for(KEPT[:1], layers=[1])
    out = prune(model, plan, tmp_path / "half.gguf", progress=False).output
    assert tensors_of(out) == cut_by_hand(tensors_of(model), layers=[1])
    assert open_gguf(out).first.alignment == 64
    assert out.stat().st_size % 64 == 0
    assert verify(model, out, progress=False).equal


def test_biases_scales_and_a_split_model(tmp_path: Path) -> None:
    """As many parts, with the bytes of the whole file."""
    shapes = shapes_of("gpt-oss")
    shapes |= {f"blk.{n}.{name}": shape for n in LAYERS for name, shape in BIASES.items()}
    shapes |= {f"blk.{n}.ffn_down_exps.scale": (EXPERTS,) for n in LAYERS}
    shapes |= {f"blk.{n}.ffn_gate_inp.scale": (HIDDEN,) for n in LAYERS}
    types = {"exps.weight": "MXFP4"}
    whole = write_gguf(tmp_path / "m.gguf", "gpt-oss", shapes, types=types)
    first = write_gguf(tmp_path / "s.gguf", "gpt-oss", shapes, types=types, parts=4)
    one = prune(whole, plan_for(KEPT), tmp_path / "one.gguf", progress=False).output
    expected = cut_by_hand(tensors_of(whole))
    expected |= {f"blk.{n}.ffn_gate_inp.scale": tensors_of(whole)[f"blk.{n}.ffn_gate_inp.scale"] for n in LAYERS}
    assert tensors_of(one) == expected
    out = prune(first, plan_for(KEPT), tmp_path / "half.gguf", progress=False).output
    assert out == tmp_path / "half-00001-of-00004.gguf"
    parts = sorted(tmp_path.glob("half*.gguf"))
    assert len(parts) == 4
    assert {name: t for part in parts for name, t in tensors_of(part).items()} == expected
    assert [list(tensors_of(p)) for p in parts] == [list(tensors_of(p)) for p in sorted(tmp_path.glob("s-*"))]
    assert fields_of(parts[0])["gpt-oss.expert_count"] == 3
    assert verify(first, out, progress=False).equal


def test_a_nextn_layer_keeps_the_ids_of_the_last(tmp_path: Path) -> None:
    shapes = shapes_of("glm4moe", layers=(1, 2, 3))
    model = write_gguf(tmp_path / "m.gguf", "glm4moe", shapes, keys={"block_count": 4, "nextn_predict_layers": 1})
    structure = read_structure(model)
    assert structure.topology.decoder_layers == LAYERS
    assert structure.topology.num_layers == 3
    assert "blk.3 predicts further tokens" in structure.warnings[0]
    out = prune(model, plan_for(KEPT), tmp_path / "half.gguf", progress=False).output
    assert tensors_of(out) == cut_by_hand(tensors_of(model), [*KEPT, KEPT[1]], (1, 2, 3))
    assert verify(model, out, progress=False).equal


def test_the_plan_of_the_original_fits_and_that_of_another_shape_does_not(tmp_path: Path) -> None:
    """Groups, top-k and hidden size are part of the fingerprint; the family's name is llama.cpp's own."""
    groups = {"expert_group_count": 2, "expert_group_used_count": 1}
    model = write_gguf(tmp_path / "m.gguf", "deepseek2", keys=groups)
    original = Topology("deepseek_v3", LAYERS, EXPERTS, TOP_K, HIDDEN, 3, 2, 1)
    kept = [[0, 2, 3, 5], [1, 2, 3, 4]]
    plan = plan_for(kept, topology_fingerprint=original.fingerprint, model_fingerprint="of bf16", model="original")
    assert prune(model, plan, tmp_path / "half.gguf", progress=False).num_bytes < model.stat().st_size
    for field, value in (("top_k", 3), ("hidden_size", 64), ("num_groups", 1), ("num_layers", 4), ("num_experts", 8)):
        other = dataclasses.replace(original, **{field: value})
        wrong = plan.model_copy(update={"topology_fingerprint": other.fingerprint})
        with pytest.raises(InputError, match="the plan was made for another model"):
            prune(model, wrong, tmp_path / "other.gguf", progress=False)
    with pytest.raises(InputError, match="Every group must keep the same number"):
        prune(model, plan_for([[0, 1, 2, 3], kept[1]]), tmp_path / "other.gguf", progress=False)


WITH = shapes_of("qwen3moe")
UNFIT: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, int], str]] = {
    "dense": ({"output.weight": (8,)}, {"expert_count": 0}, "'qwen3moe' has no routed experts"),
    "no tensors": ({"output.weight": (8,)}, {}, "has no tensors of routed experts"),
    "no router": (
        {name: shape for name, shape in WITH.items() if name != "blk.2.ffn_gate_inp.weight"},
        {},
        "blk.2 has experts but no ffn_gate_inp.weight",
    ),
    "another count": (WITH, {"expert_count": 8}, r"should be that of the 8 experts"),
    "top-k": (WITH, {"expert_used_count": 7}, "expert_used_count is 7. Allowed: 1 to 6"),
    "groups": (WITH, {"expert_group_count": 4}, "4 groups of 6 experts"),
    "unlisted": ({**WITH, "blk.1.ffn_mix_exps.weight": (6, 32)}, {}, "blk.1.ffn_mix_exps.weight .* is not supported"),
    "unlisted, by its shape": ({**WITH, "blk.1.ffn_mix.weight": (32, 6)}, {}, "blk.1.ffn_mix.weight .* not supported"),
    "stacked, by its shape": ({**WITH, "blk.1.mix.weight": (6, 8, 32)}, {}, "blk.1.mix.weight .* an axis of 6"),
    "ids": ({**WITH, "blk.1.ffn_gate_tid2eid.weight": (50, 2)}, {}, "blk.1.ffn_gate_tid2eid.weight .* not supported"),
    "chunks": ({**WITH, "blk.1.ffn_up_chexps.weight": (3, 32)}, {}, "chunk experts are shared"),
    "one an expert": ({**WITH, "blk.1.ffn_up.0.weight": (8, 32)}, {}, "an early format with one tensor an expert"),
    "other shapes": ({**WITH, "blk.2.ffn_up_exps.weight": (6, 16, 32)}, {}, "a part is of another model"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, what: str) -> None:
    shapes, keys, message = UNFIT[what]
    model = write_gguf(tmp_path / "m.gguf", "qwen3moe", shapes, keys=keys)
    with pytest.raises(InputError, match=message):
        read_structure(model)


def test_an_unknown_architecture_is_cut_with_a_warning(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf", "newmoe", shapes_of("qwen3moe"))
    assert "architecture 'newmoe' is not among those whose layout is tested" in read_structure(model).warnings[0]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = write_gguf(tmp_path / "m.gguf", "qwen3moe", types={"exps": "Q8_0"}), tmp_path / "half.gguf"
    plan_for(KEPT).save(tmp_path / "plan.json")
    status, text, _ = run(capsys, "inspect", model)
    assert status == 0
    assert "6 per layer, top-2" in text
    assert "GGUF, experts of Q8_0: cut as stored; profile runs it in llama.cpp" in text
    assert text.count("llama.cpp asks for a power of two: with 5 experts ") == 1
    assert text.count("llama.cpp asks for a multiple of 256: with 32 channels K-quants ") == 1
    assert "llama.cpp asks" not in run(capsys, "inspect", model, "--for", "sglang")[1]
    assert run(capsys, "prune", model, "--plan", tmp_path / "plan.json", "-o", out)[0] == 0
    status, text, _ = run(capsys, "verify", model, out)
    assert (status, "equal: the bytes of" in text, "qwen3moe.expert_count 6 -> 3" in text) == (0, True, True)
    split = write_gguf(tmp_path / "s.gguf", "qwen3moe", parts=3)
    status, text, _ = run(capsys, "prune", split, "--plan", tmp_path / "plan.json", "-o", tmp_path / "thirds.gguf")
    assert (status, f"next: moecover verify {split} {tmp_path}/thirds-00001-of-00003.gguf" in text) == (0, True)
    for arguments, message in (
        (("prune", model, "--plan", tmp_path / "plan.json", "-o", out), "half.gguf exists"),
        (("prune", model, "--plan", tmp_path / "plan.json", "-o", model), "overlap"),
        (("prune", model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "folder"), "does not end in .gguf"),
        (
            ("prune", model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "x.gguf", "--other-weights"),
            "no use here",
        ),
        (("generate", model, "-o", tmp_path / "p.jsonl"), "which transformers does not run"),
        (("split", model, "--corpus", "web", "-o", tmp_path / "k"), "Give the folder of its original"),
        (("verify", model, out, "--tolerance", "0.1"), "--tolerance has no use here"),
        (("verify", model, model), "was not written by `moecover prune`"),
        (("inspect", tmp_path / "none.gguf"), "no file"),
        (("inspect", shutil.copy(model, tmp_path / "sha256-12")), "is a GGUF file by its content. Link it"),
        (("inspect", tmp_path), "holds no config.json. Give the file, half.gguf"),
    ):
        status, _, error = run(capsys, *arguments)
        assert (status, message in error) == (2, True), error


def test_overwriting_replaces_what_was_written_here_alone(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf", "qwen3moe")
    out = prune(model, plan_for(KEPT), tmp_path / "half.gguf", progress=False).output
    before = out.read_bytes()
    prune(model, plan_for([[0, 1], [2, 3]]), out, overwrite=True, progress=False)
    assert fields_of(out)["qwen3moe.expert_count"] == 2
    prune(model, plan_for(KEPT), out, overwrite=True, progress=False)
    assert out.read_bytes() == before
    other = write_gguf(tmp_path / "other.gguf", "qwen3moe", seed=1)
    with pytest.raises(InputError, match="was not written by moecover, so it is not overwritten"):
        prune(model, plan_for(KEPT), other, overwrite=True, progress=False)


@pytest.mark.parametrize(
    "old, new, message",
    [
        (b"tiny \xc3\xbc", b"tiny \xc3\xb6", "NOT equal: in the header general.name"),
        ("größe".encode(), "grösse".encode(), "NOT equal: in the header tokenizer.ggml.tokens"),
        (b"[[1,[0,2,5]]", b"[[1,[0,2,4]]", "NOT equal: 4 of 34 tensors, the first blk.1.ffn_down_exps.weight"),
    ],
)
def test_a_change_is_named(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    model = write_gguf(tmp_path / "m.gguf", "qwen3moe")
    out = prune(model, plan_for(KEPT), tmp_path / "half.gguf", progress=False).output
    raw = out.read_bytes()
    assert len(old) == len(new)
    assert raw.count(old) == 1
    out.write_bytes(raw.replace(old, new))
    found = verify(model, out, progress=False)
    assert (found.equal, found.summary()) == (False, message)


def test_a_changed_byte_of_the_data_is_named(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf", "qwen3moe")
    out = prune(model, plan_for(KEPT), tmp_path / "half.gguf", progress=False).output
    info = open_gguf(out).tensors["blk.2.ffn_up_exps.weight"]
    raw = bytearray(out.read_bytes())
    raw[info.end - 1] ^= 1
    out.write_bytes(raw)
    assert verify(model, out, progress=False).changed_tensors == ["blk.2.ffn_up_exps.weight"]


def interrupted(monkeypatch: pytest.MonkeyPatch, model: Path, out: Path, failing: Callable[..., None]) -> str:
    """The message of a run in which a part fails."""
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "write_shard", failing)
        with pytest.raises(MoecoverError) as caught:
            prune(model, plan_for(KEPT), out, progress=False)
    return str(caught.value)


def test_a_failed_run_leaves_nothing_or_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = shards_module.write_shard, list[Path]()

    def failing(source: Path, target: Path, *rest: object) -> None:
        calls.append(target)
        if len(calls) > 2:
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(target))
        real(source, target, *rest)  # type: ignore[arg-type]

    model, out = write_gguf(tmp_path / "m.gguf", "qwen3moe", parts=3), tmp_path / "half.gguf"
    assert "Progress is saved" in interrupted(monkeypatch, model, out, failing)
    assert not list(tmp_path.glob("half*"))
    calls.clear()
    made = prune(model, plan_for(KEPT), out, progress=False).output
    assert not partial_folder(made).exists()
    assert verify(model, made, progress=False).equal
    whole = write_gguf(tmp_path / "w.gguf", "qwen3moe")
    calls.extend([whole] * 3)
    assert "Nothing was left behind" in interrupted(monkeypatch, whole, tmp_path / "other.gguf", failing)
    assert not [path for path in tmp_path.rglob("*") if "other" in path.name]


def test_a_run_killed_between_two_renames_goes_on(tmp_path: Path) -> None:
    """The first part is renamed last; parts that have their names are taken back, and those of others are not."""
    model, out = write_gguf(tmp_path / "m.gguf", "qwen3moe", parts=3), tmp_path / "half.gguf"
    replaced = Path.replace

    def stopping(self: Path, target: Path) -> Path:
        if target.name == "half-00001-of-00003.gguf":
            raise KeyboardInterrupt
        return replaced(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            prune(model, plan_for(KEPT), out, progress=False)
    assert sorted(p.name for p in tmp_path.glob("half*")) == ["half-00002-of-00003.gguf", "half-00003-of-00003.gguf"]
    made = prune(model, plan_for(KEPT), out, progress=False).output
    assert verify(model, made, progress=False).equal
    assert not partial_folder(made).exists()


def thin_plan(blocks: Sequence[int], block: int) -> Plan:
    """The plan that keeps `KEPT` with some blocks of channels, the second expert's one further."""
    value = plan_for(KEPT).to_dict()
    for row in value["layers"]:
        row["channels"] = [[(b + n) * block + i for b in blocks for i in range(block)] for n in (0, 1, 0)]
    return Plan.model_validate({**value, "width": len(blocks) * block})


def thin_by_hand(before: Tensors, plan: Plan, block: int) -> Tensors:
    """Rows of gate and up, blocks of columns of down, by numpy."""
    after = cut_by_hand(before)
    assert plan.channels is not None
    for layer, of_layer in zip(LAYERS, plan.channels, strict=True):
        for part in ("gate_exps.weight", "up_exps.weight", "gate_up_exps.weight", "gate_exps.bias", "up_exps.bias"):
            if (name := f"blk.{layer}.ffn_{part}") in after:
                kind, shape, raw = after[name]
                parts = 2 if "gate_up" in part else 1
                rows = np.frombuffer(raw, np.uint8).reshape(3, parts, shape[1] // parts, -1)
                cut = b"".join(rows[e][:, ids].tobytes() for e, ids in enumerate(of_layer))
                after[name] = (kind, (3, parts * len(of_layer[0]), *shape[2:]), cut)
        name = f"blk.{layer}.ffn_down_exps.weight"
        kind, shape, raw = after[name]
        cells = np.frombuffer(raw, np.uint8).reshape(3, shape[1], shape[2] // block, -1)
        cut = b"".join(cells[e][:, [i // block for i in ids[::block]]].tobytes() for e, ids in enumerate(of_layer))
        after[name] = (kind, (3, shape[1], len(of_layer[0])), cut)
    return after


@pytest.mark.parametrize(
    "arch, types, blocks, block",
    [
        ("qwen3moe", {"exps": "BF16"}, [0, 3, 9, 12, 20, 21, 30, 50], 1),
        ("qwen3moe", {"down_exps": "Q8_0", "exps": "Q4_0"}, [0], 32),
        ("qwen3moe", {"1.ffn_down_exps": "Q8_0", "2.ffn_down_exps": "BF16"}, [0], 32),
        ("gpt-oss", {"exps.weight": "MXFP4"}, [0], 32),
        ("qwen35moe", {}, list(range(8)), 1),
    ],
)
def test_thin_experts(tmp_path: Path, arch: str, types: dict[str, str], blocks: list[int], block: int) -> None:
    shapes = {name: shape for name, shape in shapes_of(arch).items() if "shexp" not in name}
    if arch == "gpt-oss":
        shapes |= {f"blk.{n}.{name}": shape for n in LAYERS for name, shape in BIASES.items()}
    model, plan = write_gguf(tmp_path / "m.gguf", arch, shapes, types=types), thin_plan(blocks, block)
    out = prune(model, plan, tmp_path / "thin.gguf", progress=False).output
    assert tensors_of(out) == thin_by_hand(tensors_of(model), plan, block)
    fields = fields_of(out)
    assert (fields[f"{arch}.expert_count"], fields[f"{arch}.expert_feed_forward_length"]) == (3, len(blocks) * block)
    assert verify(model, out, progress=False).equal


@pytest.mark.parametrize(
    "arch, types, message",
    [
        ("qwen3moe", {"exps": "Q8_0"}, "quantised in blocks of 32 channels. Make the plan with channel_groups=32"),
        ("deepseek2", {}, "the shared expert is sized by the width of the routed ones: prune the original"),
    ],
)
def test_a_width_that_cannot_be_cut_is_refused_with_the_way_out(
    tmp_path: Path, arch: str, types: dict[str, str], message: str
) -> None:
    model = write_gguf(tmp_path / "m.gguf", arch, types=types)
    with pytest.raises(InputError, match=message):
        prune(model, thin_plan(range(8), 1), tmp_path / "half.gguf", progress=False)
    assert not list(tmp_path.glob("*half*"))


def test_a_card_lies_beside_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With licence, sizes, method and command; a text that is no card is never replaced."""
    about = {
        "general.license": "apache-2.0",
        "general.base_model.0.repo_url": "https://huggingface.co/some-one/a.model",
    }
    source = write_gguf(tmp_path / "model.gguf", "qwen3moe", strings=about)
    chosen, output, card = tmp_path / "plan.json", tmp_path / "half it.gguf", tmp_path / "half it.md"
    plan_for([[0, 1, 2], [3, 4, 5]], method="tb-coverage").save(chosen)
    command = ["prune", source, "--plan", chosen, "-o", output]
    status, _, err = run(capsys, *command)
    assert status == 0, err
    text = card.read_text()
    assert text.startswith(
        "---\nlibrary_name: gguf\ntags: [moe, expert-pruning, moecover]\nbase_model: some-one/a.model\n"
        "base_model_relation: quantized\nlicense: apache-2.0\n---\n"
    )
    assert "# model.gguf, 3 of 6 experts" in text
    assert "| routed experts per MoE layer | 6 | 3 |" in text
    assert "moecover verify model.gguf 'half it.gguf'" in text
    assert "llama-server -m 'half it.gguf'" in text
    assert "moecover.json" not in text
    assert "moecover prune model.gguf --plan plan.json -o 'half it.gguf'" in text
    assert "llama-server --hf-repo your-name/model-3-experts-GGUF --hf-file 'half it.gguf'" in text
    assert str(tmp_path) not in text
    output.unlink()
    assert run(capsys, *command)[0] == run(capsys, *command, "--overwrite")[0] == 0
    card.write_text("my notes")
    status, _, err = run(capsys, *command, "--overwrite")
    assert (status, "exists and is no card of moecover" in err, card.read_text()) == (2, True, "my notes")
