"""How files are damaged: hypothesis strategies over JSON documents, bytes and text."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    2**31,
    2**63,
    -(2**70),
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "0",
    "null",
    "a/b",
    "../../x",
    "/etc/passwd",
    "x" * 5000,
    "\x1b[31m\x07",
    "a\nb\u2028c",
    "\u202e",
    "|`<b>",
    "[b]",
    "%s {x}",
    "é🙂",
    [],
    {},
    [[]],
    [None],
    [0, 0, 0],
    ["a", 1],
    {"a": 1},
    {"": None},
    list(range(300)),
)
RAW = ('"\\ud800"', "[" * 1500 + "]" * 1500, '{"a":' * 400 + "1" + "}" * 400, "9" * 5000, "1e999", "-0", '"\\u0000"')
MARK = "@raw@"


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place within a JSON value, as the keys that lead to it."""
    yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*at, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value[:8]):
            yield from places(inner, (*at, number))


def changed(value: Any, at: tuple[Any, ...], how: str, new: Any) -> Any:
    """A JSON value with one place replaced, removed, doubled or renamed."""
    if not at:
        return new
    made = copy.deepcopy(value)
    inside = made
    for key in at[:-1]:
        inside = inside[key]
    if how == "remove":
        del inside[at[-1]]
    elif how == "double" and isinstance(inside, list):
        inside.append(copy.deepcopy(inside[at[-1]]))
    elif how in ("double", "rename") and isinstance(inside, dict):
        kept = inside[at[-1]] if how == "double" else inside.pop(at[-1])
        inside[new if isinstance(new, str) else f"{at[-1]}x"] = copy.deepcopy(kept)
    else:
        inside[at[-1]] = new
    return made


@st.composite
def json_text(draw: st.DrawFn, value: Any) -> str:
    """A JSON text with one to three changes of a value, some of which no JSON library writes."""
    made = value
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(list(places(made))))
        how = draw(st.sampled_from(("replace", "replace", "replace", "remove", "double", "rename")))
        made = changed(made, at, how, draw(st.sampled_from((*HOSTILE, MARK))))
    return json.dumps(made).replace(f'"{MARK}"', draw(st.sampled_from(RAW)))


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with flipped bits, a part that is cut out, doubled or overwritten, or the end missing."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(made) - 1)))
        end = min(len(made), start + draw(st.integers(1, 64)))
        how = draw(st.sampled_from(("flip", "cut", "double", "overwrite", "truncate", "insert")))
        if how == "flip" and made:
            made[start] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del made[start:end]
        elif how == "double":
            made[start:start] = made[start:end]
        elif how == "truncate":
            del made[start:]
        else:
            other = draw(st.binary(max_size=40))
            made[start : end if how == "overwrite" else start] = other
    return bytes(made)


def files(value: Any) -> st.SearchStrategy[bytes]:
    """A JSON file: its value changed, or its bytes damaged."""
    text = json.dumps(value, indent=1).encode()
    return st.one_of(json_text(value).map(lambda found: found.encode("utf-8", "surrogatepass")), damaged(text))


WORDS = st.sampled_from(
    (
        "models:",
        "methods:",
        "- ",
        "  ",
        "\n",
        "&a ",
        "*a",
        "<<: *a",
        "[",
        "]",
        "{",
        "}",
        ": ",
        "!!python/object:os.system ",
        "!!binary ",
        "| ",
        "? ",
        "retain: ",
        "0.5",
        "nan",
        ".inf",
        "2001-99-99",
        "seeds: ",
        "'",
        '"',
        "\t",
        "#",
        "---\n",
        "~",
        "tb-coverage",
        "calibration:",
        "perplexity:",
        "0x",
        "1e400",
        "\x00",
        "\u2028",
        "é",
    )
)


@st.composite
def yaml_text(draw: st.DrawFn, text: str) -> bytes:
    """YAML with a few words put in or lines taken out, or damaged bytes."""
    if draw(st.booleans()):
        return draw(damaged(text.encode()))
    lines = text.splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(lines) - 1)))
        if draw(st.booleans()) and lines:
            del lines[at]
        else:
            lines[at:at] = [draw(st.lists(WORDS, max_size=6).map("".join))]
    return "".join(lines).encode("utf-8", "surrogatepass")
