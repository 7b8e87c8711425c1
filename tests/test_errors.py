"""Messages: one printable line of bounded length, whatever text they quote; arguments as flags or as names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecover.errors import LONGEST, InputError, MoecoverError, arg, printable, shortened


def test_arguments_are_flags_on_the_command_line() -> None:
    error = InputError(f"{arg('batch_size', 0)} is out of range; see {arg('corpora')}")
    assert str(error) == "batch_size=0 is out of range; see corpora"
    assert error.for_command_line == "--batch-size 0 is out of range; see --corpus"
    assert str(error.extended("Another sentence")).endswith("corpora. Another sentence")


@given(st.text(st.characters(), max_size=2000))
def test_any_quoted_text_gives_one_printable_line(text: str) -> None:
    error = MoecoverError(f"{text}: no such file; {arg('plan', text)}, {arg('keep')}")
    for message in (str(error), error.for_command_line):
        assert message.isprintable()
        assert len(message) <= LONGEST


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\nb\tc\r\nd", "a b c  d"),
        ("\x1b[31mred\x1b[0m\x07", r"\x1b[31mred\x1b[0m\x07"),
        ("a\u2028b\u00a0c", "a b c"),
        ("evil\u202egnp.exe\u200b", r"evil\u202egnp.exe\u200b"),
        ("\ud800", r"\ud800"),
        ("größe 数 🙂", "größe 数 🙂"),
    ],
)
def test_what_a_terminal_could_obey_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable("a\nb\x00", lines=True) == "a\nb\\x00"


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    text = shortened("start " + "a b" * 10_000 + " remedy", 100)
    assert len(text) == 100
    assert text.startswith("start a b")
    assert text.endswith("a b remedy")
    path = "/a/long/folder" * 20 + "/file.safetensors"
    assert shortened(f"{path}: no such file. Give another", 100).endswith(
        "/file.safetensors: no such file. Give another"
    )
    assert shortened("short") == "short"
