"""What config.json says about experts, and how it is edited: reads the raw JSON, gives numbers or the edited text.

The raw JSON is edited and never rewritten by a configuration class, so that a server finds the hub's own keys.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moecover.errors import InputError
from moecover.files.reading import parse_json

Config = dict[str, Any]  # parsed config.json: its keys and their types differ by family

COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token", "moe_top_k")
GROUP_KEYS = ("n_group", "num_expert_group")
SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
OTHER_COUNTS = ("topk_group", *SHARED_KEYS)
OTHER_CONFIGS = {"vision_config", "audio_config"}  # of other parts of a multimodal model
QUANTISATION_KEYS = ("quantization_config", "compression_config")
QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")


def _parts(config: Config, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Config]]:
    """The configuration and the ones nested in it, with their paths."""
    yield path, config
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("config") and key not in QUANTISATION_KEYS:
            yield from _parts(value, (*path, key))


def number(value: object) -> int | None:
    """A count of a raw config as one number; None if it is no count.

    Some families give a list with a value for every layer: this is its maximum (the same number for all, as a rule).
    """
    if type(value) is int:
        return value
    counts = [v for v in value if type(v) is int] if isinstance(value, list) else []
    return max(counts) if isinstance(value, list) and counts and len(counts) == len(value) else None


def check_counts(config: Config, name: str) -> None:
    """Refuse a raw config whose counts of experts, of experts per token or of groups are no whole numbers from 0.

    Args:
        config: parsed config.json.
        name: the checkpoint, in messages.

    Raises:
        InputError: one is not, or layers have different numbers of experts.
    """
    for path, part in _parts(config):
        if OTHER_CONFIGS.intersection(path):
            continue
        for key in (*COUNT_KEYS, *TOP_K_KEYS, *GROUP_KEYS, *OTHER_COUNTS):
            value, where = part.get(key), f"{name}: config.json has {'.'.join((*path, key))}"
            if value is None:
                continue
            if number(value) is None or min(value if isinstance(value, list) else [value]) < 0:
                raise InputError(f"{where} {value!r}, a whole number from 0 on is needed")
            if key in COUNT_KEYS and isinstance(value, list) and len(set(value)) > 1:
                raise InputError(
                    f"{where} {value!r}: layers with different numbers of experts are not supported, for stock loaders "
                    "read one number"
                )


def expert_count_keys(config: Config) -> dict[tuple[str, ...], int]:
    """Paths of the keys of a raw config that count the decoder's routed experts, with their values above one."""
    return {
        (*path, key): value
        for path, part in _parts(config)
        if not OTHER_CONFIGS.intersection(path)
        for key in COUNT_KEYS
        if (value := number(part.get(key))) is not None and value > 1
    }


def top_k_keys(config: Config, top_k: int) -> tuple[tuple[str, ...], ...]:
    """Paths of the keys of a raw config that hold the decoder's number of experts per token, the same in every layer.

    Args:
        config: parsed config.json.
        top_k: that number.
    """
    return tuple(
        (*path, key)
        for path, part in _parts(config)
        if not OTHER_CONFIGS.intersection(path)
        for key in TOP_K_KEYS
        if (value := part.get(key)) == top_k
        or (isinstance(value, list) and value and set(map(str, value)) == {str(top_k)})
    )


def with_expert_count(config: Config, keys: tuple[tuple[str, ...], ...], count: int) -> Config:
    """A copy of a raw config with every expert-count key set to ``count``, in a list for every layer."""
    edited = copy.deepcopy(config)
    for path in keys:
        part = edited
        for name in path[:-1]:
            part = part[name]
        old = part[path[-1]]
        part[path[-1]] = [count] * len(old) if isinstance(old, list) else count
    return edited


def with_single_counts(config: Config, counts: Mapping[tuple[str, ...], int]) -> Config:
    """A copy of a raw config in which every expert count is one number, as model classes need it."""
    edited = copy.deepcopy(config)
    for path, count in counts.items():
        part = edited
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = count
    return edited


def number_paths(config: Config) -> dict[tuple[str, ...], int]:
    """Paths of all counts of a raw config above 0, with their values; those of pictures and sound are left out."""
    return {
        (*path, key): value
        for path, part in _parts(config)
        if not OTHER_CONFIGS.intersection(path)
        for key in part
        if (value := number(part[key])) is not None and value > 0
    }


def first_number(config: Config, keys: tuple[str, ...]) -> int | None:
    """The first count under one of the keys, in a raw config or the ones nested in it; None if there is none."""
    for _, part in _parts(config):
        for key in keys:
            if (found := number(part.get(key))) is not None:
                return found
    return None


def quantisation_settings(config: Config) -> Config | None:
    """The quantisation settings of a raw config, or of one nested in it; None if there are none."""
    found = (part.get(key) for _, part in _parts(config) for key in QUANTISATION_KEYS)
    return next((settings for settings in found if isinstance(settings, dict)), None)


def quantisation(config: Config) -> str | None:
    """The quantisation that a raw config declares (``fp8``, ``gptq``, ...); None if it declares none."""
    found = quantisation_settings(config)
    if found is None:
        return None
    return str(found.get("quant_method") or found.get("format") or "a method that it does not name")


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


@dataclass(frozen=True)
class NewCount:
    """A count of config.json that changes.

    Attributes:
        keys: paths of the keys that hold it.
        old: what they hold.
        new: what they will hold.
    """

    keys: tuple[tuple[str, ...], ...]
    old: int
    new: int


def edited_config(text: str, counts: Sequence[NewCount], *, settings: Callable[[Any], Any], drop_mtp: bool) -> str:
    """Edit config.json: counts of experts and of channels, and names of experts in the quantisation settings.

    The text itself is edited, so that order, spacing and the spelling of floats are kept. Where that is ambiguous (the
    key occurs twice with different meanings, lists change), the JSON is rewritten.

    Args:
        text: config.json of the source.
        counts: what is to change.
        settings: edits the quantisation settings, see `renumbering.renumbered`.
        drop_mtp: also remove multi-token-prediction layers.
    """
    wanted = parse_json(text)
    for count in counts:
        wanted = with_expert_count(wanted, count.keys, count.new)
    if drop_mtp:
        wanted = without_mtp(wanted)
    for _, part in _parts(wanted):
        for key in QUANTISATION_KEYS:
            if key in part:
                part[key] = settings(part[key])
    edited = text
    for count in counts:
        for path in count.keys:
            edited = re.sub(rf'("{re.escape(path[-1])}"\s*:\s*){count.old}\b', rf"\g<1>{count.new}", edited)
    if drop_mtp:
        edited = re.sub(r'("\w*(?:mtp|nextn)\w*(?:layers|modules|heads)"\s*:\s*)\d+\b', r"\g<1>0", edited)
        edited = re.sub(r'("use_mtp"\s*:\s*)true\b', r"\g<1>false", edited)
    if json.loads(edited) == wanted:
        return edited
    return json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"
