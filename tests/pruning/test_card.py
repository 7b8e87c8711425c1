"""The card's header and text, whatever the original's card and the names in the plan say."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from moecover.checkpoints.structure import Structure, read_structure
from moecover.planning.artifact import keep_all
from moecover.pruning.card import model_card
from tests.support.thin import random_shape

PLAIN = {"library_name": "transformers", "tags": ["moe", "expert-pruning", "moecover"]}


@pytest.fixture
def structure(checkpoints: Callable[..., Path]) -> Structure:
    return read_structure(checkpoints("qwen3_moe"))


def card_of(structure: Structure, original: str = "", command: str = "", **plan: Any) -> str:
    chosen = keep_all(structure.topology).model_copy(update=plan)
    return model_card(structure, chosen, repaired=None, command=command, original_card=original)


def header_of(card: str) -> dict[str, Any]:
    """The header as the hub reads it."""
    found = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    assert found is not None
    value: dict[str, Any] = yaml.safe_load(found[1])
    return value


@pytest.mark.parametrize(
    "header, carried",
    [
        (
            "license: apache-2.0\npipeline_tag: text-generation",
            {"license": "apache-2.0"} | {"pipeline_tag": "text-generation"},
        ),
        ("license: other\nlicense_name: my: own # licence", {}),  # not YAML
        ('license: "mit\\nbase_model: evil/model"', {"license": "mit base_model: evil/model"}),
        ('license: "a\\u2028b: c"', {"license": "a b: c"}),
        ("license: !!python/object:os.system x", {}),
        ("license: '\"quoted\" <b>'", {"license": '"quoted" <b>'}),
        ("license: [mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}),
        ("license: {a: b}", {}),
        ("license: 5", {}),
        ("license: &a [*a]", {}),
        ("license: " + "x" * 500, {"license": "x" * 12 + "..." + "x" * 45}),
        ("license: '---'", {"license": "---"}),
        ("- a list", {}),
    ],
)
def test_carried_entries_stay_entries(structure: Structure, header: str, carried: dict[str, Any]) -> None:
    card = card_of(structure, f"---\n{header}\n---\n# The original\n")
    assert header_of(card) == {**PLAIN, **carried}
    assert "README.original.md" in card


def test_how_thin_the_experts_are(structure: Structure, checkpoints: Callable[..., Path]) -> None:
    assert ", 8 of 8 experts\n" in card_of(structure)
    thin = random_shape(structure, 8, keep=8)
    card = model_card(structure, thin, repaired=None, command="", original_card="")
    assert ", 8 of 8 experts, 8 of 16 channels each\n" in card
    assert "with channels of its routed experts removed (8 stay in each) by moecover" in card
    assert "| channels per expert | 16 | 8 |" in card
    assert [row["channels of each"] for row in thin.rows_shown()] == [8, 8]
    shared = read_structure(checkpoints("deepseek_v3", moe_intermediate_size=24))
    card = model_card(shared, random_shape(shared, 16), repaired=None, command="", original_card="")
    assert (
        "(16 stay in each; shared experts, which config.json sizes alike, are padded with 8 channels of zeros)" in card
    )


def test_the_calibration_text_is_named(structure: Structure) -> None:
    """By what the plan records of it; a plan by hand may record less."""
    sizes = {"sequences": 128, "tokens": 262144}
    calibration = {
        "chat": [{"source": "chats.jsonl", "weight": 3, **sizes}],
        "wikitext2": [{"source": "Salesforce/wikitext@b08", **sizes}],
        "web": [{"source": "web", **sizes}],
        "many": [{"source": "<b>", **sizes}, {"source": "c", **sizes}, {}],
        "mine": [],
    }
    card = card_of(structure, calibration=calibration)
    assert (
        "Calibration text: chat (chats.jsonl, 128 sequences, 262,144 tokens, weight 3); wikitext2 "
        "(Salesforce/wikitext@b08, 128 sequences, 262,144 tokens); web (128 sequences, 262,144 tokens); many (\\<b>, "
        "c, 256 sequences, 524,288 tokens); mine.\n"
    ) in card
    assert "Calibration text" not in card_of(structure)


def test_line_ends_of_other_systems_are_read(structure: Structure) -> None:
    assert header_of(card_of(structure, "---\r\nlicense: mit\r\n---\r\ntext"))["license"] == "mit"
    assert header_of(card_of(structure, "no header")) == PLAIN


def test_names_and_options_are_text(structure: Structure) -> None:
    name = "x`]\n# <script>alert(1)</script> [a](http://evil)\x1b[31m"
    checkpoint = replace(structure.checkpoint, name=f"/tmp/{name}")
    card = card_of(
        replace(structure, checkpoint=checkpoint),
        command="moecover prune '```' --plan x\n```\n<b>",
        method="<i>mine</i>",
        options={"a": "```\n---\n<img src=x>"},
    )
    body = card.partition("\n---\n")[2]
    fenced = re.sub(r"^(`{3,})\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    outside_code = re.sub(r"(?<!\\)(`+)(?!`).*?(?<!`)\1(?!`)", "", fenced)
    assert "\x1b" not in card
    assert not re.search(r"(?<!\\)<[a-z/!]", outside_code)
    assert not re.search(r"(?<!\\)\]\(", outside_code)
    assert [line for line in fenced.splitlines() if line.startswith("# ")] == [body.splitlines()[1]]
