"""Cached layouts: what was derived before is returned exactly or not at all."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecover.checkpoints import structure_cache
from moecover.checkpoints.derivation import derive
from moecover.checkpoints.source import Checkpoint, open_checkpoint
from moecover.checkpoints.structure import read_structure
from moecover.checkpoints.structure_cache import (
    content_hash,
    installed_version,
    place_of,
    recall,
    remember,
    source_hash,
)
from moecover.checkpoints.topology import ExpertLayout
from tests.support.quantised import LAYOUTS, MTP, quantise, set_config, with_mtp


def mtp_checkpoint(checkpoints: Callable[..., Path], folder: Path) -> Path:
    root, config = MTP["deepseek_v3"]
    return with_mtp(checkpoints("deepseek_v3"), folder, root, **copy.deepcopy(config))


def derived(folder: Path) -> tuple[Checkpoint, ExpertLayout]:
    checkpoint = open_checkpoint(folder)
    return checkpoint, derive(checkpoint)


@pytest.fixture(params=["qwen2_moe", "olmoe", "deepseek_v3", "gpt_oss", "fp8", "gptq", "mtp", "fp8 with mtp"])
def model(request: pytest.FixtureRequest, checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of many kinds: stacked experts, router groups, quantised, multi-token-prediction layers."""
    what = str(request.param)
    if what in LAYOUTS:
        return quantise(checkpoints("mixtral"), tmp_path / "quantised", what)
    if "mtp" in what:
        folder = mtp_checkpoint(checkpoints, tmp_path / "mtp")
        return quantise(folder, tmp_path / "both", "fp8") if "fp8" in what else folder
    return checkpoints(what)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "structures" / "place.json"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not loaded transformers."""
    monkeypatch.delitem(sys.modules, "transformers")


def same(one: ExpertLayout | None, two: ExpertLayout) -> bool:
    """Equal, in the same order too: the order of the files is the order of the work."""
    if one is None or one != two:
        return False
    pairs = [(one.tensors.experts, two.tensors.experts), (one.tensors.mtp, two.tensors.mtp)]
    return all(list(a) == list(b) for a, b in [*pairs, (one.parameters, two.parameters)])


def test_what_is_remembered_is_what_was_derived(model: Path, place: Path) -> None:
    checkpoint, layout = derived(model)
    remember(checkpoint, layout, place)
    assert same(recall(open_checkpoint(model), place), layout)


@pytest.mark.parametrize("model", [pytest.param("qwen2_moe", marks=pytest.mark.slow), "fp8 with mtp"], indirect=True)
def test_the_next_process_needs_no_torch(model: Path, tmp_path: Path) -> None:
    """Equal numbers, and equal to what a process that has loaded transformers derives."""
    fields = ("topology", "tensors", "parameters", "experts_modules", "count_keys", "mtp", "quantised", "warnings")
    code = (
        "import sys; from moecover import read_structure; s = read_structure(sys.argv[1])\n"
        f"print('torch' in sys.modules, *(getattr(s, name) for name in {fields}))"
    )
    environment = os.environ | {"MOECOVER_CACHE": str(tmp_path / "cache")}
    printed = [
        subprocess.run(
            [sys.executable, "-c", code, model], env=environment, check=True, capture_output=True, text=True
        ).stdout.partition(" ")
        for _ in range(2)
    ]
    s = read_structure(model)
    expected = " ".join(str(getattr(s, name)) for name in fields) + "\n"
    assert printed == [("True", " ", expected), ("False", " ", expected)]
    assert len(list((tmp_path / "cache" / "structures").iterdir())) == 1


def changed_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.bias"] = tensors.pop("model.norm.weight")


CHANGES: dict[str, Callable[[Path], Any]] = {
    "a number in the configuration": lambda folder: set_config(folder, num_experts_per_tok=3),
    "a word that nothing reads": lambda folder: set_config(folder, word="x"),
    "a type": lambda folder: changed_tensors(
        folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].bfloat16()})
    ),
    "a shape": lambda folder: changed_tensors(folder, lambda t: t.update({"model.norm.weight": torch.zeros(33)})),
    "a name": lambda folder: changed_tensors(folder, rename),
    "a tensor more": lambda folder: changed_tensors(folder, lambda t: t.update({"x": torch.zeros(1)})),
    "a quantiser's file": lambda folder: (folder / "quantize_config.json").write_text("{}"),
}


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("what", list(CHANGES))
def test_any_change_of_the_checkpoint_has_another_place(
    checkpoints: Callable[..., Path], tmp_path: Path, what: str
) -> None:
    shutil.copytree(checkpoints("mixtral"), tmp_path / "m")
    before = place_of(open_checkpoint(tmp_path / "m"))
    assert before == place_of(open_checkpoint(checkpoints("mixtral")))
    CHANGES[what](tmp_path / "m")
    assert place_of(open_checkpoint(tmp_path / "m")) not in (None, before)


@pytest.mark.usefixtures("fresh")
def test_shards_and_weights_do_not_matter(checkpoints: Callable[..., Path]) -> None:
    places = {place_of(open_checkpoint(checkpoints("mixtral", **o))) for o in ({}, {"shards": True}, {"seed": 5})}
    assert len(places) == 1


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("what", ["source_hash", "installed_version"])
def test_any_change_of_the_code_has_another_place(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    before = place_of(checkpoint)
    monkeypatch.setattr(structure_cache, what, lambda *package: "another")
    assert place_of(checkpoint) not in (None, before)
    monkeypatch.setattr(structure_cache.metadata, "version", lambda package: "another")
    assert len({before, place_of(checkpoint), None}) == 3


def test_the_code_is_identified_by_its_files(tmp_path: Path) -> None:
    for name in ("structures.py", "a.py"):
        (tmp_path / name).write_text("1")
    hashes = [source_hash(tmp_path)]
    (tmp_path / "a.py").write_text("2")
    hashes.append(source_hash(tmp_path))
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({*hashes, source_hash(tmp_path)}) == 3


def test_an_installed_package_is_identified_by_the_list_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout that is found first, or that an editable installation leads to, is not what the list says."""
    site, checkout = tmp_path / "site", tmp_path / "checkout"
    for folder in (site, checkout):
        (folder / "some_package").mkdir(parents=True)
        (folder / "some_package" / "__init__.py").write_text("raise AssertionError")
    info = site / "some_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some_package\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(site)
    with pytest.raises(ImportError):
        installed_version("some_package")
    (info / "RECORD").write_text("__editable__.some_package.pth,sha256=x,1\n")
    with pytest.raises(ImportError):
        installed_version("some_package")
    found = set()
    for digest in "xy":
        (info / "RECORD").write_text(f"some_package/__init__.py,sha256={digest},1\n")
        found.add(installed_version("some_package"))
    assert len(found) == 2
    monkeypatch.syspath_prepend(checkout)
    with pytest.raises(ImportError):
        installed_version("some_package")
    with pytest.raises(ImportError):
        installed_version("no_such_package")


def test_where_files_go(checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    assert place_of(checkpoint) is None, "transformers is loaded here, perhaps with classes of its user's"
    monkeypatch.delitem(sys.modules, "transformers")

    def parent(**environment: str) -> Path | None:
        with monkeypatch.context() as patch:
            patch.setenv("HOME", str(tmp_path / "home"))
            for name in ("MOECOVER_CACHE", "XDG_CACHE_HOME"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            place = place_of(checkpoint)
        return None if place is None else place.parent

    home = tmp_path / "home" / ".cache" / "moecover" / "structures"
    assert parent() == parent(MOECOVER_CACHE="") == parent(XDG_CACHE_HOME="relative") == home
    assert parent(XDG_CACHE_HOME=str(tmp_path)) == tmp_path / "moecover" / "structures"
    assert parent(XDG_CACHE_HOME="/x", MOECOVER_CACHE=str(tmp_path)) == tmp_path / "structures"
    assert parent(MOECOVER_CACHE="off") is None
    assert list(tmp_path.iterdir()) == [], "looking makes nothing"


def test_damage_never_gives_another_structure(model: Path, place: Path) -> None:
    checkpoint, layout = derived(model)
    remember(checkpoint, layout, place)
    text, rng = place.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(text)
        at = rng.randrange(len(damaged))
        if rng.random() < 0.5:
            damaged[at] = rng.randrange(256)
        else:
            del damaged[at : at + rng.randrange(1, 50)]
        place.write_bytes(damaged)
        assert recall(checkpoint, place) in (None, layout)
    for damaged in (
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        text[:-1],
        b" " * structure_cache.MAX_BYTES + text,
    ):
        place.write_bytes(damaged)
        assert recall(checkpoint, place) is None
    place.write_bytes(text)
    place.rename(place.with_name("other.json"))
    assert recall(checkpoint, place.with_name("other.json")) is None, "the file of another checkpoint"
    assert recall(checkpoint, place) is None


def forged(place: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a file and give it the hash of what it says now."""
    told = json.loads(place.read_text())["structure"]
    change(told)
    place.write_text(json.dumps({"sha256": content_hash(place, told), "structure": told}))


GATE, UP = "model.layers.#.mlp.gate.weight", "model.layers.#.mlp.experts.*.up_proj.weight"
FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "family": lambda t: t["topology"].update(family="mixtral"),
    "experts": lambda t: t["topology"].update(num_experts=24),
    "top-k": lambda t: t["topology"].update(top_k=13),
    "a float": lambda t: t["topology"].update(hidden_size=32.0),
    "negative": lambda t: t["topology"].update(num_layers=-3),
    "groups": lambda t: t["topology"].update(num_groups=5),
    "no groups": lambda t: t["topology"].update(num_groups=0),
    "a layer less": lambda t: t["topology"]["decoder_layers"].pop(),
    "no layers": lambda t: (t["topology"].update(decoder_layers=[]), t.update(modules=[], parameters={})),
    "a layer less, its module too": lambda t: (t["topology"]["decoder_layers"].pop(), t["modules"].pop()),
    "an unknown number": lambda t: t["topology"].update(more=1),
    "a module less": lambda t: t["modules"].pop(),
    "another module": lambda t: t.update(modules=[m.replace("experts", "others") for m in t["modules"]]),
    "no parameters": lambda t: t["parameters"].clear(),
    "a parameter elsewhere": lambda t: t["parameters"].update({"model.layers.0.x": 0}),
    "an axis of a parameter": lambda t: t["parameters"].update({t["modules"][0] + ".down_proj": None}),
    "no rule of the router": lambda t: t["rules"].pop(GATE),
    "no rule of an expert's": lambda t: t["rules"].pop(UP),
    "another axis": lambda t: t["rules"][GATE].__setitem__(0, 1),
    "an axis too far": lambda t: t["rules"][GATE].__setitem__(0, 2),
    "an axis from behind": lambda t: t["rules"][GATE].__setitem__(0, -2),
    "an axis for one expert": lambda t: t["rules"][UP].__setitem__(0, 0),
    "no axis for all": lambda t: t["rules"][GATE].__setitem__(0, None),
    "a tail": lambda t: t["rules"][GATE].__setitem__(2, 1),
    "a router that is routed": lambda t: t["rules"][GATE].__setitem__(1, True),
    "neither": lambda t: t["rules"][GATE].__setitem__(1, "yes"),
    "a short rule": lambda t: t["rules"][GATE].pop(),
    "no rules": lambda t: t.pop("rules"),
    "another form": lambda t: t.update(rules=[]),
}


@pytest.mark.parametrize("what", list(FORGERIES))
def test_what_does_not_fit_the_headers_is_not_believed(
    checkpoints: Callable[..., Path], place: Path, what: str
) -> None:
    checkpoint, layout = derived(checkpoints("qwen2_moe"))
    remember(checkpoint, layout, place)
    forged(place, lambda told: None)
    assert recall(checkpoint, place) == layout
    forged(place, FORGERIES[what])
    assert recall(checkpoint, place) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(mtp=[]),
        lambda t: t["mtp_rules"].pop(next(iter(t["mtp_rules"]))),
        lambda t: t["mtp_rules"].update(dict.fromkeys(t["mtp_rules"])),
    ],
)
def test_nor_are_layers_of_multi_token_prediction(
    checkpoints: Callable[..., Path], tmp_path: Path, place: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    checkpoint, layout = derived(mtp_checkpoint(checkpoints, tmp_path / "m"))
    remember(checkpoint, layout, place)
    assert recall(checkpoint, place) == layout
    forged(place, change)
    assert recall(checkpoint, place) is None


def test_nor_are_fewer_experts_with_places_behind_them(checkpoints: Callable[..., Path], place: Path) -> None:
    checkpoint, layout = derived(checkpoints("gpt_oss"))
    remember(checkpoint, layout, place)

    def fewer(told: dict[str, Any]) -> None:
        told["topology"]["num_experts"] = 6
        told["rules"] = {kind: [axis, routed, 2] for kind, (axis, routed, _) in told["rules"].items()}

    forged(place, lambda told: None)
    assert recall(checkpoint, place) == layout
    forged(place, fewer)
    assert recall(checkpoint, place) is None


def test_a_layout_that_the_rules_do_not_reproduce_is_not_remembered(
    checkpoints: Callable[..., Path], place: Path
) -> None:
    checkpoint, layout = derived(checkpoints("qwen2_moe"))
    name = next(iter(layout.tensors.experts))
    layout.tensors.experts.pop(name)
    remember(checkpoint, layout, place)
    assert not place.exists()


def test_files_of_others_are_not_read(
    checkpoints: Callable[..., Path], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, layout = derived(checkpoints("mixtral"))
    remember(checkpoint, layout, place)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert recall(checkpoint, place) is None


def test_a_folder_that_cannot_be_written_is_as_none(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, layout = derived(checkpoints("mixtral"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "place.json").mkdir(parents=True)
    for place in (tmp_path / "file" / "structures" / "x.json", tmp_path / "folder" / "place.json"):
        remember(checkpoint, layout, place)
        assert recall(checkpoint, place) is None
    code = "import sys; from moecover import read_structure; read_structure(sys.argv[1]); assert 'torch' in sys.modules"
    environment = os.environ | {"MOECOVER_CACHE": str(tmp_path / "file")}
    subprocess.run([sys.executable, "-c", code, checkpoints("mixtral")], env=environment, check=True)


def test_the_oldest_files_make_room(
    checkpoints: Callable[..., Path], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, layout = derived(checkpoints("mixtral"))
    monkeypatch.setattr(structure_cache, "MAX_FILES", 3)
    for number in range(5):
        remember(checkpoint, layout, place.with_name(f"{number}.json"))
        os.utime(place.with_name(f"{number}.json"), (number, number))
    assert sorted(p.name for p in place.parent.iterdir()) == ["2.json", "3.json", "4.json"]


def test_writers_and_readers_at_once(
    checkpoints: Callable[..., Path], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads finds all of a file or none, whatever is written and removed beside."""
    checkpoint, layout = derived(checkpoints("mixtral"))
    monkeypatch.setattr(structure_cache, "MAX_FILES", 2)
    places = [place.with_name(f"{number}.json") for number in range(3)]

    def work(number: int) -> list[ExpertLayout | None]:
        remember(checkpoint, layout, places[number % 3])
        return [recall(checkpoint, p) for p in places]

    with ThreadPoolExecutor(8) as pool:
        found = [one for several in pool.map(work, range(60)) for one in several]
    assert layout in found
    assert all(one in (None, layout) for one in found)
    remember(checkpoint, layout, place)
    assert recall(checkpoint, place) == layout
    assert not [p for p in place.parent.iterdir() if p.name.startswith(".")]
