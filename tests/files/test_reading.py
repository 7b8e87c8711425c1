"""The bounded readers of JSON and YAML: what is accepted, and that all else is refused quickly and in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moecover.files.reading import (
    MAX_DEPTH,
    MAX_JSON_BYTES,
    MAX_VALUES,
    RepeatedKey,
    parse_json,
    parse_yaml,
    read_json,
    read_yaml,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=20,
)
LAUGHS = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10 if i else ['lol'] * 10)}]\n" for i in range(5))


@given(JSON)
def test_json_reads_what_the_library_reads(value: object) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 1500 + "]" * 1500, "nested deeper"),
        ('{"a":' * 1500 + "1" + "}" * 1500, "nested deeper"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested deeper"),
        ("[" + "1," * MAX_VALUES + "1]", f"more than {MAX_VALUES} values"),
        (b" " * (MAX_JSON_BYTES + 1), "bytes of JSON"),
        ('{"\\ud800": 1}', r"lone surrogate U\+D800"),
        ('["\\udfff"]', r"lone surrogate U\+DFFF"),
        ("9" * 5000, "4300 digits"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        (b"\xff\xfe{\x00}\x00", "codec can't decode"),
        ("\ufeff{}", "BOM"),
    ],
)
def test_json_that_is_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_json(text)


def test_a_key_that_is_there_twice_is_refused_where_asked() -> None:
    text = '[{"a": 1}, {"b": {"a": 1, "c": 2, "a": 1}}]'
    assert parse_json(text) == [{"a": 1}, {"b": {"a": 1, "c": 2}}]
    with pytest.raises(RepeatedKey, match="it has the key 'a' twice"):
        parse_json(text, unique=True)


def test_the_deepest_json_that_is_read() -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None


@pytest.mark.parametrize("text", ["NaN", "[1, -Infinity]", '{"a": [1e999]}'])
def test_numbers_that_are_not_finite_are_refused_where_asked(text: str) -> None:
    parse_json(text)
    with pytest.raises(ValueError, match="not a finite number"):
        parse_json(text, finite=True)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(FileNotFoundError):
        read_json(path)
    path.write_text('{"a": [1, {"b": "é"}]}', encoding="utf-8")
    assert read_json(path) == {"a": [1, {"b": "é"}]}
    assert read_yaml(path)[0] == read_json(path)


def test_yaml_with_aliases_and_merge_keys() -> None:
    value, node = parse_yaml("base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  b: 3\nlist: [*base, *base]\n")
    assert value == {"base": {"a": 1, "b": 2}, "other": {"a": 1, "b": 3}, "list": [{"a": 1, "b": 2}] * 2}
    assert isinstance(node, yaml.MappingNode)
    assert len(node.value) == 3
    assert parse_yaml("# nothing") == (None, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "aliases expanded"),
        ("a: &a [*a]", "nested deeper"),
        ("[" * 500 + "]" * 500, "nested deeper"),
        ("[" * 5000, "nested deeper"),
        ("- 1\n" * 25_000, "values, aliases expanded"),
        ("x" * 300_000, "characters of YAML"),
        ("a: 2001-99-99", "month must be"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("!!float abc", "could not convert"),
        ("!!bool abc", "does not fit its tag"),
        ("!!timestamp abc", "does not fit its tag"),
        ('a: "\\ud800"', "lone surrogate"),
    ],
)
def test_yaml_that_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_yaml(text)


@pytest.mark.parametrize("text", ["{", "a: 1\n---\nb: 2", "? [a]\n: b", "!!python/object:os.system x", "a: \x01"])
def test_what_is_not_plain_yaml_raises_the_errors_of_the_library(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


@pytest.mark.parametrize("read", [parse_json, parse_yaml])
@given(st.text(max_size=200))
def test_any_text_gives_a_value_or_one_of_the_two_errors(read: Callable[[str], object], text: str) -> None:
    try:
        read(text)
    except (ValueError, yaml.YAMLError):
        return
