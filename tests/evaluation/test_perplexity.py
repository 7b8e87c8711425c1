"""Perplexity and closeness of logits: against a loop in plain Python, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moecover.errors import InputError
from moecover.evaluation.perplexity import perplexity, score, text_result
from tests.conftest import random_corpus


def test_score_is_what_a_loop_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(2, 7, 11, generator=generator) for _ in range(2))
    inputs = {"input_ids": torch.randint(0, 11, (2, 7), generator=generator), "attention_mask": torch.ones(2, 7).long()}
    inputs["attention_mask"][1, 4:] = 0
    expected = np.zeros((2, 4))
    for row in range(2):
        for position in range(6):
            if not (inputs["attention_mask"][row, position] and inputs["attention_mask"][row, position + 1]):
                continue
            p, q = (x[row, position].double().softmax(-1).tolist() for x in (other, logits))
            expected[row] += [
                -math.log(q[int(inputs["input_ids"][row, position + 1])]),
                1,
                sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
                p.index(max(p)) == q.index(max(q)),
            ]
    np.testing.assert_allclose(score(logits, inputs, other), expected, rtol=1e-5)
    np.testing.assert_allclose(score(logits, inputs), expected * [1, 1, 0, 0], rtol=1e-5)


def test_no_token_to_predict() -> None:
    with pytest.raises(InputError, match="corpus t: no token to predict"):
        text_result("t", np.zeros((2, 4)))


@pytest.mark.parametrize("column", [0, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite(column: int, value: float) -> None:
    sums = np.ones((4, 4))
    sums[2, column] = value
    with pytest.raises(InputError, match="corpus t, window 2: the log-likelihoods are not finite"):
        text_result("t", sums, close=True)


def test_a_perplexity_beyond_the_largest_number() -> None:
    with pytest.raises(InputError, match="corpus t: with 1000 nats a token the perplexity is not finite"):
        text_result("t", np.array([[3000.0, 3, 0, 0]]))


def test_batch_size_out_of_range() -> None:
    with pytest.raises(InputError, match="batch_size=0 is out of range: 1 or more"):
        perplexity(torch.nn.Linear(1, 1), random_corpus(), batch_size=0)
