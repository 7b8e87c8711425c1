"""What config.json says about experts, and how it is edited: reads the raw JSON, gives numbers or the edited text.

The raw JSON is edited and never rewritten by a configuration class, so that a server finds the hub's own keys.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from moecover.errors import InputError
from moecover.files.reading import parse_json

Config = dict[str, Any]  # parsed config.json: its keys and their types differ by family

COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token", "moe_top_k")
GROUP_KEYS = ("n_group", "num_expert_group")
QUANTISATION_KEYS = ("quantization_config", "compression_config")
QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# A name (or pattern) of a module or tensor of one expert: layer number and expert number; dots may be escaped.
EXPERT_NAME = re.compile(r"(\d+)(\\?\.(?:[^.\\]+\\?\.)*?experts\\?\.)(\d+)(?!\d)")

# A name, the layer number and the expert id in it -> the new id; None if that expert is removed.
NewId = Callable[[str, int, int], int | None]


def _parts(config: Config, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Config]]:
    """The configuration and the ones nested in it, with their paths."""
    yield path, config
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("config") and key not in QUANTISATION_KEYS:
            yield from _parts(value, (*path, key))


def expert_count_keys(config: Config) -> dict[tuple[str, ...], int]:
    """Paths of the keys of a raw config that count the decoder's routed experts, with their values above one."""
    return {
        (*path, key): value
        for path, part in _parts(config)
        if not {"vision_config", "audio_config"}.intersection(path)
        for key in COUNT_KEYS
        if isinstance(value := part.get(key), int) and not isinstance(value, bool) and value > 1
    }


def with_expert_count(config: Config, keys: tuple[tuple[str, ...], ...], count: int) -> Config:
    """A copy of a raw config with every expert-count key set to ``count``."""
    edited = copy.deepcopy(config)
    for path in keys:
        part = edited
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = count
    return edited


def first_number(config: Config, keys: tuple[str, ...]) -> int | None:
    """The first integer under one of the keys, in a raw config or the ones nested in it; None if there is none."""
    for _, part in _parts(config):
        for key in keys:
            if isinstance(part.get(key), int):
                return int(part[key])
    return None


def quantisation(config: Config) -> str | None:
    """The quantisation that a raw config declares (``fp8``, ``gptq``, ...); None if it declares none."""
    for _, part in _parts(config):
        for key in QUANTISATION_KEYS:
            if isinstance(found := part.get(key), dict):
                return str(found.get("quant_method") or found.get("format") or "a method that it does not name")
    return None


def without_mtp(config: Config) -> Config:
    """A copy of a raw config without multi-token-prediction layers: counts are 0, lists empty, switches off."""
    edited = copy.deepcopy(config)
    for _, part in _parts(edited):
        for key, value in part.items():
            if not re.search(r"mtp|nextn", key):
                continue
            if key == "use_mtp":
                part[key] = False
            elif isinstance(value, list):
                part[key] = []
            elif type(value) is int and re.search(r"(layers|modules|heads)$", key):
                part[key] = 0
    return edited


def renumbered(value: Any, new_id: NewId) -> Any:
    """A JSON value in which strings and keys that name an expert use its new id; those of removed experts are left out.

    Raises:
        InputError: a pattern names an expert without the number of its layer, so that no id fits all layers.
    """
    if isinstance(value, str):
        return _new_name(value, new_id)
    if isinstance(value, list):
        return [v for v in (renumbered(item, new_id) for item in value) if v is not None]
    if isinstance(value, dict):
        items = ((renumbered(k, new_id), renumbered(v, new_id), v) for k, v in value.items())
        return {k: v for k, v, old in items if k is not None and (v is not None or old is None)}
    return value


def _new_name(name: str, new_id: NewId) -> str | None:
    match = EXPERT_NAME.search(name)
    if match is None:
        if re.search(r"experts\\?\.\d", name):
            raise InputError(
                f"the quantisation settings name an expert without its layer ({name}), which cannot be renumbered. "
                "Write out the layers"
            )
        return name
    new = new_id(name, int(match[1]), int(match[3]))
    return None if new is None else f"{name[: match.start(3)]}{new}{name[match.end(3) :]}"


def edited_config(
    text: str, count_keys: tuple[tuple[str, ...], ...], experts: int, keep: int, *, new_id: NewId, drop_mtp: bool
) -> str:
    """Edit config.json for ``keep`` experts: the expert counts, and names of experts in the quantisation settings.

    The text itself is edited, so that order, spacing and the spelling of floats are kept. Where that is ambiguous (the
    key occurs twice with different meanings, lists change), the JSON is rewritten.

    Args:
        text: config.json of the source.
        count_keys: paths of the keys that count experts.
        experts: number of experts of the source.
        keep: number of experts that are kept.
        new_id: the new id of an expert.
        drop_mtp: also remove multi-token-prediction layers.
    """
    wanted = with_expert_count(parse_json(text), count_keys, keep)
    if drop_mtp:
        wanted = without_mtp(wanted)
    for _, part in _parts(wanted):
        for key in QUANTISATION_KEYS:
            if key in part:
                part[key] = renumbered(part[key], new_id)
    edited = text
    for path in count_keys:
        edited = re.sub(rf'("{re.escape(path[-1])}"\s*:\s*){experts}\b', rf"\g<1>{keep}", edited)
    if drop_mtp:
        edited = re.sub(r'("\w*(?:mtp|nextn)\w*(?:layers|modules|heads)"\s*:\s*)\d+\b', r"\g<1>0", edited)
        edited = re.sub(r'("use_mtp"\s*:\s*)true\b', r"\g<1>false", edited)
    if json.loads(edited) == wanted:
        return edited
    return json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"


def edited_settings(text: str, new_id: NewId) -> str:
    """A quantiser's own settings file with the names of experts renumbered; the same text if it names none.

    Raises:
        InputError: see `renumbered`.
    """
    try:
        value = parse_json(text)
    except ValueError:
        return text  # not JSON in spite of its name: copied as it is
    edited = renumbered(value, new_id)
    return text if edited == value else json.dumps(edited, indent=4, ensure_ascii=False) + "\n"
