"""The card's header and text, whatever the original's card and the names in the plan say."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.utils import validate_repo_id

from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import Structure, read_structure
from moecover.planning.artifact import keep_all
from moecover.pruning.card import model_card
from moecover.pruning.card_header import datasets
from moecover.pruning.card_names import placeholder, with_repository
from moecover.pruning.writer import prune
from tests.support.thin import random_shape
from tests.support.zoo import make_model

CARRIED = {
    "library_name": "mlx",
    "tags": ["moe", "expert-pruning", "moecover", "chat", "x\\n- y"],
    "language": ["en", "de"],
}
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
        ("tags: [moe, chat, 'x\\n- y']\nlanguage: [en, de, 5]\nlibrary_name: mlx", CARRIED),
        ("tags: {a: b}\nlanguage: null\nbase_model: evil/model\ndatasets: [evil/set]", {}),
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
    assert header_of(card)["datasets"] == ["Salesforce/wikitext"]


@pytest.mark.parametrize(
    "source, found",
    [
        ("allenai/c4@1588ec4", ["allenai/c4"]),
        ("hf:me/chats[en]/train?revision=abc", ["me/chats"]),
        ("hf:me/chats", ["me/chats"]),
        ("encyclopedia", []),
        ("chats.jsonl", []),
        ("hf:me/chats\nevil: x", []),
        ("hf:../chats", []),
    ],
)
def test_data_sets_of_the_hub_are_linked(source: str, found: list[str]) -> None:
    assert datasets([[{"source": source}, {"source": source}, {}, {"source": 5}], []]) == found


def run_snippet(card: str, folder: Path) -> None:
    """The program on a card, with a folder in place of the repository; it says something."""
    (snippet,) = re.findall(r"```python\n(.*?)```", with_repository(card, str(folder)), flags=re.DOTALL)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(snippet, "card", "exec"), {})
    assert said.getvalue().strip()


def test_the_snippet_of_a_type_that_plain_transformers_lacks() -> None:
    card = card_of(read_structure("shipped:deepseek-moe-tiny"))
    assert "moecover.register_deepseek()" in card
    assert "Not with vLLM as it is: vllm needs a configuration class" in card
    run_snippet(card, shipped_model("deepseek-moe-tiny"))


def test_the_snippet_of_a_multimodal_model(tmp_path: Path) -> None:
    make_model("glm4v_moe").save_pretrained(tmp_path)
    card = card_of(read_structure(tmp_path))
    assert "\nmodel = AutoModelForImageTextToText.from_pretrained(" in card


@pytest.mark.parametrize("chat", [False, True])
def test_the_snippet_runs(checkpoints: Callable[..., Path], tmp_path: Path, chat: bool) -> None:
    """As it stands on the card, with the folder in place of the repository."""
    source = tmp_path / "private place" / "Some-MoE_1.5"
    shutil.copytree(checkpoints("qwen3_moe"), source)
    if chat:
        (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    structure = read_structure(source)
    command = shlex.join(["moecover", "prune", str(source), "--corpus", f"a=hf:x/y/train?n=5&chat_template={source}/c"])
    half = prune(structure, random_shape(structure, 8, keep=6), tmp_path / "half", command=command)
    card = (half / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "moecover prune Some-MoE_1.5 --corpus 'a=hf:x/y/train?n=5&chat_template=c'" in card
    assert "moecover verify Some-MoE_1.5 ." in card
    assert "Shape: 6 experts x 8 channels in each of 2 MoE layers." in card
    assert "vllm serve your-name/Some-MoE_1.5-6x8\n" in card
    assert "apply_chat_template" in card if chat else "apply_chat_template" not in card
    run_snippet(card, half)


def test_a_model_of_the_hub_is_the_base(structure: Structure) -> None:
    hub = replace(structure.checkpoint, name="some-one/a-moe", revision="0" * 40)
    card = card_of(
        replace(structure, checkpoint=hub), command="moecover prune some-one/a-moe -o/tmp/x --push-to-hub a/b"
    )
    entries = header_of(card)
    assert (entries["base_model"], entries["base_model_relation"]) == ("some-one/a-moe", "finetune")
    assert "moecover prune some-one/a-moe -ox --push-to-hub a/b\n" in card
    assert f"moecover verify some-one/a-moe . --revision {'0' * 40}\n" in card
    assert with_repository(card, "me/mine").count("me/mine") == 3


@pytest.mark.parametrize(
    "model, name",
    [("half it", "half-it"), ("..a..b-.", "a-b"), ("shipped:x", "x"), ("\u65e5", "model"), ("x" * 99, "x" * 60)],
)
def test_the_placeholder_is_a_name_that_the_hub_takes(structure: Structure, model: str, name: str) -> None:
    found = placeholder(model, keep_all(structure.topology))
    validate_repo_id(found)
    assert found == f"your-name/{name}-8-experts"


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
