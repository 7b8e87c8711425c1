"""The YAML header of a model card: reads the original's card and records of text, gives lines that the hub reads.

What comes from files is data: every entry is of a known form, short, and escaped by the YAML writer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from moecover.errors import printable, shortened
from moecover.files.reading import parse_yaml

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure
    from moecover.gguf.parts import GgufFiles
    from moecover.planning.artifact import Plan
    from moecover.pruning.origin import Origin
    from moecover.repairing.artifact import Repaired

CARRIED_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")
LONGEST_ENTRY = 200  # characters
MOST_ENTRIES = 100  # of a list
TAGS = ("moe", "expert-pruning", "moecover")
# The hub documents four relations: finetune, adapter, merge, quantized. Without one it guesses from the files. A pruned
# checkpoint is a model of its own that descends from one other, as a finetune is; a GGUF file is listed as quantized.
FINETUNE, QUANTIZED = "finetune", "quantized"

_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_DATASET = re.compile(rf"hf:(?P<place>{_ID})(?:[\[/?].*)?|(?P<named>{_ID})@[\w./-]+", flags=re.ASCII)
_REPOSITORY = re.compile(rf"(?:https://huggingface\.co/)?({_ID})/?", flags=re.ASCII)
GGUF_SOURCES = ("general.source.huggingface.repository", "general.source.repo_url", "general.base_model.0.repo_url")


def header(
    structure: Structure, plan: Plan, original_card: str, *, origin: Origin | None, repaired: Repaired | None
) -> list[str]:
    """The lines of the header, with the rules around it.

    Args:
        structure: the source.
        plan: which experts stay; its calibration text is named where that is on the hub.
        original_card: card of the source.
        origin: the first original, where the source was pruned before.
        repaired: refitted tensors, whose text is named too.
    """
    original = _entries(original_card)
    gguf = structure.checkpoint.gguf
    entries: dict[str, object] = {
        "library_name": "transformers" if gguf is None else "gguf",
        "tags": [*dict.fromkeys([*TAGS, *_texts(original.get("tags"))])],
    }
    if base := _base_model(structure, origin):
        entries |= {"base_model": base, "base_model_relation": FINETUNE if gguf is None else QUANTIZED}
    entries |= {key: value for key in CARRIED_KEYS if (value := _plain(original.get(key)))}
    if gguf is not None and (licence := _plain(gguf.first.values.get("general.license", ""))):
        entries["license"] = licence
    if found := datasets([*plan.calibration.values(), repaired.corpora if repaired is not None else []]):
        entries["datasets"] = found
    text: str = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, default_flow_style=None, width=sys.maxsize)
    return ["---", *text.splitlines(), "---"]


def datasets(records: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """The ids of the hub's data sets that records of text name, each once."""
    sources = (one.get("source") for of_corpus in records for one in of_corpus)
    found = (_DATASET.fullmatch(source) for source in sources if isinstance(source, str))
    return [*dict.fromkeys(one["place"] or one["named"] for one in found if one)]


def _entries(card: str) -> dict[str, Any]:
    """The entries of a card's header; none where it cannot be read."""
    found = re.match(r"---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, flags=re.DOTALL)
    try:
        entries = parse_yaml(found[1])[0] if found else None
    except (ValueError, yaml.YAMLError):
        return {}
    return {key: value for key, value in entries.items() if isinstance(key, str)} if isinstance(entries, dict) else {}


def _plain(value: object) -> str | list[str]:
    """An entry as text, or a list of texts, that a header can hold; empty for anything else."""
    if isinstance(value, list):
        return [*_texts(value)]
    return shortened(printable(value), LONGEST_ENTRY) if isinstance(value, str) else ""


def _texts(value: object) -> Iterator[str]:
    """The texts in a list, at most `MOST_ENTRIES`."""
    for one in value[:MOST_ENTRIES] if isinstance(value, list) else ():
        if isinstance(one, str) and (text := _plain(one)):
            yield str(text)


def _base_model(structure: Structure, origin: Origin | None) -> str:
    """The hub id of what was pruned; empty where that is not known."""
    if structure.checkpoint.gguf is not None:
        return _source_of(structure.checkpoint.gguf)
    checkpoint = origin or structure.checkpoint
    return printable(checkpoint.name) if "/" in checkpoint.name and checkpoint.revision else ""


def _source_of(gguf: GgufFiles) -> str:
    """The repository that a GGUF file says it was made from."""
    values = (gguf.first.values.get(key) for key in GGUF_SOURCES)
    found = (_REPOSITORY.fullmatch(value) for value in values if isinstance(value, str))
    return next((one[1] for one in found if one), "")
