"""Tasks that generate text in memory: batches give the answers that one request at a time gives; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moecover.checkpoints.structure import read_structure
from moecover.corpora.tokenizer import load_tokenizer
from moecover.errors import InputError
from moecover.evaluation.task_loading import resolve
from moecover.planning.masking import masked_layers
from moecover.runtime.loading import load_model
from moecover.runtime.running import InMemory, running, unmasked
from moecover.runtime.world import ALONE, World
from tests.support.ranks import in_ranks
from tests.support.tasks import own_task, random_plan

BATCH, NEW = 4, 12


def test_batches_give_the_answers_of_single_requests(checkpoints: Callable[..., Path], data: Path) -> None:
    """The longest first, padded on the left, cut at the stop sequences; 7 questions are two passes over prompts."""
    from moecover.evaluation.harness_model import CheckedLM

    structure = read_structure(checkpoints("qwen2_moe", max_position_embeddings=300))
    tokenizer, model = load_tokenizer(structure.checkpoint.path), load_model(structure, dtype="float32")
    include = own_task(data, "generate_until", "exact_match")
    task = resolve(["letters"], tokenizer=tokenizer, include_path=include).loaded["tasks"]["letters"]
    task.build_all_requests()
    contexts = [one.args[0][number * 9 :] for number, one in enumerate(task.instances)]  # of other lengths each
    prompts: list[tuple[int, ...]] = []

    def noted(module: torch.nn.Module, given: tuple[object, ...], named: dict[str, torch.Tensor]) -> None:
        ids = named["input_ids"]
        if ids.shape[1] > 1:
            prompts.append(tuple(named.get("attention_mask", ids * 0 + 1).sum(1).tolist()))

    def answers(size: int, stop: str) -> list[str]:
        prompts.clear()
        for one, context in zip(task.instances, contexts, strict=True):
            one.arguments = (context, {"until": [stop], "max_gen_toks": NEW})
        lm = CheckedLM(pretrained=model, tokenizer=tokenizer, batch_size=size, answered=lambda number: None)
        return lm.generate_until(task.instances)

    model.register_forward_pre_hook(noted, with_kwargs=True)
    whole = answers(1, "<never>")
    lengths = sorted((n for (n,) in prompts), reverse=True)
    stop = next(c for answer in whole for c in answer[2:] if c.isascii() and c.isalpha())
    assert len(set(whole)) > 1
    assert answers(BATCH, "<never>") == whole
    assert [len(one) for one in prompts] == [BATCH, len(contexts) - BATCH]
    assert [n for one in prompts for n in one] == lengths
    assert answers(BATCH, stop) == [answer.partition(stop)[0] for answer in whole] != whole


def test_two_processes_share_the_batches(
    checkpoints: Callable[..., Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts that one process generates, for the model and for a plan of it; each runs its own batches only."""
    from moecover.evaluation.replayed_tasks import Replay

    structure = read_structure(checkpoints("qwen2_moe", max_position_embeddings=300))
    include, kept = own_task(data, "generate_until", "exact_match"), random_plan(structure, 6)

    def generated(here: World) -> tuple[list[list[str]], int]:
        tokenizer, model = load_tokenizer(structure.checkpoint.path), load_model(structure, dtype="float32")
        tasks = resolve(["letters"], tokenizer=tokenizer, include_path=include)
        live, prompts = running(model, structure, here), list[bool]()
        tasks.check(live)
        task = tasks.loaded["tasks"]["letters"]
        task.set_fewshot_seed(seed=1)
        task.build_all_requests()
        for one in task.instances:
            one.arguments = (one.args[0], {"until": ["<never>"], "max_gen_toks": NEW})
        model.register_forward_pre_hook(
            lambda module, given, named: prompts.append(named["input_ids"].shape[1] > 1), with_kwargs=True
        )
        lm = Replay(live, [unmasked, masked_layers(model, structure, kept)], tokenizer=tokenizer, batch_size=2)
        found = []
        for lm.variant in range(2):
            found.append(lm.generate_until(task.instances))
        return found, sum(prompts)

    alone, batches = generated(ALONE)
    assert alone[0] != alone[1]
    assert batches == 2 * 4
    for found, batches in in_ranks(monkeypatch, generated):
        assert found == alone
        assert batches == 2 * 2


def test_more_text_than_positions_is_refused(checkpoints: Callable[..., Path], data: Path) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    include = own_task(data, "generate_until", "exact_match")
    tasks = resolve(["letters"], tokenizer=load_tokenizer(structure.checkpoint.path), include_path=include)
    with pytest.raises(InputError, match="generates up to 256 tokens, the model has 64 positions: none is left for"):
        tasks.score(InMemory(load_model(structure), ()), [unmasked])


def test_code_is_not_run(checkpoints: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    """Not even that of the definition: humaneval's runs some as soon as it is loaded."""
    tokenizer = load_tokenizer(checkpoints("qwen2_moe"))
    with pytest.raises(InputError, match=r"tasks=humaneval runs the code that the model writes.*in a sandbox"):
        resolve(["humaneval"], tokenizer=tokenizer)
    include = own_task(data, "generate_until", "exact_match")
    (include / "mine.yaml").write_text("include: letters.yaml\ntask: mine\nunsafe_code: true\n")
    with pytest.raises(InputError, match="tasks=mine runs the code"):
        resolve(["mine"], tokenizer=tokenizer, include_path=include)
