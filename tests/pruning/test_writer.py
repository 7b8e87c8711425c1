"""Checkpoint surgery: bytes, layout, configuration, manifest, and what is refused or left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from moecover.checkpoints.config_edit import NewCount, edited_config, expert_count_keys
from moecover.checkpoints.header import TensorEntry, read_header
from moecover.checkpoints.inspection import inspect
from moecover.checkpoints.pieces import piece
from moecover.checkpoints.source import open_checkpoint
from moecover.checkpoints.structure import read_structure
from moecover.checkpoints.topology import ExpertTensor
from moecover.errors import InputError, MoecoverError
from moecover.planning.run import plan
from moecover.profiling.run import profile
from moecover.pruning import shards as checkpoint_module
from moecover.pruning.writer import prune
from moecover.verification.verify import verify
from tests.conftest import hand_plan, random_corpus


def quarter(structure):
    topology = structure.topology
    return hand_plan(structure, [list(range(1, topology.top_k + 1))] * len(topology.decoder_layers))


def test_every_remaining_tensor_is_byte_for_byte_the_original(
    checkpoints: Callable[..., Path], family: str, tmp_path: Path
) -> None:
    structure = read_structure(checkpoints(family))
    chosen = quarter(structure)
    cut = load_file(prune(structure, chosen, tmp_path / "cut") / "model.safetensors")
    whole = load_file(structure.checkpoint.path / "model.safetensors")
    seen = set()
    for name, tensor in cut.items():
        match = re.search(r"\.layers\.(\d+)\..*\.experts\.(\d+)\.", name)
        if match:
            source = name.replace(f".experts.{match[2]}.", f".experts.{int(match[2]) + 1}.")  # kept are 1 to k
        else:
            source = name
        expected = whole[source]
        if re.search(r"(mlp|moe)\.gate\.weight$", name):
            expected = expected[1 : chosen.keep + 1]
        assert torch.equal(tensor, expected), name
        seen.add(source)
    dropped = set(whole) - seen
    assert all(re.search(r"\.experts\.(0|\d+)\.", name) for name in dropped)
    assert len(dropped) == 3 * (structure.topology.num_experts - chosen.keep) * len(chosen.layers)


def test_config_is_edited_in_place_and_nothing_else(
    checkpoints: Callable[..., Path], family: str, tmp_path: Path
) -> None:
    structure = read_structure(checkpoints(family))
    cut = prune(structure, quarter(structure), tmp_path / "cut")
    before = (structure.checkpoint.path / "config.json").read_text().splitlines()
    after = (cut / "config.json").read_text().splitlines()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert len(changed) == 1
    assert str(structure.topology.num_experts) in changed[0][0]
    assert str(structure.topology.top_k) in changed[0][1]


def test_odd_spelling_of_config_survives() -> None:
    def edit(text: str) -> str:
        return edited_config(
            text, [NewCount((("num_local_experts",),), 6, 3)], settings=lambda value: value, drop_mtp=False
        )

    text = '{"num_local_experts"  :\t6,\n "eps": 1e-06, "big": 1E5, "note": "num_local_experts: 6"}'
    assert edit(text) == text.replace(":\t6", ":\t3")
    nested = '{"num_local_experts": 6, "other": {"num_local_experts": 6}}'
    assert json.loads(edit(nested)) == {
        "num_local_experts": 3,
        "other": {"num_local_experts": 6},
    }


def test_count_keys_in_nested_configs() -> None:
    config = {"text_config": {"num_experts": 8}, "vision_config": {"num_experts": 1}, "other": {"num_experts": 4}}
    assert expert_count_keys(config) == {("text_config", "num_experts"): 8}
    assert expert_count_keys({"num_experts": True, "n_routed_experts": None}) == {}


def test_slices_along_either_axis() -> None:
    entry = TensorEntry("t", "I16", (2, 5, 3), "s", 1000, 1060)
    data = torch.arange(30, dtype=torch.int16).reshape(2, 5, 3)
    raw = bytes(1000) + data.numpy().tobytes()
    for axis, kept in ((0, [1]), (1, [0, 2, 3]), (2, [2])):
        part = piece(entry, ExpertTensor(0, None, axis, False), kept)
        assert part is not None
        got = torch.frombuffer(bytearray(b"".join(raw[a:b] for a, b in part.ranges)), dtype=torch.int16)
        assert torch.equal(got.reshape(part.shape), data.index_select(axis, torch.tensor(kept)))


def test_other_files_are_copied_byte_for_byte_and_other_weights_are_not(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "m"
    shutil.copytree(checkpoints("olmoe"), source)
    (source / "chat_template.jinja").write_bytes(b"{{ x }}\r\n\xff")
    (source / "modeling_extra.py").write_text("raise SystemExit('must never run')")
    (source / "assets").mkdir()
    (source / "assets" / "note.txt").write_text("n")
    (source / ".cache").mkdir()
    (source / ".cache" / "x").write_text("hidden")
    (source / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- x\n---\n# The original\n")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "consolidated.safetensors").write_bytes(b"whole model")
    structure = read_structure(source)
    cut = prune(structure, quarter(structure), tmp_path / "cut", command="moecover prune x")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "modeling_extra.py",
        "assets/note.txt",
    ):
        assert (cut / name).read_bytes() == (source / name).read_bytes(), name
    assert (cut / "README.original.md").read_bytes() == (source / "README.md").read_bytes()
    card = (cut / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "moecover prune x" in card
    for name in ("pytorch_model.bin", "consolidated.safetensors", ".cache"):
        assert not (cut / name).exists()
    assert json.loads((cut / "moecover.json").read_text())["left_out"] == [
        "consolidated.safetensors",
        "pytorch_model.bin",
    ]


def test_manifest_holds_mapping_plan_and_hashes(checkpoints: Callable[..., Path], family: str, tmp_path: Path) -> None:
    structure = read_structure(checkpoints(family))
    profiled = profile(structure, [random_corpus("a", seed=1), random_corpus("b", seed=2)])
    chosen = plan(profiled, keep=structure.topology.num_experts - 1)
    cut = prune(structure, chosen, tmp_path / "cut")
    manifest = json.loads((cut / "moecover.json").read_text())
    assert manifest["source"]["fingerprint"] == structure.model_fingerprint == profiled.model["fingerprint"]
    assert manifest["plan"] == json.loads(json.dumps(chosen.to_dict()))
    for row, layer in zip(manifest["experts"], chosen.layers, strict=True):
        assert row["decoder_layer"] == layer.decoder_layer
        assert row["old_to_new"] == {str(old): new for new, old in enumerate(layer.kept)}
    files = {p.relative_to(cut).as_posix() for p in cut.rglob("*") if p.is_file()} - {"moecover.json"}
    assert set(manifest["files"]) == files
    assert manifest["hash"] == "xxh3_128"
    for name, digest in manifest["files"].items():
        assert xxhash.xxh3_128((cut / name).read_bytes()).hexdigest() == digest


def test_shard_metadata_and_alignment_are_kept(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    structure = read_structure(checkpoints("qwen2_moe", shards=True))
    cut = prune(structure, quarter(structure), tmp_path / "cut")
    for shard in sorted(p.name for p in cut.glob("*.safetensors")):
        entries, metadata = read_header(cut / shard)
        assert metadata == structure.checkpoint.shard_metadata[shard]
        assert struct.unpack("<Q", (cut / shard).read_bytes()[:8])[0] % 8 == 0
        assert entries


def test_shards_in_any_order_and_tied_embeddings(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """Tensors of a layer, of an expert even, spread over shards in an order of no layer; no head of its own."""
    source, folder = checkpoints("qwen2_moe", tie_word_embeddings=True), tmp_path / "m"
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, key=lambda name: hashlib.sha256(name.encode()).digest())
    parts = {f"part-{i}.safetensors": names[i::3] for i in range(3)}
    for shard, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / shard, metadata={"format": "pt", "part": shard})
    index = {
        "metadata": {"total_size": 1, "total_parameters": 1, "made_by": "somebody"},
        "weight_map": {name: shard for shard, held in parts.items() for name in held},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    structure = read_structure(folder)
    plan = quarter(structure)
    out = prune(structure, plan, tmp_path / "out")
    assert verify(folder, out)["equal"]
    after = json.loads((out / "model.safetensors.index.json").read_text())
    written = {shard: load_file(out / shard) for shard in parts}
    assert after["weight_map"] == {name: shard for shard, held in written.items() for name in held}
    everything = [tensor for held in written.values() for tensor in held.values()]
    assert after["metadata"] == {
        "total_size": sum(t.numel() * t.element_size() for t in everything),
        "total_parameters": sum(t.numel() for t in everything),
        "made_by": "somebody",
    }
    whole = prune(read_structure(source), plan, tmp_path / "whole")  # the same, cut from one file
    expected = load_file(whole / "model.safetensors")
    found = {name: tensor for held in written.values() for name, tensor in held.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert read_header(out / "part-1.safetensors")[1] == {"format": "pt", "part": "part-1.safetensors"}


def test_pruning_a_pruned_checkpoint(
    checkpoints: Callable[..., Path], pruned: Callable[..., Path], tmp_path: Path
) -> None:
    once = pruned("qwen2_moe")
    structure = read_structure(once)
    assert structure.topology.num_experts == 6
    twice = prune(structure, quarter(structure), tmp_path / "twice")
    assert verify(once, twice)["equal"]
    assert not (twice / "README.original.md").exists()  # the card that we wrote is not passed on as the original
    assert (twice / "moecover.json").read_text() != (once / "moecover.json").read_text()


# ------------------------------------------------------------------------------------------------ outputs and crashes
def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_output_that_exists_is_refused_and_overwritten_only_when_ours(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    structure = read_structure(checkpoints("mixtral"))
    chosen = quarter(structure)
    out = prune(structure, chosen, tmp_path / "out")
    with pytest.raises(InputError, match=r"out exists. Choose another output, or give overwrite"):
        prune(structure, chosen, out)
    prune(structure, chosen, out, overwrite=True)
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="was not written by moecover"):
        prune(structure, chosen, foreign, overwrite=True)
    assert leftovers(tmp_path) == ["home", "out"]


def test_output_inside_or_around_the_model_is_refused(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints("mixtral"), tmp_path / "a" / "m")
    structure = read_structure(tmp_path / "a" / "m")
    for out in (tmp_path / "a" / "m", tmp_path / "a" / "m" / "out", tmp_path / "a"):
        with pytest.raises(InputError, match="overlap"):
            prune(structure, quarter(structure), out, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "a" / "m")
    with pytest.raises(InputError, match="overlap"):
        prune(structure, quarter(structure), link, overwrite=True)


def failing_after(count: int, failure: BaseException, real: Callable[..., None]) -> Callable[..., None]:
    """`write_shard` that leaves half a shard and fails once ``count`` are written."""
    calls: list[Path] = []

    def failing(source: Path, target: Path, *args: object) -> None:
        calls.append(target)
        if len(calls) > count:
            target.write_bytes(b"half")
            raise failure
        real(source, target, *args)

    return failing


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 3])
def test_a_failure_midway_leaves_what_was_finished_and_what_was_there(
    checkpoints: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    existed: bool,
    failure: BaseException,
    after: int,
) -> None:
    structure = read_structure(checkpoints("mixtral", shards=True))
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    if existed:
        prune(structure, quarter(structure), out)
        before = contents(out)
    real = checkpoint_module.write_shard
    monkeypatch.setattr(checkpoint_module, "write_shard", failing_after(after, failure, real))
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else MoecoverError
    with pytest.raises(expected) as caught:
        prune(structure, quarter(structure), out, overwrite=True)
    said = "".join(caught.value.__notes__) if expected is KeyboardInterrupt else str(caught.value)
    if expected is MoecoverError:
        assert "No space left on device; free some space or choose another folder. " in said
        assert partial.exists() == bool(after)  # what was copied when the disk was full is finished
    if partial.exists():
        assert f"Progress is saved in {partial}; rerun the same command to resume" in said
    else:
        assert "Nothing was left behind" in said
    assert leftovers(tmp_path) == [*([".out.partial"] if partial.exists() else []), *(["out"] if existed else [])]
    if existed:
        assert contents(out) == before
    monkeypatch.setattr(checkpoint_module, "write_shard", real)
    lines: list[str] = []
    prune(structure, quarter(structure), out, overwrite=True, say=lines.append)
    if expected is MoecoverError and after:
        assert lines == [f"resuming: 3 of {len(list(out.glob('*.safetensors')))} shards are there"]
    assert leftovers(tmp_path) == ["out"]
    assert contents(out) == contents(prune(structure, quarter(structure), tmp_path / "at once"))


def test_not_enough_room_is_said_before_writing(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    structure = read_structure(checkpoints("mixtral"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10, used=9, free=1))
    with pytest.raises(MoecoverError, match=r"needs 0.00 GB, .* has 0.00 GB free"):
        prune(structure, quarter(structure), tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_source_that_changes(checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "m"
    shutil.copytree(checkpoints("mixtral"), source)
    structure, shard, real = read_structure(source), source / "model.safetensors", checkpoint_module.write_shard
    content = shard.read_bytes()

    def changing(change: Callable[[], object], *, first: bool) -> Callable[..., None]:
        def changed(*arguments: object) -> None:
            if first:
                change()
            real(*arguments)
            change()

        return changed

    for change, first, message in (
        (
            lambda: os.truncate(shard, 50_000),
            True,
            r"model.safetensors ended at byte \d+, \d+ is needed: it changed while",
        ),
        (lambda: shard.write_bytes(content[::-1]), False, "model.safetensors changed while it was read"),
        (shard.unlink, False, "model.safetensors: No such file or directory"),
    ):
        monkeypatch.setattr(checkpoint_module, "write_shard", changing(change, first=first))
        with pytest.raises(MoecoverError, match=rf"{message}.*\. Nothing was left behind$"):
            prune(structure, quarter(structure), tmp_path / "out")
        shard.write_bytes(content)
    monkeypatch.undo()
    tensors = load_file(shard)
    # The header too: another tensor's place, or only the metadata.
    for changed, form in ((tensors | {"lm_head.weight": torch.zeros(7)}, "pt"), (tensors, "np")):
        save_file(changed, shard, metadata={"format": form})
        with pytest.raises(InputError, match=r"changed after it was read\. Start again"):
            prune(structure, quarter(structure), tmp_path / "out")
        shard.write_bytes(content)
    shard.unlink()
    with pytest.raises(MoecoverError, match=r"reading .*: .*model.safetensors: No such file.*\. Nothing was written"):
        prune(structure, quarter(structure), tmp_path / "out")
    assert leftovers(tmp_path) == ["m"]


def test_neighbours_of_the_output_are_left_alone(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    structure = read_structure(checkpoints("mixtral"))
    for name in ("out.partial", "out.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    prune(structure, quarter(structure), tmp_path / "out")
    assert leftovers(tmp_path) == ["out", "out.partial", "out.replaced"]
    monkeypatch.setattr(checkpoint_module, "write_shard", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prune(structure, quarter(structure), tmp_path / "deep" / "er" / "out")
    assert leftovers(tmp_path) == ["out", "out.partial", "out.replaced"]
    assert leftovers(tmp_path / "out.partial") == ["mine"]


def test_output_behind_a_link(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    structure = read_structure(checkpoints("mixtral"))
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")  # dangling at first
    prune(structure, quarter(structure), tmp_path / "link")
    assert (tmp_path / "disk" / "out" / "moecover.json").is_file()
    before = (tmp_path / "disk" / "out").stat().st_ino
    prune(structure, quarter(structure), tmp_path / "link", overwrite=True)
    assert (tmp_path / "disk" / "out").stat().st_ino != before
    assert leftovers(tmp_path) == ["disk", "link"]
    assert leftovers(tmp_path / "disk") == ["out"]


def test_a_mount_point_is_refused(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    structure = read_structure(checkpoints("mixtral"))
    monkeypatch.setattr(Path, "is_mount", lambda self: True)
    with pytest.raises(InputError, match="is a mount point"):
        prune(structure, quarter(structure), tmp_path / "out")


# ------------------------------------------------------------------------------------------------------- bad sources
@pytest.fixture
def broken(checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    """A sharded checkpoint that a test may damage."""
    target = tmp_path / "broken"
    shutil.copytree(checkpoints("qwen2_moe", shards=True), target)
    return target


def some_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[2]


def test_missing_folder_and_file() -> None:
    with pytest.raises(InputError, match=r"no folder \./nowhere"):
        open_checkpoint("./nowhere")
    with pytest.raises(InputError, match="is a file"):
        open_checkpoint(__file__)


def test_config_without_weights(broken: Path) -> None:
    for path in broken.glob("model*"):
        path.unlink()
    (broken / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"has a config.json but no weights.*pytorch_model.bin is not read"):
        open_checkpoint(broken)
    (broken / "config.json").unlink()
    with pytest.raises(InputError, match="holds no config.json"):
        open_checkpoint(broken)


def test_shard_missing(broken: Path) -> None:
    some_shard(broken).unlink()
    with pytest.raises(InputError, match=r"model-00003-of-\d+.safetensors is missing, .*index.json names it"):
        open_checkpoint(broken)


@pytest.mark.parametrize("size", [0, 5, 100, -1, 1])
def test_truncated_or_overlong_shard(broken: Path, size: int) -> None:
    shard = some_shard(broken)
    content = shard.read_bytes()
    shard.write_bytes(content + b"\0" if size == 1 else content[:size])
    with pytest.raises(InputError, match=r"model-00003.*(is truncated|no valid safetensors header)"):
        open_checkpoint(broken)


def test_header_that_lies(broken: Path) -> None:
    shard = some_shard(broken)
    content = shard.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = next(k for k in header if k != "__metadata__")
    for edit, message in (
        (lambda t: t.update(shape=[1, *t["shape"], 7]), "but the header gives it bytes"),
        (lambda t: t.update(dtype="F99"), "unknown type F99"),
        (lambda t: t.pop("shape"), "no valid safetensors header"),
        (lambda t: t.update(dtype=[]), "unknown type"),
        (lambda t: t.update(shape=["x"]), "no valid safetensors header"),
        (lambda t: t.update(shape=[-2, -3]), "no valid safetensors header"),
        (lambda t: t.update(data_offsets=[0, "9"]), "no valid safetensors header"),
        (lambda t: t.update(data_offsets=[0]), "no valid safetensors header"),
    ):
        changed = json.loads(json.dumps(header))
        edit(changed[name])
        raw = json.dumps(changed).encode()
        shard.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])
        with pytest.raises(InputError, match=message):
            open_checkpoint(broken)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors", "x.bin", 7]
)
def test_file_names_from_the_index_are_not_trusted(broken: Path, name: object) -> None:
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="Only plain names that end in .safetensors are read"):
        open_checkpoint(broken)


def test_index_that_does_not_match_the_shards(broken: Path) -> None:
    path = broken / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = some_shard(broken).name
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"says that model.extra is in model-00003"):
        open_checkpoint(broken)
    path.write_text('{"weight_map": {}}')
    with pytest.raises(InputError, match="has no weight_map"):
        open_checkpoint(broken)
    path.write_text("[")
    with pytest.raises(InputError, match="is not valid JSON"):
        open_checkpoint(broken)


LAYER = "model.layers.1.mlp"


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        (
            f"{LAYER}.experts.3.up_proj.weight",
            torch.zeros(16, 31),
            r"experts.3.up_proj.weight in model.safetensors has shape \[16, 31\]",
        ),
        (
            f"{LAYER}.gate.weight",
            torch.zeros(11, 32),
            r"mlp.gate.weight in model.safetensors has shape \[11, 32\], config.json asks for \[12, 32\]",
        ),
        (
            "model.norm.weight",
            torch.zeros(31),
            r"model.norm.weight in model.safetensors has shape \[31\], config.json asks for \[32\]",
        ),
        ("model.layers.2.mlp.experts.3.up_proj.weight", None, r"needs \d+ numbers"),
        ("model.layers.2.mlp.gate.weight", None, "nothing in the files fills model.layers.2.mlp.gate.weight"),
        (f"{LAYER}.experts.12.up_proj.weight", torch.zeros(16, 32), "is of expert 12, config.json has 12"),
        (
            f"{LAYER}.experts.3.up_proj.weight",
            torch.zeros(16, 32, dtype=torch.int8),
            r"experts.3.up_proj.weight in model.safetensors has shape \[16, 32\] of I8",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config(
    checkpoints: Callable[..., Path], tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    """One tensor is replaced, or goes."""
    folder = tmp_path / "m"
    shutil.copytree(checkpoints("qwen2_moe"), folder)
    tensors = load_file(folder / "model.safetensors")
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        read_structure(folder)
    facts = inspect(folder)
    assert len(facts["refused"]) == 1
    assert re.search(message, facts["refused"][0])


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda c: c.update(model_type="llama"), "'llama' has no routed experts"),
        (lambda c: c.update(model_type="qwen9_moe"), "architecture 'qwen9_moe' is not known to transformers"),
        (lambda c: c.pop("model_type"), "architecture 'None' is not known"),
        (lambda c: c.update(model_type=["x"]), "is not known to transformers"),
        (lambda c: c.update(model_type="bert"), "bert"),
        (lambda c: c.update(num_experts=0), "no routed experts"),
        (lambda c: c.update(hidden_size="x"), "transformers cannot build 'qwen2_moe' from config.json"),
        (lambda c: c.update(n_group=4), "4 groups for 12 experts and None groups per token, which do not fit together"),
    ],
)
def test_configs_that_are_refused(broken: Path, edit, message: str) -> None:
    config = json.loads((broken / "config.json").read_text())
    edit(config)
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        read_structure(broken)


def test_inspect_counts_bytes_as_they_are(checkpoints: Callable[..., Path], family: str, tmp_path: Path) -> None:
    facts = inspect(checkpoints(family))
    structure = read_structure(checkpoints(family))
    assert facts["refused"] == []
    assert facts["moe_layers"] == list(structure.topology.decoder_layers)
    for row in facts["sizes"]:
        chosen = hand_plan(structure, [list(range(row["keep"]))] * len(facts["moe_layers"]))
        cut = open_checkpoint(prune(structure, chosen, tmp_path / str(row["percent"])))
        assert cut.num_bytes == row["bytes"]
    assert facts["shared_experts"] == (1 if family == "qwen2_moe" else 0)


def test_fused_tensors_on_disk_are_sliced(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """A checkpoint that stacks its experts in one tensor (as some hub files do) takes the same path."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints("qwen3_moe"))
    source = tmp_path / "fused"
    shutil.copytree(checkpoints("qwen3_moe"), source)
    (source / "model.safetensors").unlink()
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    structure = read_structure(source)
    assert {t.axis for t in structure.tensors.values()} == {0}
    cut = prune(structure, quarter(structure), tmp_path / "cut")
    assert verify(source, cut)["equal"]


def test_damaged_manifest(checkpoints: Callable[..., Path], pruned: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(pruned("mixtral"), folder)
    for text in ("{", "[]", '{"plan": {}, "files": {}}'):
        (folder / "moecover.json").write_text(text)
        with pytest.raises(InputError, match="is damaged"):
            verify(checkpoints("mixtral"), folder)
