"""Files of other tools with lists of kept or pruned experts: reads one, gives the ids of every MoE layer, checked.

Nothing in such a file is trusted: layers and ids are checked one by one. Only JSON and JSON lines are opened; a pickle
can run code.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moecover.checkpoints.topology import Topology
from moecover.errors import InputError, arg
from moecover.files.reading import MAX_JSON_BYTES, RepeatedKey, parse_json
from moecover.planning.keep_lists import FORMATS, Format, JsonLines

PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
MOST_DIGITS = 6  # of a layer's number


def document(path: Path) -> object:
    """The value of a list's file: of JSON, or `JsonLines`.

    Raises:
        InputError: no file, a pickle, neither JSON nor JSON lines, or a key that is there twice.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path} is larger than {MAX_JSON_BYTES} bytes: no list of experts is")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Give the file of a keep or prune list") from error
    if path.suffix in PICKLES or content.startswith(PICKLE_STARTS):
        raise InputError(
            f"{path} is a pickle, which can run code when it is read: not opened. Where it was made, save the mask as "
            "JSON, a row of 0 and 1 for every layer, 1 for a kept expert (of RCO's mask, True for a pruned one: "
            f"(~mask).int().tolist()), and give that with {arg('from_format', 'easy-ep')}"
        )
    try:
        return parse_json(content, finite=True, unique=True)
    except RepeatedKey as error:
        raise _twice(path, error) from error
    except ValueError as error:
        lines = [line for line in content.splitlines() if line.strip()]
        try:
            if len(lines) > 1:
                return JsonLines([parse_json(line, finite=True, unique=True) for line in lines])
        except RepeatedKey as repeated:
            raise _twice(path, repeated) from repeated
        except ValueError:
            pass
        raise InputError(f"{path} is neither JSON nor JSON lines: {error}") from error


def _twice(path: Path, error: RepeatedKey) -> InputError:
    """The refusal of a file with a key twice, which is a layer's in most formats."""
    what = "layer" if error.key.isdecimal() else "the key"
    return InputError(f"{path} has {what} {error.key[:40]!r} twice in one object. Leave one of the two")


def format_of(value: object, path: Path) -> Format:
    """The one format that a file can be of.

    Raises:
        InputError: it can be of none, or of several.
    """
    fitting = [row for row in FORMATS.values() if row.fits(value)]
    if not fitting:
        raise InputError(f"{path} is of no format that is known. Known: {', '.join(FORMATS)}")
    if len(fitting) > 1:
        choices = " or ".join(arg("from_format", row.name) for row in fitting)
        raise InputError(f"{path} does not say whether its ids are kept or pruned. Give {choices}")
    return fitting[0]


def ids_by_layer(row: Format, value: object, topology: Topology, path: Path) -> list[list[int]]:
    """What a file lists for every MoE layer, in their order: ids in the order of the file, of a mask the kept ones.

    Layers are decoder layers or indices among the MoE layers, whichever the model has; a complete list is never both.

    Raises:
        InputError: the file is of another format or of a model with another number of experts, a layer is missing,
            given twice or not there, or an id is.
    """
    _check_experts(row, value, topology, path)
    try:
        entries = row.entries(value)
        layers = [_number(key) for key, _ in entries]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        why = f" ({error})" if isinstance(error, ValueError) else ""
        raise InputError(f"{path} is not of format {row.name}{why}: {row.summary}") from error
    decoder = topology.decoder_layers
    wanted = next((keys for keys in (decoder, tuple(range(len(decoder)))) if set(layers) == set(keys)), None)
    if wanted is None:
        raise InputError(
            f"{path} has layers {_few(layers)}. The model has its MoE layers at {_few(decoder)}: the "
            "file must name each of them, by decoder layer or by index among the MoE layers"
        )
    if len(layers) > len(wanted):
        raise InputError(f"{path} has layer {next(n for n in layers if layers.count(n) > 1)} twice")
    lists = {layer: ids for layer, (_, ids) in zip(layers, entries, strict=True)}
    read = _kept_of_mask if row.holds == "mask" else _ids
    return [read(lists[key], topology.num_experts, f"{path}: layer {key}") for key in wanted]


def _check_experts(row: Format, value: object, topology: Topology, path: Path) -> None:
    """Refuse a list that says itself that its model has another number of experts."""
    said = value.get(row.experts, topology.num_experts) if isinstance(value, dict) else topology.num_experts
    if type(said) is not int or said != topology.num_experts:
        raise InputError(
            f"{path} is of a model with {str(said)[:20]} experts per layer ({row.experts}), this one has "
            f"{topology.num_experts}. Give the model that the list was made for"
        )


def _number(key: object) -> int:
    """The number of a layer, an integer or the decimal digits of one."""
    if type(key) is int:
        return key
    if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= MOST_DIGITS and str(int(key)) == key:
        return int(key)
    raise ValueError(f"layer {str(key)[:20]!r} is no number")


def _ids(values: object, experts: int, where: str) -> list[int]:
    found = values if isinstance(values, list) else []
    wrong = next((e for e in found if type(e) is not int or not 0 <= e < experts), None)
    if not isinstance(values, list) or wrong is not None:
        given = "no list" if not isinstance(values, list) else f"{str(wrong)[:20]!r} as an expert"
        raise InputError(f"{where} has {given}. Allowed: ids from 0 to {experts - 1}")
    if len(set(found)) < len(found):
        raise InputError(f"{where} has expert {next(e for e in found if found.count(e) > 1)} twice")
    return found


def _kept_of_mask(values: object, experts: int, where: str) -> list[int]:
    if not isinstance(values, list) or len(values) != experts or any(v not in (0, 1) for v in values):
        raise InputError(f"{where} is no row of {experts} numbers 0 or 1, one for every expert")
    return [e for e, one in enumerate(values) if one]


def _few(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    text = ", ".join(map(str, found))
    return (text or "none") if len(found) <= 8 else f"{found[0]} to {found[-1]} ({len(found)})"
