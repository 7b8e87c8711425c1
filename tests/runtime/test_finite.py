"""Numbers that are not finite: every verb names corpus and block, layer, expert or tensor, in memory and by layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.packing import make_corpus
from moecover.errors import InputError
from moecover.evaluation.run import evaluate
from moecover.planning.run import plan_budgets
from moecover.profiling.run import profile
from moecover.pruning.writer import prune
from moecover.repairing.layers import repair_layers
from moecover.runtime.finite import is_finite, naming, taken, watched
from moecover.runtime.loading import load_model
from moecover.runtime.running import Running, running
from moecover.runtime.streaming import streamed
from tests.conftest import hand_plan, random_corpus, write_rows
from tests.support.command_line import run
from tests.support.passes import spoiled

NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
DENSE = "model.layers.0.mlp.down_proj.weight"
EXPERT = "model.layers.2.mlp.experts.5.down_proj.weight"
SHARED = "model.layers.2.mlp.shared_expert.down_proj.weight"
SAID = {
    NORM: "the last hidden states are not finite. model.norm.weight holds NaN or infinity",
    HEAD: "the logits are not finite. lm_head.weight holds NaN or infinity",
    EMBEDDING: "the token embedding: its output is not finite",
    DENSE: f"decoder layer 0: the output is not finite. {DENSE} holds NaN or infinity",
    EXPERT: "decoder layer 2, expert 5: the output is not finite. model.layers.2.mlp.experts.down_proj holds NaN",
    SHARED: f"decoder layer 2: the output is not finite. {SHARED} holds NaN or infinity",
}
RANDOM = random_corpus("r", sequences=3, length=20)
BLOCKS = make_corpus("r", RANDOM.tokens, RANDOM.mask, {"source": "random", "length": 20})


@pytest.fixture(params=list(SAID))
def tensor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def broken(checkpoints: Callable[..., Path], tmp_path: Path, tensor: str) -> Structure:
    """A model with one tensor that is not finite."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[tensor].fill_(math.nan if tensor != HEAD else math.inf)

    return read_structure(spoiled(checkpoints("qwen2_moe"), tmp_path / "broken", change))


@pytest.fixture(params=["in memory", "by layers"])
def opened(request: pytest.FixtureRequest, broken: Structure) -> Iterator[Running]:
    if request.param == "in memory":
        yield running(load_model(broken), broken)
        return
    with streamed(broken) as stream:
        yield stream


def test_perplexity(broken: Structure, opened: Running, tensor: str) -> None:
    with pytest.raises(InputError) as caught:
        evaluate(broken, {}, model=opened, texts=[BLOCKS], batch_size=2)
    assert str(caught.value).startswith(f"corpus r, windows 0 to 1{', ' if SAID[tensor][0] == 'd' else ''}")
    assert SAID[tensor] in str(caught.value)


def test_profile(broken: Structure, opened: Running, tensor: str) -> None:
    if tensor == HEAD:  # which a profile does not run
        assert profile(broken, [BLOCKS], model=opened, batch_size=2).statistics
        return
    with pytest.raises(InputError, match="^corpus r, blocks 0 to 1") as caught:
        profile(broken, [BLOCKS], model=opened, batch_size=2)
    assert SAID[tensor].split(" holds")[0].split(". model")[0] in str(caught.value)


@pytest.mark.parametrize("tensor", [NORM, EXPERT, DENSE], indirect=True)
def test_generated_text(broken: Structure, tmp_path: Path, capsys: pytest.CaptureFixture[str], tensor: str) -> None:
    folder = broken.checkpoint.path
    sizes = ["--sequences", 2, "--length", 8, "--batch-size", 2]
    status, _, err = run(capsys, "generate", folder, *sizes, "-o", tmp_path / "self.jsonl")
    assert status == 2
    assert f"rows 0 to 1{', ' if SAID[tensor][0] == 'd' else ': '}{SAID[tensor]}" in err


@pytest.mark.parametrize("tensor", [NORM, EXPERT], indirect=True)
def test_verification(
    checkpoints: Callable[..., Path], broken: Structure, tmp_path: Path, capsys: pytest.CaptureFixture[str], tensor: str
) -> None:
    """Of a broken original it proves nothing; a broken copy of a sound original is not equal."""
    sound = read_structure(checkpoints("qwen2_moe"))
    every = hand_plan(sound, [list(range(12))] * 2)
    rows = write_rows(tmp_path / "rows.jsonl", [{"input_ids": list(range(i, i + 60))} for i in (0, 120)])
    cut = prune(broken, every, tmp_path / "cut")
    status, _, err = run(capsys, "verify", broken.checkpoint.path, cut, "--corpus", f"r={rows}")
    assert status == 2
    assert "corpus r, block " in err
    assert SAID[tensor] in err
    status, out, _ = run(capsys, "verify", checkpoints("qwen2_moe"), cut, "--corpus", f"r={rows}")
    assert status == 1
    assert out.startswith("NOT equal")


@pytest.mark.parametrize("tensor", [EXPERT, SHARED, DENSE], indirect=True)
def test_repair(broken: Structure, opened: Running, tensor: str) -> None:
    corpus = random_corpus("r", sequences=8, length=30)
    made = repair_layers(opened, broken, hand_plan(broken, [list(range(8))] * 2), [corpus], kind="ridge")
    with pytest.raises(InputError, match="corpus r, blocks 0 to 3: the output of the original's experts is not finite"):
        list(made)


@pytest.mark.parametrize("tensor", [EXPERT, DENSE], indirect=True)
@pytest.mark.parametrize("method", ["expert-sparsity", "worst-corpus"])
def test_search(checkpoints: Callable[..., Path], broken: Structure, opened: Running, tensor: str, method: str) -> None:
    """The profile is of the sound model: the weights were damaged since."""
    sound = profile(read_structure(checkpoints("qwen2_moe")), [BLOCKS])
    given: dict[str, Any] = {"model": opened, "structure": broken, "sample": [BLOCKS]}
    place = "decoder layer 2, expert 5: the output" if tensor == EXPERT else "decoder layer 0: the output is not"
    with pytest.raises(InputError, match=place):
        plan_budgets(sound, method=method, keeps=[8], **given)


def test_an_expert_that_no_token_is_routed_to_is_named_by_a_search(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    folder = checkpoints("mixtral")
    sound = profile(read_structure(folder), [BLOCKS])
    unused = int(sound.statistics["r"]["count"][1].argmin())
    broken = read_structure(
        spoiled(folder, tmp_path / "m", lambda tensors: tensors[name.format(unused)].fill_(math.inf))
    )
    given: dict[str, Any] = {"model": load_model(broken), "structure": broken, "sample": [BLOCKS]}
    with pytest.raises(InputError, match=f"decoder layer 1, expert {unused}: the output"):
        plan_budgets(sound, method="expert-sparsity", keeps=[4], **given)


def test_padding_is_not_looked_at(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    model = load_model(structure)
    ids, mask = torch.arange(12).reshape(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0

    def spoil(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[1, 5] = math.nan
        return changed

    handle = model.get_submodule("model.norm").register_forward_hook(spoil)
    with torch.inference_mode(), watched(running(model, structure)):
        with naming("a pass"):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            with pytest.raises(InputError, match="^a pass"):
                model(input_ids=ids, use_cache=False)
        assert taken() == ""
        model(input_ids=ids, use_cache=False)  # one without a name goes on
        assert taken().startswith("the last hidden states are not finite")
        assert taken() == ""
    handle.remove()


@pytest.mark.parametrize("value, expected", [(1.0, True), (math.nan, False), (math.inf, False), (-math.inf, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_number(value: float, expected: bool, dtype: torch.dtype) -> None:
    values = torch.linspace(-3, 3, 24, dtype=dtype).reshape(2, 3, 4)
    values[1, 0, 2] = value
    assert is_finite(values) == expected
    assert is_finite(values[:0])
