"""Profiles of GGUF files in llama.cpp: the statistics of the checkpoint that they were converted from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from moecover.corpora.packing import Corpus
from moecover.errors import InputError
from moecover.gguf.parts import open_gguf
from moecover.llama import model as llama_model
from moecover.llama.opening import check_options
from moecover.profiling.artifact import Profile
from moecover.profiling.job import merge, profile
from moecover.profiling.statistics import COUNTS, STATISTICS
from moecover.profiling.wide import WIDE
from moecover.progress import Silent
from tests.conftest import random_corpus
from tests.support.command_line import run
from tests.support.gguf_models import needs_llama
from tests.support.tiny import TEXT

pytestmark = needs_llama


def corpora() -> list[Corpus]:
    """Two corpora; sequences of the first differ in length, so that it has padding."""
    first = random_corpus("a", seed=1, sequences=9)
    first.mask[[2, 5], :7] = False
    first.mask[7, 20:] = False
    return [first, random_corpus("b", seed=2)]


class Saying(Silent):
    """Keeps the lines of log."""

    def __init__(self, lines: list[str]) -> None:
        self.say = lines.append


def assert_same(found: Profile, expected: Profile, tolerance: float) -> None:
    """Equal counts, sums that differ by the rounding of float32."""
    for corpus, statistics in expected.statistics.items():
        for name in STATISTICS:
            got, wanted = found.statistics[corpus][name], statistics[name]
            parts = found.parts[corpus][name], expected.parts[corpus][name]
            if np.isnan(got).all():
                assert name == "change_norm_sum"  # llama.cpp does not show the residual stream
            elif name in COUNTS:
                assert np.array_equal(got, wanted), name
                assert np.array_equal(*parts), name
            else:
                np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * wanted.max(), err_msg=name)
                np.testing.assert_allclose(*parts, rtol=tolerance, atol=tolerance * wanted.max(), err_msg=name)
        for name in WIDE:
            got, wanted = found.wide[name][corpus], expected.wide[name][corpus]
            np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * wanted.max(), err_msg=name)


@pytest.mark.parametrize("family, chunk", [("qwen2_moe", 512), ("deepseek_v3", 10), ("gpt_oss", 512)])
def test_statistics_are_those_of_the_checkpoint(
    converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str, chunk: int
) -> None:
    """A shared expert, weights not normalised; groups, a sigmoid, a correction bias, a dense layer; biases."""
    monkeypatch.setattr(llama_model, "CHUNK", chunk)
    model = converted(family)
    found = profile(model, corpora(), batch_size=2, progress=False)
    expected = profile(model.with_name("checkpoint"), corpora(), batch_size=2, dtype="float32", progress=False)
    assert found.topology.decoder_layers == expected.topology.decoder_layers
    assert_same(found, expected, 1e-5)
    assert found.settings["versions"]["llama.cpp"]


def test_the_command_line_reads_text_in_the_files_own_tokens(
    converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same blocks as with the checkpoint's tokenizer; what spells a special token is text."""
    model, text = converted("deepseek_v3"), tmp_path / "text.txt"
    text.write_text((TEXT + "An <end> is text, größe too.\n") * 60)
    options = ["--corpus", f"text={text}", "--length", "32", "--sequences", "6"]
    checkpoint = model.with_name("checkpoint")
    status, out, _ = run(capsys, "profile", model, *options, "-o", tmp_path / "gguf", "--dry-run")
    assert (status, "the model in llama.cpp" in out, (tmp_path / "gguf").exists()) == (0, True, False)
    assert run(capsys, "profile", model, *options, "-o", tmp_path / "gguf")[0] == 0
    assert run(capsys, "profile", checkpoint, *options, "--dtype", "float32", "-o", tmp_path / "hf")[0] == 0
    found, expected = Profile.load(tmp_path / "gguf"), Profile.load(tmp_path / "hf")
    assert found.corpora == expected.corpora
    assert_same(found, expected, 1e-5)
    assert not [*tmp_path.glob(".gguf*partial*")]
    status, _, message = run(capsys, "profile", model, *options, "--dtype", "float32", "-o", tmp_path / "other")
    assert (status, "--dtype has no use here" in message) == (2, True)
    bound = ["--max-perplexity-increase", "9%", "--perplexity", f"x={text}", "-o", tmp_path / "plan.json"]
    status, _, message = run(capsys, "plan", tmp_path / "gguf", "--model", model, *bound)
    assert (status, "which transformers does not run" in message, "`shrink` does it all" in message) == (2, True, True)


def test_an_interrupted_profile_resumes_and_ends_the_same(converted: Callable[..., Path], tmp_path: Path) -> None:
    model, seen = converted("deepseek_v3"), 0

    class Interrupted(Silent):
        @contextlib.contextmanager
        def bar(self, label: str, total: int, *, unit: str = "tokens") -> Iterator[Callable[[int], None]]:
            def advance(tokens: int) -> None:
                nonlocal seen
                seen += tokens
                if seen > total // 2:
                    raise KeyboardInterrupt

            yield advance

    with pytest.raises(KeyboardInterrupt):
        profile(model, corpora(), batch_size=2, output=tmp_path / "out", progress=Interrupted())
    said = list[str]()
    resumed = profile(model, corpora(), batch_size=2, output=tmp_path / "out", progress=Saying(said))
    assert any("resuming: " in line for line in said)
    whole = profile(model, corpora(), batch_size=2, progress=False)
    assert resumed.fingerprint == whole.fingerprint
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


def test_profiles_of_a_file_add_up_and_a_quantised_one_is_near(converted: Callable[..., Path]) -> None:
    model, (a, b) = converted("qwen2_moe"), corpora()
    both = profile(model, [a, b], progress=False)
    summed = merge([profile(model, [one], progress=False) for one in (a, b)], progress=False)
    assert summed.fingerprint == both.fingerprint
    near = profile(converted("qwen2_moe", "F16"), [b], progress=False).statistics["b"]
    np.testing.assert_allclose(near["norm_sum"], both.statistics["b"]["norm_sum"], rtol=0.01)


def test_what_cannot_be_profiled_is_refused_in_a_line(converted: Callable[..., Path], tmp_path: Path) -> None:
    model = converted("deepseek_v3")
    with pytest.raises(InputError, match="keep_inputs has no use here"):
        profile(model, corpora(), keep_inputs=8, output=tmp_path / "out", progress=False)
    with pytest.raises(InputError, match="device=cuda: of a GGUF file auto .* or cpu"):
        check_options({"device": "cuda"})
    with pytest.raises(InputError, match="libllama=.*no such file"):
        profile(model, corpora(), libllama=tmp_path / "libllama.so", progress=False)
    with pytest.raises(InputError, match="libllama.* has no use here"):
        profile(model.with_name("checkpoint"), corpora(), libllama="x.so", progress=False)
    broken = tmp_path / "broken.gguf"
    key = b"deepseek2.attention.head_count"
    broken.write_bytes(model.read_bytes().replace(key + b"\x04", key[:-5] + b"other\x04"))
    with pytest.raises(InputError, match=r"does not load .*broken.gguf: .*attn_q_b"):
        profile(broken, corpora(), progress=False)
    info = max(open_gguf(model).tensors.values(), key=lambda one: ("down_exps" in one.name, one.name))
    broken.write_bytes(model.read_bytes()[: info.end - 4] + b"\0\0\xc0\x7f" + model.read_bytes()[info.end :])
    with pytest.raises(InputError, match="expert 11: the output is not finite. The weights of the file hold NaN"):
        profile(broken, corpora(), progress=False)
