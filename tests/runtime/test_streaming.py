"""Layer by layer: the same numbers as in memory, bit for bit; interrupted passes that go on; what fits."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moecover.checkpoints.families import PROVEN_FAMILIES
from moecover.checkpoints.header import TensorEntry
from moecover.checkpoints.structure import Structure, read_structure
from moecover.cli import main as cli
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, MoecoverError
from moecover.evaluation.perplexity import perplexity
from moecover.evaluation.run import evaluate
from moecover.planning.masking import masked
from moecover.planning.run import plan, plan_budgets
from moecover.profiling.artifact import Profile
from moecover.profiling.layer_inputs import sample_of
from moecover.profiling.run import profile
from moecover.pruning.writer import prune
from moecover.runtime import memory as fitting_module
from moecover.runtime.layerwise import run, run_in_parts
from moecover.runtime.loading import load_model
from moecover.runtime.memory import cost, opened, parse_size
from moecover.runtime.pass_state import FILE, State
from moecover.runtime.running import unmasked
from moecover.runtime.shards import Files
from moecover.runtime.streaming import Streamed, streamed
from moecover.runtime.weights import Weights
from moecover.verification.verify import verify
from tests.conftest import random_corpus
from tests.support import zoo
from tests.support.tiny import make_checkpoint


class Stop(BaseException):
    """What ends a pass in the middle, as an interrupt would."""


def same(one: Profile, two: Profile) -> None:
    """Every statistic and every running sum equal to the last bit."""
    assert one.fingerprint == two.fingerprint
    for corpus, statistics in one.statistics.items():
        for name, values in statistics.items():
            np.testing.assert_array_equal(values, two.statistics[corpus][name], err_msg=f"{corpus}, {name}")
            np.testing.assert_array_equal(one.parts[corpus][name], two.parts[corpus][name], err_msg=f"{corpus}, {name}")


def corpora(vocab: int = 128) -> list[Corpus]:
    """Two of different shapes, one with a last batch of another size."""
    return [random_corpus("a", sequences=5, length=20, vocab=vocab), random_corpus("b", sequences=3, length=17, vocab=vocab)]  # fmt: skip


def stop_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """The pass ends after so many saved states."""
    left, save = [saves], State.save

    def stopping(self: State, *args: object, **kwargs: object) -> None:
        save(self, *args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    monkeypatch.setattr(State, "save", stopping)


@pytest.mark.parametrize("family", list(PROVEN_FAMILIES))
def test_every_family_layer_by_layer(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.make_model(family).save_pretrained(tmp_path / "m", save_original_format=True)
    structure, texts = read_structure(tmp_path / "m"), corpora()
    model = load_model(structure)
    expected = profile(structure, texts, model=model, batch_size=2)
    tokens = [torch.from_numpy(text.tokens) for text in texts]
    with torch.inference_mode():
        logits = [model(input_ids=one, use_cache=False).logits for one in tokens]
    with streamed(structure) as stream:
        calls = [functools.partial(stream.module, input_ids=one, use_cache=False) for one in tokens]
        for one, two in zip(logits, run(stream, calls), strict=True):
            assert torch.equal(one, two.logits)
        same(profile(structure, texts, model=stream, batch_size=2), expected)
        with monkeypatch.context() as patched, pytest.raises(Stop):
            stop_after(patched, 2)
            profile(structure, texts, model=stream, batch_size=2, state=tmp_path / "state")
        said: list[str] = []
        again = profile(structure, texts, model=stream, batch_size=2, state=tmp_path / "state", say=said.append)
        assert said == [f"resuming: 2 of {len(stream.layers)} layers are done"]
        same(again, expected)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3", "granitemoe", "afmoe"])
def test_reading_the_next_layer_in_a_thread(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the next layer's tensors are read while this one computes, and none twice."""
    zoo.make_model(family).save_pretrained(tmp_path / "m", save_original_format=True)
    structure, texts = read_structure(tmp_path / "m"), corpora()
    expected = profile(structure, texts, model=load_model(structure), batch_size=2)
    make, read_into = Weights.__init__, Files.read_into
    monkeypatch.setattr(Weights, "__init__", lambda self, *args, ahead: make(self, *args, ahead=True))
    threads: dict[str, list[str]] = {}

    def counted(self: Files, entry: TensorEntry, target: torch.Tensor) -> None:
        threads.setdefault(entry.name, []).append(threading.current_thread().name)
        read_into(self, entry, target)

    monkeypatch.setattr(Files, "read_into", counted)
    with streamed(structure) as stream:
        same(profile(structure, texts, model=stream, batch_size=2), expected)
    ahead = [name for name, by in threads.items() if by == ["next layer"]]
    assert ahead
    assert all(len(by) == 1 for by in threads.values())

    def broken(self: Files, entry: TensorEntry, target: torch.Tensor) -> None:
        if entry.name == ahead[-1]:
            raise MoecoverError("cannot be read")
        read_into(self, entry, target)

    monkeypatch.setattr(Files, "read_into", broken)
    with streamed(structure) as stream, pytest.raises(MoecoverError, match="cannot be read"):
        profile(structure, texts, model=stream, batch_size=2)


@pytest.fixture(scope="module")
def structure(tmp_path_factory: pytest.TempPathFactory) -> Structure:
    folder = tmp_path_factory.mktemp("streamed") / "m"
    zoo.make_model("qwen2_moe").save_pretrained(folder, save_original_format=True)
    return read_structure(folder)


@pytest.mark.parametrize("way", ["memory", "layers", "spilled"])
@pytest.mark.parametrize("saves", [1, 2, 3])
def test_an_interrupted_pass_goes_on(
    structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, saves: int
) -> None:
    """With a sample of the inputs, whose file is made in pieces too."""
    texts, state = corpora(), tmp_path / "state"
    once = profile(structure, texts, model=load_model(structure), batch_size=2, keep_inputs=(100, tmp_path / "once"))

    def go(folder: str) -> Profile:
        given = {"batch_size": 2, "state": state, "keep_inputs": (100, tmp_path / folder)}
        if way == "memory":
            return profile(structure, texts, model=load_model(structure), **given)
        with streamed(structure, spill=way == "spilled") as stream:
            return profile(structure, texts, model=stream, **given)

    with monkeypatch.context() as patched, pytest.raises(Stop):
        stop_after(patched, saves)
        go("again")
    assert not (tmp_path / "again").exists()
    made = go("again")
    same(made, once)
    assert (tmp_path / "again" / "inputs.safetensors").read_bytes() == (tmp_path / "once" / "inputs.safetensors").read_bytes()  # fmt: skip
    # All of it is done: nothing runs any more.
    monkeypatch.setattr("moecover.profiling.passes.run", None)
    monkeypatch.setattr("moecover.profiling.passes.backbone_of", lambda model: None)
    (tmp_path / "third").mkdir()
    shutil.copy(tmp_path / "again" / "inputs.safetensors", state / "inputs.safetensors")
    same(go("third"), once)


def test_a_state_of_other_inputs_is_not_used(structure: Structure, tmp_path: Path, monkeypatch) -> None:
    model, state = load_model(structure), tmp_path / "state"
    with monkeypatch.context() as patched, pytest.raises(Stop):
        stop_after(patched, 2)
        profile(structure, corpora(), model=model, batch_size=2, state=state)
    for change, name in (({"batch_size": 1}, "batch size"), ({"corpora": corpora(100)}, "corpora")):
        given = {"corpora": corpora(), "batch_size": 2, **change}
        shutil.copytree(state, tmp_path / name)
        said: list[str] = []
        made = profile(structure, given["corpora"], model=model, batch_size=given["batch_size"], state=tmp_path / name, say=said.append)  # fmt: skip
        assert said == [f"starting anew: {tmp_path / name} was made from other inputs, {name} differs"]
        same(made, profile(structure, given["corpora"], model=model, batch_size=given["batch_size"]))
    (structure.checkpoint.path / "model.safetensors").touch()  # written anew, for all that is known
    said = []
    profile(structure, corpora(), model=model, batch_size=2, state=state, say=said.append)
    assert said == [f"starting anew: {state} was made from other inputs, weights differs"]


@pytest.mark.parametrize("way", ["memory", "layers"])
def test_a_state_of_the_same_corpora_in_another_order_is_not_used(
    structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Batches are counted in the order of the corpora; where both have one shape, nothing else would tell."""
    one, two, state = *(random_corpus(name, seed=seed, vocab=128) for seed, name in enumerate("ab")), tmp_path / "state"
    with contextlib.nullcontext(load_model(structure)) if way == "memory" else streamed(structure) as model:
        expected = profile(structure, [two, one], model=model, batch_size=2)
        with monkeypatch.context() as patched, pytest.raises(Stop):
            stop_after(patched, 2)
            profile(structure, [one, two], model=model, batch_size=2, state=state)
        said: list[str] = []
        same(profile(structure, [two, one], model=model, batch_size=2, state=state, say=said.append), expected)
    assert said == [f"starting anew: {state} was made from other inputs, corpora differs"]


@pytest.mark.parametrize("damage", ["state", "hidden"])
def test_a_damaged_state_is_not_used(structure: Structure, tmp_path: Path, monkeypatch, damage: str) -> None:
    expected, state = profile(structure, corpora(), batch_size=2), tmp_path / "state"
    with streamed(structure) as stream:
        with monkeypatch.context() as patched, pytest.raises(Stop):
            stop_after(patched, 2)
            profile(structure, corpora(), model=stream, batch_size=2, state=state)
        file = state / FILE if damage == "state" else state / "hidden-1.1"
        content = bytearray(file.read_bytes())
        content[len(content) // 2 if damage == "hidden" else 20] ^= 255
        file.write_bytes(content)
        same(profile(structure, corpora(), model=stream, batch_size=2, state=state), expected)


def test_masked_perplexity_layer_by_layer(structure: Structure) -> None:
    text, model = random_corpus("t", sequences=3, length=20, vocab=128), load_model(structure)
    chosen = plan(profile(structure, corpora(), model=model), keep=4)
    with masked(model, structure, chosen):
        expected = perplexity(model, text, batch_size=2)
    with streamed(structure) as stream:
        found = evaluate(structure, {"plan": chosen}, model=stream, texts=[text], batch_size=2)
        assert found.rows[1].perplexity[text.name].perplexity == expected
        assert perplexity(stream, text, batch_size=2) == perplexity(model, text, batch_size=2) != expected


def test_verify_layer_by_layer(structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = prune(structure, plan(profile(structure, corpora()), keep=4), tmp_path / "out")
    whole = verify(structure.checkpoint.path, out)
    monkeypatch.setattr(fitting_module, "OVERHEAD", 0)
    monkeypatch.setattr(fitting_module, "COPIES", 2)  # a layer of this model is no larger than its hidden states
    said: list[str] = []
    by_layer = verify(structure.checkpoint.path, out, memory_limit=_between(structure), advance=said.append)
    assert any("running layer by layer" in line for line in said)
    assert by_layer == whole


def _between(structure: Structure, *, tokens: int = 64, batch_tokens: int = 64, head: bool = True) -> int:
    """A limit that one layer keeps and the whole model does not."""
    made = cost(structure, tokens=tokens, batch_tokens=batch_tokens, limit=0, head=head)
    assert made.streamed < made.whole
    return (made.streamed + made.whole) // 2


# ------------------------------------------------------------------------------------------------------- what fits
@pytest.mark.parametrize("text, expected", [("4GB", 4 * 10**9), ("1.5 GiB", 3 * 2**29), ("100", 100), ("7kb", 7000)])
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "4 apples", "-1GB", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InputError, match="is no size"):
        parse_size(text)


def test_a_limit_that_is_too_small(structure: Structure) -> None:
    given = {"tokens": 64, "batch_tokens": 64, "memory_limit": 1000}
    with pytest.raises(InputError, match="one layer at a time still needs"), opened(structure, **given):
        pass


def test_hidden_states_that_do_not_fit_lie_in_files(
    structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting_module, "OVERHEAD", 0)
    bare = cost(structure, tokens=0, batch_tokens=64, limit=0)
    given = {"tokens": (bare.whole - bare.streamed) // (4 * 32 * 4), "batch_tokens": 64}
    made = cost(structure, **given, limit=0)
    limit = made.streamed - made.hidden
    assert made.hidden > 0
    with opened(structure, **given, memory_limit=limit, scratch=tmp_path / "s") as stream:
        assert stream.spill
    with (
        pytest.raises(InputError, match="one layer at a time still needs"),
        opened(structure, **given, memory_limit=limit),
    ):
        pass  # without a folder
    monkeypatch.setattr(fitting_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, made.hidden))
    with (
        pytest.raises(InputError, match="of scratch disk, 0.0 GB are free"),
        opened(structure, **given, memory_limit=limit, scratch=tmp_path / "s"),
    ):
        pass


@pytest.mark.parametrize("passes", [1, 7, 50])
def test_passes_in_parts(structure: Structure, monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
    """As many at a time as the limit leaves room for, with as many reads of the weights as the estimate says."""
    monkeypatch.setattr(fitting_module, "OVERHEAD", 0)
    monkeypatch.setattr(fitting_module, "THREAD", 1000)
    given = {"tokens": 0, "batch_tokens": 8, "in_parts": (8 * passes, passes)}
    limit = cost(structure, tokens=160, batch_tokens=8, limit=0).streamed
    made = cost(structure, **given, limit=limit)
    assert made.by_layer
    assert made.streamed <= limit
    ids = torch.arange(8).reshape(1, 8)
    loads: list[str] = []
    with opened(structure, **given, memory_limit=limit) as stream:
        assert isinstance(stream, Streamed)
        load = stream.weights.load
        stream.weights.load = lambda prefix: (loads.append(prefix), load(prefix))[1]  # type: ignore[method-assign,func-returns-value]
        calls = [lambda: stream.module(ids, use_cache=False).logits] * passes
        found = run_in_parts(stream, calls, [8] * passes, within=[unmasked] * passes)
    assert len(found) == passes
    assert all(torch.equal(found[0], other) for other in found[1:])
    reads = loads.count(f"{stream.layers[0]}.")
    assert (reads == 1) == (passes <= 7)
    assert made.read == reads * structure.checkpoint.num_bytes


def test_what_fits_runs_in_memory(structure: Structure, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with opened(structure, tokens=64, batch_tokens=64, say=said.append) as model:
        assert not isinstance(model, Streamed)
    monkeypatch.setattr(fitting_module, "OVERHEAD", 0)
    with opened(
        structure, tokens=8, batch_tokens=8, memory_limit=_between(structure, tokens=8, batch_tokens=8), say=said.append
    ) as model:
        assert isinstance(model, Streamed)
    assert said[0].startswith("loading ")
    assert "running layer by layer (the whole model needs" in said[1]


def test_the_command(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": list(range(i, i + 30))}) + "\n" for i in range(9)))
    folder = checkpoints("qwen2_moe")
    command = ["profile", str(folder), "--corpus", f"r={rows}", "--batch-size", "2"]
    assert cli.main([*command, "-o", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(fitting_module, "OVERHEAD", 0)
    limited = [
        *command,
        "--memory-limit",
        str(_between(read_structure(folder), tokens=270, batch_tokens=60, head=False)),
        "-o",
        str(tmp_path / "p"),
    ]
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(Stop):
            cli.main(limited)
    assert not (tmp_path / "p").exists()
    assert cli.main(limited) == 0
    log = capsys.readouterr().err
    assert "running layer by layer" in log
    assert "resuming: 2 of 3 layers are done" in log
    same(Profile.load(tmp_path / "p"), Profile.load(tmp_path / "whole"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_file_that_vanishes(structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names it; with the file back, the pass goes on."""
    folder, away, save = tmp_path / "m", tmp_path / "away", State.save
    shutil.copytree(structure.checkpoint.path, folder)
    made, shard = read_structure(folder), folder / "model.safetensors"

    def vanishing(self: State, *args: object, **kwargs: object) -> None:
        save(self, *args, **kwargs)
        shard.rename(away)
        stream.weights.close()  # what it had not opened yet, it does not find any more

    with streamed(made) as stream:
        with monkeypatch.context() as patched:
            patched.setattr(State, "save", vanishing)
            with pytest.raises(MoecoverError, match=r"model\.safetensors cannot be read at byte .*: No such file"):
                profile(made, corpora(), model=stream, batch_size=2, state=tmp_path / "state")
        away.rename(shard)
        said: list[str] = []
        again = profile(made, corpora(), model=stream, batch_size=2, state=tmp_path / "state", say=said.append)
    assert said == [f"resuming: 1 of {len(stream.layers)} layers are done"]
    same(again, profile(made, corpora(), batch_size=2))


def test_a_read_error_in_the_middle(structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line; what was done stays and is used."""
    from moecover.runtime import weights

    real, calls = weights.os.preadv, [0]

    def failing(*args: object) -> int:
        calls[0] += 1
        if calls[0] == 60:
            raise OSError(5, "Input/output error")
        return real(*args)

    monkeypatch.setattr(weights.os, "preadv", failing)
    with streamed(structure) as stream:
        with pytest.raises(MoecoverError, match="cannot be read at byte .*: Input/output error"):
            profile(structure, corpora(), model=stream, batch_size=2, state=tmp_path / "state")
        said: list[str] = []
        made = profile(structure, corpora(), model=stream, batch_size=2, state=tmp_path / "state", say=said.append)
    assert "layers are done" in said[0]
    same(made, profile(structure, corpora(), batch_size=2))


KILLED = """
import sys, time
from moecover.cli import main as cli
from moecover.runtime import memory as fitting
from moecover.runtime import pass_state as states
fitting.OVERHEAD = 0
save = states.State.save
def slowly(self, *args, **kwargs):
    time.sleep(0.05)
    save(self, *args, **kwargs)
    print("saved", flush=True)
states.State.save = slowly
sys.exit(cli.main(sys.argv[1:]))
"""


def kill_and_go_on(kills: int, way: str, tmp_path: Path, folder: Path) -> None:
    """Kill a profile again and again at random moments of its pass, then let it end: the same as uninterrupted."""
    rng, rows = random.Random(way), tmp_path / "rows.jsonl"
    count = 20 if way == "layers" else 10 + 3 * kills
    rows.write_text("".join(json.dumps({"input_ids": list(range(i, i + 30))}) + "\n" for i in range(count)))
    command = ["profile", str(folder), "--corpus", f"r={rows}", "--batch-size", "2"]
    if way == "layers":
        limit = _between(read_structure(folder), tokens=600, batch_tokens=60, head=False)
        command += ["--memory-limit", str(limit)]
    assert cli.main([*command, "-o", str(tmp_path / "once")]) == 0
    command += ["-o", str(tmp_path / "out")]
    state = tmp_path / ".out.profile.partial"
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", KILLED, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()  # the pass has begun
        time.sleep(rng.random() * (0.3 if way == "memory" else 0.1))
        process.kill()
        process.wait()
        if line.startswith(b"saved") and not (tmp_path / "out" / "profile.safetensors").exists():
            assert state.exists()
    if not (tmp_path / "out" / "profile.safetensors").exists():
        assert cli.main([*command]) == 0
    same(Profile.load(tmp_path / "out"), Profile.load(tmp_path / "once"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"profile.safetensors"}


@pytest.mark.parametrize("way", ["memory", "layers"])
def test_killed_at_random_moments(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting_module, "OVERHEAD", 0)
    make_checkpoint(tmp_path / "m", "qwen2_moe", num_hidden_layers=8)
    kill_and_go_on(2, way, tmp_path, tmp_path / "m")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["memory", "layers"])
def test_killed_at_fifty_random_moments(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting_module, "OVERHEAD", 0)
    make_checkpoint(tmp_path / "m", "qwen2_moe", num_hidden_layers=100)
    kill_and_go_on(50, way, tmp_path, tmp_path / "m")


@pytest.mark.parametrize("mode", ["layerwise", "progressive"])
@pytest.mark.parametrize("from_text", [True, False])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "minimax_m2", "afmoe"])
def test_expert_sparsity_layer_by_layer(family: str, mode: str, from_text: bool, tmp_path: Path) -> None:
    """With a bias that the block hands its router, and a dense layer, among them."""
    zoo.make_model(family).save_pretrained(tmp_path / "m", save_original_format=True)
    structure, texts = read_structure(tmp_path / "m"), corpora()
    model = load_model(structure)
    made = profile(structure, texts, model=model, batch_size=2, keep_inputs=(100, tmp_path / "p"))
    given = {"method": "expert-sparsity", "mode": mode, "keeps": [4, 6], "structure": structure}
    given |= {"sample": sample_of(texts, 100)} if from_text else {}
    expected = plan_budgets(made, model=model, **given)
    with streamed(structure) as stream:
        assert plan_budgets(made, model=stream, **given) == expected
