"""The repair of one layer on layers whose answer is known, and against dense least squares."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moecover.errors import InputError
from moecover.repairing import ridge, sums
from moecover.repairing.parts import whole
from moecover.repairing.solver import KINDS, Fit, fit
from moecover.repairing.sums import CHUNK, Block, moments

HIDDEN, WIDTH, TOKENS = 12, 6, 400
EXACT = {"penalties": (1e-13,), "held_share": 0.0, "sweeps": 5000, "tolerance": 0.0}


def expert(
    seed: int, *, tokens: torch.Tensor | None = None, width: int = WIDTH, dtype: torch.dtype = torch.float64
) -> Block:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.arange(TOKENS) if tokens is None else tokens
    weight = torch.randn(HIDDEN, width, generator=generator, dtype=torch.float64).to(dtype)
    features = torch.randn(len(tokens), width, generator=generator, dtype=torch.float64)
    return Block(f"expert {seed}", weight, tokens, features)


def output(blocks: list[Block], weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    total = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for block in blocks:
        weight = (weights or {}).get(block.name, block.weight).double()
        total[block.tokens] += block.features.double() @ weight.T
    return total


def corpora() -> torch.Tensor:
    return (torch.arange(TOKENS) >= 300).long()  # 300 and 100 tokens


def fitted(blocks: list[Block], target: torch.Tensor, **options: object) -> Fit:
    return fit(blocks, target, whole(corpora()), **{"kind": "ridge", **EXACT, **options})


def test_a_removed_duplicate_is_taken_over() -> None:
    kept, other = expert(1), expert(2)
    twin = Block("twin", kept.weight, kept.tokens, kept.features)
    for kind in KINDS:
        found = fitted([kept, other], output([kept, other, twin]), kind=kind)
        torch.testing.assert_close(found.weights["expert 1"], 2 * kept.weight, rtol=1e-9, atol=1e-9)
        assert max(found.after) < 1e-18 < 1e-3 < min(found.before)


def test_a_removed_mixture_of_others_is_taken_over() -> None:
    first, second = expert(1), expert(2)
    # The removed expert's output is linear in both others' activations.
    mixed = torch.randn(HIDDEN, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    target = output([first, second]) + first.features @ mixed.T + 0.5 * second.features @ second.weight.T
    found = fitted([first, second], target)
    torch.testing.assert_close(found.weights["expert 1"], first.weight + mixed, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.weights["expert 2"], 1.5 * second.weight, rtol=1e-9, atol=1e-9)


def test_a_removed_expert_without_effect_changes_nothing() -> None:
    blocks = [expert(1), expert(2)]
    for kind in KINDS:
        found = fitted(blocks, output(blocks), kind=kind)
        for name, weight in found.weights.items():  # what rounding leaves may be fitted
            torch.testing.assert_close(weight, {b.name: b.weight for b in blocks}[name], rtol=1e-12, atol=1e-12)
        assert max(found.before) < 1e-30
        assert all(after <= before for after, before in zip(found.after, found.before, strict=True))


def test_the_shared_expert_takes_over_what_every_token_lost() -> None:
    shared, routed = expert(1, width=9), expert(2, tokens=torch.arange(0, TOKENS, 2))
    lost = torch.randn(HIDDEN, 9, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = fitted([routed, shared], output([routed, shared]) + shared.features @ lost.T)
    torch.testing.assert_close(found.weights["expert 1"], shared.weight + lost, rtol=1e-9, atol=1e-9)


def shares(target: torch.Tensor) -> torch.Tensor:
    """Square root of every token's weight, ``[token, 1]``."""
    energy = torch.stack([target[corpora() == c].square().sum() for c in (0, 1)])
    return (1 / (2 * energy))[corpora()].sqrt()[:, None]


def dense_factors(blocks: list[Block], target: torch.Tensor, penalty: float) -> torch.Tensor:
    """Factors less 1 by least squares over all numbers of the output, each penalised by what it adds."""
    outputs = torch.stack([(output([block]) * shares(target)).flatten() for block in blocks], 1)
    system = outputs.T @ outputs + torch.diag(outputs.square().sum(0) * penalty)
    return torch.linalg.solve(system, outputs.T @ ((target - output(blocks)) * shares(target)).flatten())


@pytest.mark.parametrize("held_share", [0.0, 0.2])
@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_blocks_in_turn_end_at_the_dense_solution(penalty: float, held_share: float) -> None:
    """Ridge is least squares towards the original weights times the best factors, in the end on the held tokens too."""
    blocks = [expert(1, tokens=torch.arange(0, 250)), expert(2, tokens=torch.arange(100, 400)), expert(3, width=9)]
    noise = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    other = {block.name: 1.3 * block.weight + 0.5 * block.weight.flip(1) for block in blocks}
    target = output(blocks, other) + noise
    found = fitted(blocks, target, penalties=(penalty,), held_share=held_share)
    assert found.penalties == {"scale": penalty, "ridge": penalty}
    factors = dense_factors(blocks, target, penalty)
    scaled = {block.name: (1 + factor) * block.weight for block, factor in zip(blocks, factors, strict=True)}
    # Dense: all blocks' features side by side, rows weighted by corpus, the penalty as further rows.
    columns, ridge = [], []
    for block in blocks:
        wide = torch.zeros(TOKENS, block.weight.shape[1], dtype=torch.float64)
        wide[block.tokens] = block.features
        columns.append(wide * shares(target))
        ridge += [float(columns[-1].square().sum()) / wide.shape[1]] * wide.shape[1]
    system = torch.cat(
        [torch.cat(columns, 1), torch.diag(torch.tensor(ridge, dtype=torch.float64).mul(penalty).sqrt())]
    )
    rest = (target - output(blocks, scaled)) * shares(target)
    dense = torch.linalg.lstsq(system, torch.cat([rest, torch.zeros(len(ridge), HIDDEN, dtype=torch.float64)])).solution
    parts = dense.split([block.weight.shape[1] for block in blocks])
    for block, part in zip(blocks, parts, strict=True):
        torch.testing.assert_close(found.weights[block.name], scaled[block.name] + part.T, rtol=1e-8, atol=1e-8)


def routed(seed: int) -> tuple[list[Block], torch.Tensor]:
    """Blocks over tokens in no order, some tokens with several, one or none; a residual of their own scale."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(TOKENS, 5, generator=generator) < torch.tensor([0.5, 0.3, 0.1, 0.6, 0.2])
    chosen[:9] = False
    tokens = [column.nonzero()[:, 0] for column in chosen.T]
    blocks = [
        expert(seed + i, tokens=t[torch.randperm(len(t), generator=generator)], width=4 + i)
        for i, t in enumerate(tokens)
    ]
    return blocks, torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [CHUNK, 28])
def test_moments_are_sums_over_tokens(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "CHUNK", chunk)
    blocks, residual = routed(3)
    held = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1)) < 0.3
    share = torch.rand(TOKENS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shares = torch.stack([share * ~held, share * held])
    found = moments(blocks, residual, shares)
    outputs = torch.stack([output([block]) for block in blocks])
    assert (outputs.abs().sum(2) > 0).sum(0).unique().tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(found.products, torch.einsum("pt,ath,bth->pab", shares, outputs, outputs))
    torch.testing.assert_close(found.right, torch.einsum("pt,ath,th->pa", shares, outputs, residual))
    torch.testing.assert_close(found.energy, shares @ residual.square().sum(1))


def test_the_penalty_of_factors_is_the_best_on_held_tokens() -> None:
    """What is fitted in the first four fifths of every corpus does not hold in the last one."""
    blocks, noise = routed(7)
    late = torch.cat([torch.arange(240, 300), torch.arange(380, 400)])
    wanted = torch.tensor([0.6, -0.5, 0.9, 0.4, -0.7], dtype=torch.float64)
    scale = torch.ones(TOKENS, dtype=torch.float64)
    scale[late] = 0.4
    added = sum(scale[:, None] * factor * output([block]) for block, factor in zip(blocks, wanted, strict=True))
    target = output(blocks) + added + 0.3 * noise
    weight = shares(target)[:, 0].square()
    outputs, rest = torch.stack([output([block]) for block in blocks]), target - output(blocks)
    early = torch.ones(TOKENS, dtype=torch.bool)
    early[late] = False

    def best(weights: torch.Tensor, penalty: float) -> torch.Tensor:
        system = torch.einsum("t,ath,bth->ab", weights, outputs, outputs)
        right = torch.einsum("t,ath,th->a", weights, outputs, rest)
        return torch.linalg.solve(system + penalty * system.diagonal().diag(), right)

    def missed(penalty: float) -> float:
        left = rest - torch.einsum("a,ath->th", best(weight * early, penalty), outputs)
        return float((left.square().sum(1) * weight * ~early).sum())

    penalties = (9.0, 3.0, 1.0, 0.3, 0.1, 0.03)
    chosen = min(penalties, key=missed)
    assert chosen not in (penalties[0], penalties[-1])
    found = fitted(blocks, target, kind="scale", penalties=penalties, held_share=0.2)
    assert found.penalties == {"scale": chosen}
    for block, factor in zip(blocks, best(weight, chosen), strict=True):
        torch.testing.assert_close(found.weights[block.name], (1 + factor) * block.weight, rtol=1e-9, atol=1e-9)


def test_scalars_end_at_the_dense_solution() -> None:
    blocks = [expert(1, tokens=torch.arange(0, 250)), expert(2, tokens=torch.arange(400).flip(0)[:300])]
    target = 1.4 * output(blocks[:1]) + 0.8 * output(blocks[1:]) + 0.1 * output([expert(3)])
    found = fitted(blocks, target, kind="scale", penalties=(0.1,))
    for block, factor in zip(blocks, dense_factors(blocks, target, 0.1), strict=True):
        torch.testing.assert_close(found.weights[block.name], (1 + factor) * block.weight, rtol=1e-9, atol=1e-9)


def test_corpora_weigh_the_same_whatever_their_length_and_size() -> None:
    block = expert(1)
    target = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    once = fitted([block], target)
    louder = torch.where(corpora() == 1, 7.0, 1.0)[:, None]
    # The same corpus at seven times the size, three times over.
    again = torch.cat([torch.arange(TOKENS), *[torch.arange(300, 400)] * 2])
    repeated = Block("expert 1", block.weight, torch.arange(len(again)), (block.features * louder)[again])
    found = fit([repeated], (target * louder)[again], whole(corpora()[again]), kind="ridge", **EXACT)
    torch.testing.assert_close(found.weights["expert 1"], once.weights["expert 1"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [0, WIDTH - 1])
def test_an_expert_with_too_few_tokens_keeps_its_weights(count: int) -> None:
    blocks = [expert(1), expert(2, tokens=torch.arange(count))]
    found = fitted(blocks, output([expert(1), expert(2), expert(3)]) * 1.1)
    assert found.kept == {"expert 2": f"{count} tokens to fit, {WIDTH} are needed"}
    assert set(found.weights) == {"expert 1"}


@pytest.mark.parametrize(
    "where, said",
    [
        ("weight", "expert 1: its down projection is not finite"),
        ("features", "expert 1: its activations are not finite"),
        ("target", "the outputs to be fitted are not finite"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_an_error(where: str, said: str, value: float) -> None:
    block, target = expert(1), output([expert(1), expert(2)])
    {"weight": block.weight, "features": block.features, "target": target}[where][3, 2] = value
    with pytest.raises(InputError, match=f"^{said}"):
        fitted([block], target)


def test_equal_activations_of_all_tokens_are_solved_too() -> None:
    block = expert(1)
    block.features[:] = block.features[0]  # a Gram matrix of rank 1
    target = output([block]) + 1.0
    found = fitted([block], target, penalties=(0.0,))
    assert max(found.after) < 1e-18


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
def test_never_worse_on_the_calibration_text_in_the_dtype_of_the_file(kind: str, dtype: torch.dtype, seed: int) -> None:
    blocks = [expert(seed, dtype=dtype), expert(seed + 10, tokens=torch.arange(seed, 400, 3), dtype=dtype)]
    rounding = 1e-3 * torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for target in (output(blocks) + rounding, output([*blocks, expert(seed + 20)])):
        found = fit(blocks, target, whole(corpora()), kind=kind)
        assert all(after <= before for after, before in zip(found.after, found.before, strict=True))
        assert all(weight.dtype == dtype for weight in found.weights.values())
        residual = target - output(blocks, found.weights)
        for number in (0, 1):
            part = corpora() == number
            error = float(residual[part].square().sum() / target[part].square().sum())
            assert error == pytest.approx(found.after[number], rel=1e-9)


def test_the_penalty_comes_from_the_held_out_tokens() -> None:
    block = expert(1)
    lost = expert(2).weight
    target = output([block]) + block.features @ lost.T
    kept = fit([block], target, whole(corpora()), kind="ridge", penalties=(1.0, 1e-6))
    assert kept.penalties["ridge"] == 1e-6  # what holds everywhere asks for the weakest
    # What the first tokens show and the last ones contradict is not learnt at all.
    held = torch.cat([torch.arange(300) >= 240, torch.arange(100) >= 80])
    against = output([block]) + torch.where(held, -1.0, 1.0)[:, None] * (block.features @ lost.T)
    assert fit([block], against, whole(corpora()), kind="ridge").kept == {
        "expert 1": "the held-out calibration text is not fitted better"
    }


def test_the_sketch_chooses_what_the_whole_output_does(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, width, tokens = 200, 40, 600
    blocks, target = [], torch.zeros(tokens, hidden, dtype=torch.float64)
    for name in ("one", "two"):
        weight = torch.randn(hidden, width, generator=generator, dtype=torch.float64)
        features = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
        blocks.append(Block(name, weight, torch.arange(tokens), features))
        target += features @ weight.T
    target += 2.0 * features @ weight.roll(1, 0).T + 40 * torch.randn(
        tokens, hidden, generator=generator, dtype=torch.float64
    )  # asks for a strong penalty
    given = {"kind": "ridge", "penalties": (10.0, 1.0, 0.1, 0.01)}
    part = whole(torch.zeros(tokens).long())
    found = [fit(blocks, target * f, part, **given) for f in (1.0, 1.2)]
    monkeypatch.setattr(ridge, "SKETCH", hidden)
    exact = [fit(blocks, target * f, part, **given) for f in (1.0, 1.2)]
    assert [f.penalties["ridge"] for f in found] == [f.penalties["ridge"] for f in exact]
    assert exact[1].penalties["ridge"] in (10.0, 1.0)


def test_a_corpus_counts_by_its_weight() -> None:
    block = expert(1)
    target = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    alone = fit(
        [Block("expert 1", block.weight, torch.arange(300), block.features[:300])],
        target[:300],
        whole(torch.zeros(300).long()),
        kind="ridge",
        **EXACT,
    )
    without = fitted([block], target, weights=[3, 0])
    torch.testing.assert_close(without.weights["expert 1"], alone.weights["expert 1"], rtol=1e-9, atol=1e-9)
    assert without.after[0] == pytest.approx(alone.after[0])
    twice = fitted([block], target, weights=[2, 2])
    torch.testing.assert_close(twice.weights["expert 1"], fitted([block], target).weights["expert 1"])
    assert fitted([block], target, weights=[1, 9]).after[1] < twice.after[1]


def test_no_corpus_pays_for_another() -> None:
    """Two corpora that want opposite changes: the one that counts more would win, so the layer stays."""
    block = expert(1)
    other, first = (
        torch.randn(HIDDEN, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
        corpora() == 0,
    )
    target = output([block])
    for rows, sign in ((first, 1), (~first, -1)):
        target[rows] += sign * block.features[rows] @ other.T
    stays = fitted([block], target, weights=[9, 1])
    assert not stays.weights
    assert "some corpus" in stays.kept["expert 1"]
    # Without a say of the second, the first has what it wants.
    alone = fitted([block], target, weights=[1, 0])
    assert alone.after[0] < 1e-9 < alone.before[0]
    assert alone.after[1] > alone.before[1]


def test_products_in_float32_end_at_the_same_weights() -> None:
    blocks, target = [expert(1), expert(2, width=9)], output([expert(1), expert(2, width=9), expert(3)])
    exact = fitted(blocks, target, penalties=(0.1,))
    halves = [Block(b.name, b.weight, b.tokens, b.features.float()) for b in blocks]
    found = fitted(halves, target, penalties=(0.1,), tolerance=1e-7)
    for name, weight in exact.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=1e-4, atol=1e-4)


MEMORY = """
import torch
from moecover.repairing.parts import whole
from moecover.repairing.solver import fit, peak_bytes
from moecover.repairing.sums import Block
torch.set_num_threads(1)

def peak():  # of this program alone: `ru_maxrss` begins at the peak of the process that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

tokens, hidden, widths = 10_000, 512, [512] * 4 + [1024]
blocks = [
    Block(str(i), torch.randn(hidden, w), torch.randperm(tokens)[: tokens // 2] if i < 4 else torch.arange(tokens),
          torch.randn(tokens // 2 if i < 4 else tokens, w))
    for i, w in enumerate(widths)
]
target, corpus = torch.randn(tokens, hidden), torch.zeros(tokens).long()
for part in (64, tokens):  # the first time libraries take memory of their own
    small = blocks
    if part < tokens:
        small = [Block(b.name, b.weight, torch.arange(part), b.features[:part]) for b in blocks]
    before = peak()
    fit(small, target[:part], whole(corpus[:part]), kind="ridge", penalties=(1.0, 0.1), sweeps=2)
print(peak() - before, peak_bytes(tokens=tokens, hidden_size=hidden, widths=widths))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a program's memory is read from /proc")
def test_memory_keeps_to_the_stated_bound() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    grown, bound = map(int, done.stdout.split())
    assert bound // 4 < grown <= 1.1 * bound


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(InputError, match="unknown repair 'rigde'. Did you mean ridge"):
        fitted([expert(1)], output([expert(1)]), kind="rigde")
