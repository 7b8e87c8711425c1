"""Names of experts in quantisation settings: what patterns match before and after is compared module by module."""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from moecover.checkpoints.patterns import pattern_of
from moecover.checkpoints.renumbering import Renumbering, renumbered
from moecover.errors import InputError

EXPERTS = 12
ALIKE = {1: [1, 3, 7, 8, 10, 11], 2: [1, 3, 7, 8, 10, 11]}  # kept experts by decoder layer
UNLIKE = {1: [1, 3, 7, 8, 10, 11], 2: [0, 1, 2, 3, 9, 10]}
LEAVES = ("gate_proj", "up_proj", "down_proj")


def names_of(experts: dict[int, list[int]]) -> list[str]:
    """All modules of a model with these experts in its layers."""
    found = ["lm_head", "model.embed_tokens", "model.layers.0.mlp.up_proj"]
    for layer, ids in experts.items():
        block = f"model.layers.{layer}"
        found += [f"{block}.self_attn.q_proj", f"{block}.mlp.gate", f"{block}.mlp.shared_experts.0.up_proj"]
        found += [f"{block}.mlp.experts.{e}.{leaf}" for e in ids for leaf in LEAVES]
    return found


def how(kept: dict[int, list[int]]) -> Renumbering:
    def new_id(name: str, layer: int, expert: int) -> int | None:
        return kept[layer].index(expert) if expert in kept[layer] else None

    everything = names_of({layer: list(range(EXPERTS)) for layer in kept})
    return Renumbering(new_id, tuple(kept), EXPERTS, tuple(f"{name}.weight" for name in everything))


def after(name: str, kept: dict[int, list[int]]) -> str | None:
    """The new name of a module by the definition: None for one of a removed expert."""
    match = re.fullmatch(r"(model\.layers\.(\d+)\.mlp\.experts\.)(\d+)(.*)", name)
    if match is None:
        return name
    ids = kept[int(match[2])]
    return f"{match[1]}{ids.index(int(match[3]))}{match[4]}" if int(match[3]) in ids else None


def matched(patterns: list[str], names: list[str], grammar: str) -> set[str]:
    if grammar == "glob":
        return {name for name in names for p in patterns if fnmatch.fnmatchcase(name, p)}
    mark = {"re:": 3, "+:": 2, "-:": 2, "": 0}[grammar]
    assert all(p.startswith(grammar) for p in patterns)
    return {name for name in names for p in patterns if re.match(p[mark:], name)}


PATTERNS = [
    ("glob", "*.experts.1*"),
    ("glob", "model.layers.1.mlp.experts.1*"),
    ("glob", "model.layers.2.mlp.experts.[37].*"),
    ("glob", "*mlp.experts.1?.up_proj"),
    ("glob", "*experts.3?.x"),
    ("glob", "*.experts.*.down_proj"),
    ("glob", "*.experts.[!0-8]*"),
    ("glob", "model.layers.*.mlp.experts.5.*"),
    ("re:", r"re:.*experts\.1[01]\..*"),
    ("re:", r"re:.*experts\.1[01]\.up_proj$"),
    ("re:", r"re:.*experts.(3|7).up_proj"),
    ("re:", r"re:.*\.experts\.(?:3|1\d)\.(gate|up)_proj"),
    ("re:", r"re:.*experts\.1"),
    ("re:", r"re:.*layers\.1\.mlp\.experts\.1.*"),
    ("re:", r"re:.*layers\.2\.mlp\.experts\.\d+\..*"),
    ("re:", r"re:.*(lm_head|experts\.3\.down_proj)"),
    ("re:", r"re:.*experts\.[^3]\.up_proj"),
    ("re:", r"re:.*layers\.[12]\..*\.(?!3\.)\d+\.down_proj"),
    ("re:", r"re:.*self_attn.*"),
    ("+:", r"+:.*\.experts\.(8|9)\..*"),
    ("-:", r"-:model\.layers\.2\.mlp\.experts\.1[01]"),
    ("", r".*experts\.1[01]\..*"),
    ("", r"^model\.layers\.(1|2)\.mlp\.experts\.(10|11)\.down_proj$"),
]


@pytest.mark.parametrize("kept", [ALIKE, UNLIKE], ids=["alike", "unlike"])
@pytest.mark.parametrize("grammar, pattern", PATTERNS)
def test_a_pattern_matches_the_same_modules_afterwards(grammar: str, pattern: str, kept: dict[int, list[int]]) -> None:
    old = names_of({layer: list(range(EXPERTS)) for layer in kept})
    new = names_of({layer: list(range(len(ids))) for layer, ids in kept.items()})
    expected = {there for name in matched([pattern], old, grammar) if (there := after(name, kept)) is not None}
    found = renumbered({"ignore": ["lm_head", pattern]}, how(kept)).get("ignore")
    assert found[0] == "lm_head"
    assert matched(found[1:], new, grammar) == expected
    key = renumbered({pattern: {"bits": 8}}, how(kept))
    assert matched(list(key), new, grammar) == expected
    assert all(value == {"bits": 8} for value in key.values())


def test_a_pattern_that_takes_for_ever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecover.checkpoints.patterns.SECONDS", 0.1)
    pattern = pattern_of(r"re:(?:(?:a|aa)+)+!")
    assert pattern is not None
    started = time.process_time()
    with pytest.raises(InputError, match="takes longer than 0.1 s on aaaa"):
        pattern.matcher()("a" * 500)
    assert time.process_time() - started < 5


def test_patterns_stay_readable() -> None:
    """The shortest form that is exact is taken; what is exact already stays as it is."""
    settings = ["*.experts.1*", r"re:.*experts\.1[01]\..*", r"re:.*experts.(3|7).up_proj", "*.mlp.gate", "experts.3?.x"]
    found = renumbered(settings, how(ALIKE))
    assert found == [
        "*.experts.0*",
        "*.experts.4*",
        "*.experts.5*",
        r"re:.*experts\.(?:4|5)\..*",
        "re:.*experts.(?:1|2).up_proj",
        "*.mlp.gate",
        "experts.3?.x",
    ]


PLAIN: list[tuple[Any, Any]] = [
    (["model.layers.1.mlp.experts.3", "model.layers.1.mlp.experts.4"], ["model.layers.1.mlp.experts.1"]),
    (["model.layers.2.mlp.experts.10.up_proj"], ["model.layers.2.mlp.experts.5.up_proj"]),
    ({"model.layers.2.mlp.experts.9": {"bits": 8}}, {"model.layers.2.mlp.experts.4": {"bits": 8}}),
    ([r"re:^model\.layers\.1\.mlp\.experts\.11\.up_proj$"], [r"re:^model\.layers\.1\.mlp\.experts\.5\.up_proj$"]),
    ({"+:model.layers.1.mlp.experts.8.up_proj": {}}, {"+:model.layers.1.mlp.experts.3.up_proj": {}}),
    (["language_model.model.layers.1.mlp.experts.8"], ["language_model.model.layers.1.mlp.experts.3"]),
    (["model.layers.1.mlp.shared_experts.0.up_proj", "mlp.shared_experts.3"],) * 2,
    ({"exclude": ["lm_head"], "format": "pack-quantized", "bits": 4, "damp": 0.1, "x": None},) * 2,
]


@pytest.mark.parametrize("value, expected", PLAIN)
def test_names_with_their_layer(value: Any, expected: Any) -> None:
    assert renumbered(value, how(UNLIKE)) == expected


def block(ids: list[int]) -> list[list[str]]:
    """A block's modules as GPTQ lists them."""
    return [
        ["self_attn.k_proj", "self_attn.v_proj"],
        [f"mlp.experts.{e}.{leaf}" for e in ids for leaf in ("up_proj", "gate_proj")],
        [f"mlp.experts.{e}.down_proj" for e in ids],
    ]


def test_names_of_a_block_that_lists_all_experts_alike() -> None:
    settings = {"quant_method": "gptq", "modules_in_block_to_quantize": block(list(range(EXPERTS)))}
    found = renumbered(settings, how(UNLIKE))
    assert found == {**settings, "modules_in_block_to_quantize": block(list(range(6)))}


def test_some_experts_of_a_block() -> None:
    """Exact where the same ids mean the same experts in every layer, refused where they do not."""
    settings = {"modules_in_block_to_quantize": block([1, 3, 4])}
    assert renumbered(settings, how(ALIKE)) == {"modules_in_block_to_quantize": block([0, 1])}
    with pytest.raises(InputError, match=r"'mlp\.experts\.1\.up_proj', which cannot be renumbered"):
        renumbered(settings, how(UNLIKE))


def test_a_block_whose_experts_are_all_removed_goes() -> None:
    settings = {"modules_in_block_to_quantize": [["self_attn.k_proj"], ["mlp.experts.0.up_proj"]]}
    assert renumbered(settings, how(ALIKE)) == {"modules_in_block_to_quantize": [["self_attn.k_proj"]]}


def test_a_name_without_its_layer_is_written_out_where_layers_differ() -> None:
    found = renumbered({"modules_to_not_convert": ["lm_head", "experts.3.down_proj"]}, how(UNLIKE))
    assert found["modules_to_not_convert"] == [
        "lm_head",
        "model.layers.1.mlp.experts.1.down_proj",
        "model.layers.2.mlp.experts.3.down_proj",
    ]
    overrides = renumbered({"experts.3.down_proj": {"bits": 8}, "experts.4.down_proj": {"bits": 2}}, how(UNLIKE))
    assert overrides == {name: {"bits": 8} for name in found["modules_to_not_convert"][1:]}


@pytest.mark.parametrize("text", [r"re:.*experts\.(3\..*", "re:*experts.3"])
def test_what_is_no_pattern_is_refused_by_its_text(text: str) -> None:
    with pytest.raises(InputError) as caught:
        renumbered({"ignore": [text]}, how(ALIKE))
    assert text in str(caught.value).replace("\\\\", "\\")
    assert "\n" not in str(caught.value)


STYLES: list[Callable[[str], Any]] = [
    lambda p: {"ignore": [p]},  # compressed-tensors
    lambda p: {"config_groups": {"group_0": {"targets": [p], "weights": {"num_bits": 4}}}},
    lambda p: {"dynamic": {f"+:{p}": {"bits": 8}}},  # GPTQModel
    lambda p: {"modules_to_not_convert": [p]},  # AWQ, fp8, torchao
    lambda p: {"llm_int8_skip_modules": [p]},  # bitsandbytes
    lambda p: {"extra_config": {p: {"bits": 16}}},  # AutoRound
    lambda p: {"exclude": [p], "layer_quant_config": {p: {"weight": None}}},  # Quark
    lambda p: {"quantization": {"exclude_modules": [p]}},  # ModelOpt
    lambda p: {"quant_type": {"default": {"_data": {"module_fqn_to_config": {p: {"_type": "Int8"}}}}}},  # torchao
    lambda p: {"tensor_storage": {p: {"stored_tensors": {f"{p}.trellis": {"shape": [1]}}}}},  # ExLlamaV3
]


@pytest.mark.parametrize("style", range(len(STYLES)))
def test_every_key_of_every_quantiser(style: int) -> None:
    old, new = "model.layers.2.mlp.experts.9.up_proj", "model.layers.2.mlp.experts.4.up_proj"
    assert renumbered(STYLES[style](old), how(UNLIKE)) == STYLES[style](new)


def test_stacked_experts_are_named_one_by_one() -> None:
    """Settings may name single experts although the files stack them."""
    names = tuple(f"model.layers.{layer}.mlp.experts.gate_up_proj_blocks" for layer in (1, 2))
    stacked = Renumbering(how(UNLIKE).new_id, (1, 2), EXPERTS, names)
    found = renumbered([r"re:.*experts\.9\.down_proj"], stacked)
    new = [f"model.layers.{layer}.mlp.experts.{e}.down_proj" for layer in (1, 2) for e in range(6)]
    assert matched(found, new, "re:") == {"model.layers.2.mlp.experts.4.down_proj"}


def test_other_roots_of_the_names() -> None:
    """A pattern anchored at a root that only another program gives the model."""
    found = renumbered([r"re:^language_model\.model\.layers\.\d\.mlp\.experts\.1[01]\..*"], how(ALIKE))
    new = [f"language_model.{name}" for name in names_of({1: list(range(6)), 2: list(range(6))})]
    wanted = {name for name in new if re.search(r"\.experts\.[45]\.", name)}
    assert matched(found, new, "re:") == wanted
