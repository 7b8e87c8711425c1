"""The file of a profile, profiles that add up, and how a profile shows itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from moecover.checkpoints.structure import Structure, read_structure
from moecover.errors import InputError
from moecover.files.tensor_file import read_tensors, tensor_bytes
from moecover.planning.run import plan
from moecover.profiling.artifact import FILE, Profile
from moecover.profiling.job import merge
from moecover.profiling.merging import merged
from moecover.profiling.run import profile
from moecover.profiling.statistics import LATER, STATISTICS
from moecover.profiling.wide import CHANNELS, PAIRS, WIDE
from tests.conftest import random_corpus


def test_profiles_of_two_shards_add_up(structure: Structure) -> None:
    corpus = random_corpus(sequences=7)
    whole = profile(structure, [corpus])
    parts = profile(structure, [corpus[:3]]) + profile(structure, [corpus[3:]])
    for name in STATISTICS:
        a, b = whole.statistics["random"][name], parts.statistics["random"][name]
        if name in ("count", "num_tokens"):
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=2e-6)  # another batch shape is another rounding of float32 kernels
    assert len(parts.corpora["random"]) == 2
    both = whole + profile(structure, [random_corpus("other", seed=9)])
    assert set(both.statistics) == {"random", "other"}


def test_profiles_of_different_models_do_not_add(checkpoints: Callable[..., Path]) -> None:
    one = profile(read_structure(checkpoints("mixtral")), [random_corpus()])
    two = profile(read_structure(checkpoints("mixtral", seed=1)), [random_corpus()])
    with pytest.raises(InputError, match="different models do not add up"):
        _ = one + two


def test_saved_file_has_the_documented_layout(small_profile: Profile, tmp_path: Path) -> None:
    path = small_profile.save(tmp_path / "p")
    shape = [len(small_profile.topology.decoder_layers), small_profile.topology.num_experts]
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
        running = {f"{c}/{s}{part}" for c in "ab" for s in STATISTICS for part in ("", "/parts")}
        assert keys == running | {f"{c}/{name}" for c in "ab" for name in WIDE}
        for c in "ab":
            energy = file.get_tensor(f"{c}/{CHANNELS}")
            assert (list(energy.shape), energy.dtype) == ([*shape, small_profile.width], torch.float64)
            pairs = file.get_tensor(f"{c}/{PAIRS}")
            assert list(pairs.shape) == [2, shape[0], shape[1] * (shape[1] + 1) // 2]
        for key in running:
            tensor = file.get_tensor(key)
            assert list(tensor.shape) == ([1, *shape] if key.endswith("/parts") else shape)  # two batches, one part
            counts = {"count", "num_tokens"} & set(key.split("/"))
            assert tensor.dtype == (torch.int64 if counts else torch.float64)
    loaded = Profile.load(tmp_path / "p")
    assert loaded.fingerprint == small_profile.fingerprint
    assert loaded.topology == small_profile.topology
    np.testing.assert_array_equal(loaded.channels["b"], small_profile.channels["b"])
    assert loaded.corpora["a"][0]["sha256"] == random_corpus("a", seed=1).record["sha256"]
    assert {"torch", "transformers", "moecover", "python"} <= loaded.settings["versions"].keys()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t: t["a/norm_sum"].__setitem__((0, 0), float("nan")), "negative or non-finite"),
        (lambda t: t["a/count"].__setitem__((0, 0), -1), "negative or non-finite"),
        (lambda t: t.pop("b/max_abs"), "b/max_abs is missing"),
        (lambda t: t["b/norm_sum/parts"].fill(float("inf")), "b/norm_sum/parts holds negative"),
        (lambda t: t.pop("b/norm_sum/parts"), "b/norm_sum/parts is missing"),
        (lambda t: t.__setitem__("a/count", t["a/count"] > 0), "a/count is of type bool, int64 is needed"),
        (lambda t: t.__setitem__("a/count", t["a/count"].astype("uint8")), "a/count is of type uint8"),
        (lambda t: t.__setitem__("a/norm_sum", t["a/norm_sum"].astype("complex64")), "is of type complex64"),
        (lambda t: t.__setitem__("a/norm_sum", t["a/norm_sum"].astype("float32")), "float64 is needed"),
        (lambda t: t.__setitem__("a/norm_sum", t["a/norm_sum"][:, :2]), "a/norm_sum is of shape"),
        (lambda t: t["b/channel_energy"].__setitem__((0, 1, 2), -1e-9), "b/channel_energy holds negative"),
        (
            lambda t: t["a/channel_energy"].__setitem__((1, 0, 0), float("inf")),
            "a/channel_energy holds negative or non",
        ),
        (lambda t: t.__setitem__("a/channel_energy", t["a/channel_energy"].astype("float32")), "float64 is needed"),
        (lambda t: t.__setitem__("a/channel_energy", t["a/channel_energy"][:, 1:]), "a/channel_energy is of shape"),
        (lambda t: t.__setitem__("a/channel_energy", t["a/channel_energy"].sum(-1)), "a/channel_energy is of shape"),
        (lambda t: t.__setitem__("b/channel_energy", t["b/channel_energy"][:, :, 1:]), "b/channel_energy is of shape"),
    ],
)
def test_impossible_statistics_are_refused(small_profile: Profile, tmp_path: Path, spoil, message: str) -> None:
    path = small_profile.save(tmp_path)
    document, tensors = read_tensors(path)
    spoil(tensors)
    path.write_bytes(tensor_bytes(tensors, document))
    with pytest.raises(InputError, match=message):
        Profile.load(tmp_path)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda d: d.pop("topology"), "lacks 'topology'"),
        (lambda d: d["corpora"]["a"][0].pop("tokens"), "lacks 'tokens'"),
        (lambda d: d["corpora"]["a"][0].pop("sha256"), "lacks 'sha256'"),
        (lambda d: d["corpora"]["a"][0].__setitem__("tokens", "many"), "cannot be used"),
        (lambda d: d["corpora"].__setitem__("a", None), "cannot be used"),
        (lambda d: d["corpora"].__setitem__("pooled", d["corpora"].pop("a")), "stands for all corpora together"),
        (lambda d: d.__setitem__("settings", 5), "cannot be used"),
        (lambda d: d.__setitem__("schema", 2), "it has schema 2, this version reads 3"),
    ],
)
def test_impossible_metadata_is_refused(small_profile: Profile, tmp_path: Path, spoil, message: str) -> None:
    path = small_profile.save(tmp_path)
    document, tensors = read_tensors(path)
    spoil(document)
    path.write_bytes(tensor_bytes(tensors, document))
    with pytest.raises(InputError, match=message):
        Profile.load(tmp_path)


def test_flipped_bits_are_found_or_change_nothing(small_profile: Profile, tmp_path: Path) -> None:
    path = small_profile.save(tmp_path)
    content, rng, accepted = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        changed = bytearray(content)
        changed[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            loaded = Profile.load(tmp_path)
        except InputError:
            continue
        accepted += 1
        assert loaded.fingerprint == small_profile.fingerprint
    assert accepted <= 2  # the spaces that pad the header
    path.write_bytes(b"not a profile")
    with pytest.raises(InputError, match="cannot be used"):
        Profile.load(tmp_path)


def test_a_damaged_sample_of_inputs_is_found_when_it_is_read(structure: Structure, tmp_path: Path) -> None:
    profile(structure, [random_corpus("a", seed=1)], keep_inputs=(64, tmp_path)).save(tmp_path)
    inputs = Profile.load(tmp_path).inputs
    assert inputs is not None
    layers = [inputs.layer(layer) for layer in range(2)]
    path = tmp_path / "inputs.safetensors"
    content, rng = path.read_bytes(), np.random.default_rng(1)
    for _ in range(200):
        changed = bytearray(content)
        changed[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            found = Profile.load(tmp_path).inputs
            assert found is not None
            again = [found.layer(layer) for layer in range(2)]
            (text,) = found.sequences()
        except InputError:
            continue
        assert [[x.tolist() for x in layer] for layer in again] == [[x.tolist() for x in layer] for layer in layers]
        assert text.tokens.tobytes() == inputs.sequences()[0].tokens.tobytes()


def test_fingerprint_does_not_depend_on_versions(small_profile: Profile) -> None:
    other = dataclasses.replace(small_profile, settings={})
    assert other.fingerprint == small_profile.fingerprint


def without_channels(made: Profile, *corpora: str) -> Profile:
    """As an older version made it, for some of its corpora."""
    return dataclasses.replace(made, channels={c: v for c, v in made.channels.items() if c not in corpora})


def test_a_profile_of_an_older_version(small_profile: Profile, tmp_path: Path) -> None:
    """It loads, has neither channels nor pairs nor the later sums, and the fingerprint that it had."""
    path = small_profile.save(tmp_path)
    document, tensors = read_tensors(path)
    left = {k: v for k, v in tensors.items() if not {*WIDE, *LATER} & set(k.split("/"))}
    path.write_bytes(tensor_bytes(left, document))
    found = Profile.load(tmp_path)
    assert (found.channels, found.pairs, found.width) == ({}, {}, None)
    with pytest.raises(InputError, match="saliency msan needs statistics that the profile does not have"):
        plan(found, method="pooled", saliency="msan", keep=6)
    assert plan(found, keep=6).kept == plan(small_profile, keep=6).kept
    found.save(tmp_path / "again")
    assert set(read_tensors(tmp_path / "again" / FILE)[1]) == set(left)
    model, corpora = small_profile.model["fingerprint"], list(small_profile.corpora.items())
    digest = hashlib.sha256(json.dumps([model, corpora], sort_keys=True, separators=(",", ":")).encode())
    for corpus, statistics in small_profile.statistics.items():
        for name in [name for name in STATISTICS if name not in LATER]:
            digest.update(f"{corpus}/{name}".encode() + statistics[name].tobytes())
    assert found.fingerprint == digest.hexdigest() != small_profile.fingerprint
    changed = {**small_profile.channels, "b": small_profile.channels["b"] * 2}
    assert dataclasses.replace(small_profile, channels=changed).fingerprint != small_profile.fingerprint


def test_energies_add_up_where_both_have_them(small_profile: Profile, capsys: pytest.CaptureFixture[str]) -> None:
    again = {c: [{**records[0], "sha256": "0"}] for c, records in small_profile.corpora.items()}
    other = dataclasses.replace(without_channels(small_profile, "b"), corpora=again)
    total = merge([small_profile, other])
    np.testing.assert_array_equal(total.channels["a"], 2 * small_profile.channels["a"])
    assert list(total.channels) == ["a"]
    assert "note: a profile of b has no channel_energy, so the sum has none of it" in capsys.readouterr().err
    assert (merge([other, small_profile]).channels.keys(), small_profile.width) == ({"a"}, total.width)
    capsys.readouterr()
    assert merge([without_channels(small_profile, "a", "b"), without_channels(other, "a")]).width is None
    assert "channel_energy" not in capsys.readouterr().err
    narrow = dataclasses.replace(other, channels={"a": other.channels["a"][..., 1:]})
    with pytest.raises(InputError, match=r"different models do not add up: .* channels an expert and .* channels"):
        _ = small_profile + narrow


def test_order_of_corpora_survives_the_file(structure: Structure, tmp_path: Path) -> None:
    """Turns are taken in this order, so a plan from the file must equal one from memory."""
    made = profile(structure, [random_corpus("wiki", seed=2), random_corpus("c4", seed=1)])
    made.save(tmp_path)
    loaded = Profile.load(tmp_path)
    assert list(loaded.statistics) == ["wiki", "c4"]
    top_k, experts = structure.topology.top_k, structure.topology.num_experts
    for keep in range(top_k, experts):
        assert plan(loaded, keep=keep).to_json() == plan(made, keep=keep).to_json()
    swapped = profile(structure, [random_corpus("c4", seed=1), random_corpus("wiki", seed=2)])
    assert swapped.fingerprint != made.fingerprint
    assert next(iter(plan(swapped, keep=top_k).layers[0].protected)) == "c4"


def test_a_profile_shows_itself_in_one_line_and_as_a_table(small_profile: Profile) -> None:
    tokens = small_profile.corpora["a"][0]["tokens"]
    assert repr(small_profile).startswith(f"<Profile {small_profile.model['name']}: ")
    assert f"experts, a ({tokens} tokens), b (" in repr(small_profile)
    assert len(repr(small_profile)) < 1000
    rows = small_profile.rows_shown()
    never = int((small_profile.statistics["b"]["count"] == 0).sum())
    assert rows[1] == {"corpus": "b", "tokens": tokens, "samples": 1, "experts never selected": never}


def test_the_frame_of_a_profile_has_a_row_for_every_expert(small_profile: Profile) -> None:
    pytest.importorskip("pandas")
    topology, frame = small_profile.topology, small_profile.to_frame()
    assert len(frame) == 2 * len(topology.decoder_layers) * topology.num_experts
    assert list(frame.columns) == ["corpus", "layer", "decoder_layer", "expert", *STATISTICS]
    last = frame[(frame.corpus == "b") & (frame.layer == len(topology.decoder_layers) - 1) & (frame.expert == 1)]
    assert last.decoder_layer.tolist() == [topology.decoder_layers[-1]]
    for name in STATISTICS:
        assert last[name].tolist() == [small_profile.statistics["b"][name][-1, 1]]


def test_merged_profiles_count_the_samples(small_profile: Profile) -> None:
    other = dataclasses.replace(
        small_profile, corpora={"a": [{**small_profile.corpora["a"][0], "sha256": "0"}], "b": []}
    )
    assert merged([small_profile, other], ["one", "two"]).rows_shown()[0]["samples"] == 2
    with pytest.raises(InputError, match=r"two and one hold the same sample of corpus a: .*blocks \(seed, sequences\)"):
        merged([small_profile, small_profile], ["one", "two"])
