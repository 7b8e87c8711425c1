"""GGUF headers: what the `gguf` package writes is read, what is malformed is refused in one line."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from gguf.constants import GGML_QUANT_SIZES

from moecover.errors import InputError
from moecover.gguf.header import read_header
from moecover.gguf.parts import open_gguf
from moecover.gguf.types import BLOCK_TYPES, RETIRED
from tests.support.gguf_files import tensors_of, write_gguf


def text(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: bytes | str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: bytes | str = "w", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def content(
    pairs: tuple[bytes, ...] = (),
    infos: tuple[bytes, ...] = (info(),),
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
    data: int = 32,
) -> bytes:
    """A file by hand."""
    tensors, keys = counts or (len(infos), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % 32 + data)


ALIGN = "general.alignment"
LONG = struct.pack("<Q", 2**63)
GOOD = content((pair("a", 8, text("ü")), pair("b", 9, struct.pack("<IQ", 8, 2) + text("x") + text(b"\xff"))))
MALFORMED = {
    "empty": (b"", "begins with"),
    "another format": (b"PK\3\4" + GOOD[4:], r"no GGUF file, it begins with b'PK"),
    "four bytes": (GOOD[:6], "truncated"),
    "version 1": (content(version=1), "GGUF of version 1, versions 2 and 3 are read"),
    "a later version": (content(version=4), "GGUF of version 4"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + GOOD[8:], "big-endian byte order"),
    "no counts": (GOOD[:12], "truncated"),
    "within the keys": (GOOD[:40], "truncated"),
    "within the infos": (GOOD[:90], "truncated"),
    "within the data": (GOOD[:-1], r"truncated: tensor w takes bytes \d+ to \d+ of \d+"),
    "many tensors": (content(counts=(2**63, 0)), "9223372036854775808 tensors, at most"),
    "many keys": (content(counts=(1, 2**40)), "1099511627776 keys, at most"),
    "a tensor more": (content(counts=(2, 0)), "of|truncated|axes"),
    "a key more": (content(counts=(1, 1)), "unknown type|truncated|allowed"),
    "a long string": (content((pair("a", 8, LONG),)), "truncated, or a length is wrong"),
    "a long string in an array": (content((pair("a", 9, struct.pack("<IQ", 8, 1) + LONG),)), "1 strings at byte"),
    "a long array": (content((pair("a", 9, struct.pack("<IQ", 4, 2**63)),)), "an array .* 9223372036854775808 items"),
    "an array behind the end": (content((pair("a", 9, struct.pack("<IQ", 4, 2**20)),)), "truncated"),
    "many strings": (content((pair("a", 9, struct.pack("<IQ", 8, 2**20)),)), "1048576 strings"),
    "an array of arrays": (content((pair("a", 9, struct.pack("<IQ", 9, 1)),)), "items of type 9"),
    "an unknown value": (content((pair("a", 13, b"1234"),)), "unknown type 13"),
    "a long key": (content((struct.pack("<Q", 70_000) + bytes(70_000),)), "a key .* 70000 bytes, at most 65535"),
    "a key that is no text": (content((pair(b"\xff\xfe", 4, b"1234"),)), "a key is not UTF-8"),
    "a key twice": (content((pair("a", 4, b"1234"),) * 2), "key a is there twice"),
    "alignment 0": (content((pair(ALIGN, 4, struct.pack("<I", 0)),)), f"{ALIGN} is 0, a power of two"),
    "alignment 48": (content((pair(ALIGN, 4, struct.pack("<I", 48)),)), f"{ALIGN} is 48, a power of two"),
    "alignment as text": (content((pair(ALIGN, 8, text("32")),)), f"{ALIGN} is '32', a power of two"),
    "alignment as an array": (content((pair(ALIGN, 9, struct.pack("<IQ", 4, 0)),)), f"{ALIGN} is None"),
    "a name that is no text": (content((), (info(b"\xff"),)), "a tensor's name is not UTF-8"),
    "a long name": (content((), (info("n" * 64),)), "a tensor's name .* 64 bytes, at most 63"),
    "a tensor twice": (content((), (info(), info(offset=32)), data=64), "tensor w is there twice"),
    "no axes": (content((), (info(shape=()),)), "0 axes, 1 to 4"),
    "five axes": (content((), (info(shape=(1,) * 5),)), "5 axes, 1 to 4"),
    "an empty axis": (content((), (info(shape=(0, 8)),)), r"the shape \[8, 0\], which no file can hold"),
    "huge axes": (content((), (info(shape=(2**63, 2**63)),)), "which no file can hold"),
    "unknown block type": (content((), (info(kind=99),)), "tensor w has the unknown type 99"),
    "retired block type": (content((), (info(kind=31),)), "tensor w has the retired type Q4_0_4_4"),
    "half a block": (content((), (info(shape=(33,), kind=8),)), "rows of 33 numbers, Q8_0 has them in blocks of 32"),
    "not aligned": (content((), (info(offset=8),)), "begins at byte 8 of the data, no multiple of 32"),
    "behind the end": (content((), (info(offset=2**40),)), "truncated: tensor w takes bytes"),
    "a huge offset": (content((), (info(offset=2**63),)), "truncated: tensor w takes bytes"),
    "overlapping": (content((), (info("a", (16,)), info("b", offset=32)), data=64), "tensors a and b overlap at byte"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_file_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    raw, message = MALFORMED[what]
    file = tmp_path / "m.gguf"
    file.write_bytes(raw)
    with pytest.raises(InputError, match=message) as caught:
        read_header(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_keys_are_read_and_strings_of_arrays_are_left_alone(tmp_path: Path) -> None:
    """A token that is no UTF-8 is no reason to refuse a file; a text that is asked for is."""
    (tmp_path / "m.gguf").write_bytes(GOOD)
    header = read_header(tmp_path / "m.gguf")
    assert (header.text("a"), header.text("missing"), header.number("missing")) == ("ü", None, None)
    assert (header.version, header.alignment, list(header.fields)) == (3, 32, ["a", "b"])
    with pytest.raises(InputError, match="b is no text in UTF-8"):
        header.text("b")
    with pytest.raises(InputError, match="a is no integer"):
        header.number("a")
    (tmp_path / "n.gguf").write_bytes(content((pair("a", 8, text(b"\xff")),), version=2))
    other = read_header(tmp_path / "n.gguf")
    assert other.version == 2
    with pytest.raises(InputError, match="a is no text in UTF-8"):
        other.text("a")


def test_block_types_are_those_of_the_package() -> None:
    theirs = {kind.value: (kind.name, *GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {number: tuple(kind) for number, kind in BLOCK_TYPES.items()} == theirs
    assert not RETIRED.keys() & BLOCK_TYPES.keys()


@pytest.mark.parametrize("alignment", [None, 64])
def test_every_block_type_lies_where_the_package_finds_it(tmp_path: Path, alignment: int | None) -> None:
    shapes = {f"blk.{n}.{kind.name}": (3, 2, kind.block * 2) for n, kind in BLOCK_TYPES.items()}
    types = {f".{kind.name}": kind.name for kind in sorted(BLOCK_TYPES.values(), key=lambda k: -len(k.name))}
    file = write_gguf(tmp_path / "m.gguf", "llama", shapes, types=types, alignment=alignment)
    header, raw, theirs = read_header(file), file.read_bytes(), tensors_of(file)
    assert header.alignment == (alignment or 32)
    ours = {t.name: (t.kind.name, t.shape, raw[t.start : t.end]) for t in header.tensors.values()}
    assert ours == theirs
    assert {kind for kind, _, _ in ours.values()} == {kind.name for kind in BLOCK_TYPES.values()}


def change(file: Path, old: bytes, new: bytes) -> None:
    raw = file.read_bytes()
    assert raw.count(old) == 1
    file.write_bytes(raw.replace(old, new))


def other_part(first: Path, number: int) -> Path:
    return first.with_name(first.name.replace("00001-of", f"{number:05d}-of"))


def use_another(first: Path, tmp_path: Path) -> None:
    """A part of a model of the same architecture with other names."""
    shapes = {f"blk.{n}.x.weight": (8,) for n in range(9)}
    another = write_gguf(tmp_path / "o.gguf", "qwen2moe", shapes, parts=3)
    other_part(another, 2).replace(other_part(first, 2))


SPLIT: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing": (
        lambda first, _: other_part(first, 3).unlink(),
        "m-00003-of-00003.gguf is missing: m-00001-of-00003.gguf",
    ),
    "renamed": (lambda first, _: first.rename(first.with_name("m.gguf")), r"m-00001-of-00003.gguf$"),
    "swapped": (
        lambda first, _: other_part(first, 3).write_bytes(other_part(first, 2).read_bytes()),
        "it has split.no 1",
    ),
    "of another model": (use_another, "3 parts have|is no part of the model"),
    "another count": (
        lambda first, _: change(
            other_part(first, 2), b"split.count" + struct.pack("<IH", 2, 3), b"split.count" + struct.pack("<IH", 2, 4)
        ),
        "split.no 1, split.count 4",
    ),
    "another total": (
        lambda first, _: [
            change(
                other_part(first, n),
                b"split.tensors.count" + struct.pack("<Ii", 5, 40),
                b"split.tensors.count" + struct.pack("<Ii", 5, 39),
            )
            for n in (1, 2, 3)
        ],
        "split.tensors.count is 39, its 3 parts have 40 tensors",
    ),
}


@pytest.mark.parametrize("what", SPLIT)
def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path, what: str) -> None:
    damage, message = SPLIT[what]
    first = write_gguf(tmp_path / "m.gguf", "qwen2moe", parts=3)
    assert len(open_gguf(first).tensors) == 40
    with pytest.raises(InputError, match="is part 2 of 3. Give the first"):
        open_gguf(other_part(first, 2))
    damage(first, tmp_path)
    with pytest.raises(InputError, match=message):
        open_gguf(first)


def test_the_first_part_under_another_name_is_refused(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m.gguf", "qwen2moe", parts=3)
    with pytest.raises(
        InputError, match=r"no file .*m.gguf. The model is split: give its first part, m-00001-of-00003"
    ):
        open_gguf(tmp_path / "m.gguf")
    for address in ("owner/name/m.gguf", "https://huggingface.co/owner/name/m.gguf"):
        with pytest.raises(InputError, match="no file .*. Fetch it from the hub: hf download OWNER/NAME FILE.gguf"):
            open_gguf(Path(address))
    moved = first.rename(tmp_path / "m.gguf")
    with pytest.raises(InputError, match="is the first of 3 parts, whose names end in -00001-of-00003.gguf. Rename it"):
        open_gguf(moved)


def test_a_header_that_changed_is_noticed(tmp_path: Path) -> None:
    """Whatever changes in it, or the size of the file; the data may."""
    content = write_gguf(tmp_path / "m.gguf", "qwen3moe").read_bytes()
    header = read_header(tmp_path / "m.gguf")
    assert header.is_unchanged()
    first = min(tensor.start for tensor in header.tensors.values())
    name = content.rindex(b"output_norm.weight", 0, first)
    for place, same in (
        (4, False),
        (8, False),
        (16, False),
        (header.pairs_start + 9, False),
        (name, False),
        (-1, True),
    ):
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / "m.gguf").write_bytes(changed)
        assert header.is_unchanged() == same, place
    (tmp_path / "m.gguf").write_bytes(content[:-1])
    assert not header.is_unchanged()
