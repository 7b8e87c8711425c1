"""The model card of a pruned model in the hub's format, with a YAML header: README.md, of a GGUF file NAME.md."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from moecover.checkpoints.remote_code import is_trusted
from moecover.errors import printable, shortened
from moecover.files.reading import parse_yaml
from moecover.merging.method import NONE
from moecover.text import markdown_block, markdown_code, markdown_table, markdown_text

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure
    from moecover.planning.artifact import Plan
    from moecover.pruning.origin import Origin
    from moecover.repairing.artifact import Repaired


CARRIED_KEYS = ("license", "license_name", "license_link", "pipeline_tag")
LONGEST_ENTRY = 200  # characters
TAGS = ("moe", "expert-pruning", "moecover")


def _carried(card: str) -> dict[str, str | list[str]]:
    """The entries of a card's YAML header that are carried over; none where the header cannot be read."""
    header = re.match(r"---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, flags=re.DOTALL)
    try:
        entries = parse_yaml(header[1])[0] if header else None
    except (ValueError, yaml.YAMLError):
        return {}
    if not isinstance(entries, dict):
        return {}
    found = {key: _plain(entries[key]) for key in CARRIED_KEYS if key in entries}
    return {key: value for key, value in found.items() if value}


def _plain(value: object) -> str | list[str]:
    """An entry as text, or a list of texts, that a header can hold; empty for anything else."""
    if isinstance(value, list):
        return [text for one in value if isinstance(text := _plain(one), str) and text]
    return shortened(printable(value), LONGEST_ENTRY) if isinstance(value, str) else ""


def _header(structure: Structure, original_card: str, origin: Origin | None) -> list[str]:
    """Lines of the YAML header."""
    checkpoint = origin or structure.checkpoint
    library = "transformers" if structure.checkpoint.gguf is None else "gguf"
    entries: dict[str, object] = {"library_name": library, "tags": [*TAGS]}
    if "/" in checkpoint.name and checkpoint.revision:
        entries["base_model"] = printable(checkpoint.name)
    entries |= _carried(original_card)
    gguf = structure.checkpoint.gguf
    if gguf is not None and (licence := _plain(gguf.first.values.get("general.license", ""))):
        entries["license"] = licence
    text: str = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, default_flow_style=None, width=sys.maxsize)
    return ["---", *text.splitlines(), "---"]


def _weights(repaired: Repaired | None) -> str:
    """What the remaining weights are."""
    if repaired is None:
        return "The remaining weights are those of the original, byte for byte; nothing was trained."
    texts = ", ".join(
        f"{record['tokens used']:,} tokens of {markdown_text(record['name'])}" for record in repaired.corpora
    )
    before, after = repaired.mean_errors()
    moved = any("held" in row for row in repaired.layers)
    tensors, how = f"{len(repaired.hashes)} tensors", list[str]()
    if repaired.merge != NONE:
        removed, took = repaired.merged
        how.append(
            f"{took} of the experts that stay are averages of themselves and of {removed} removed ones (merge: "
            f"{repaired.merge})"
        )
        tensors = "their down projections"
    if moved:
        how.append(
            f"{tensors}{'' if how else ' of the MoE blocks'} were refitted (repair: {repaired.kind}; down projections "
            "in closed form, then experts and router by gradient steps on the error of their own layer)"
        )
    elif repaired.kind != NONE:
        down = "" if how else ", down projections of experts,"
        how.append(f"{tensors}{down} were refitted in closed form (repair: {repaired.kind})")
    return (
        f"{'; '.join(how)} on {texts}, to compensate in part for the removed experts: the squared error of a layer's "
        f"output, relative to its square, {'fell' if after <= before else 'rose'} from {before:.3f} to {after:.3f} on "
        "that text (mean over layers). "
        f"All other weights are those of the original, byte for byte{'' if moved else '; nothing was trained'}. "
        "`moecover.json` names the tensors that this wrote, and gives the error before and after by layer and corpus."
    )


def _tables(structure: Structure) -> str:
    """What became of the tables of experts by token id; empty where there are none."""
    numbers = sorted({structure.topology.decoder_layers[table.layer] for table in structure.tables.values()})
    if not numbers:
        return ""
    return (
        f" The tables of decoder layers {', '.join(map(str, numbers))} that give the experts of a token id were "
        "rewritten: in place of a removed expert stands the kept one with the fewest places."
    )


def _calibration(plan: Plan) -> list[str]:
    """The calibration text in a sentence, by corpus; none where the choice does not depend on it."""
    texts = "; ".join(f"{name}{_about(name, records)}" for name, records in plan.calibration.items())
    return [f"Calibration text: {markdown_text(texts)}.", ""] if texts else []


def _about(name: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Where the samples of a corpus come from, how much that is, and its weight; a plan by hand may not say that."""
    found = [*dict.fromkeys(str(one["source"]) for one in records if one.get("source", name) != name)]
    sizes = {key: sum(one[key] for one in records if isinstance(one.get(key), int)) for key in ("sequences", "tokens")}
    found += [f"{size:,} {key}" for key, size in sizes.items() if size]
    found += [f"weight {one['weight']}" for one in records[:1] if "weight" in one]
    return f" ({', '.join(found)})" if found else ""


def _short_name(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2] or name


def _sizes(structure: Structure, plan: Plan, origin: Origin | None, mtp: str) -> str:
    """The table of sizes: the original, what was pruned if that is another, and what is left."""
    topology, width = structure.topology, plan.width
    channels = "all" if isinstance(structure.width, str) else str(structure.width.channels)
    before, after = structure.checkpoint.num_bytes, structure.num_bytes(plan.kept, width=plan.width, mtp=mtp)
    if origin is not None:
        first = "" if origin.num_bytes is None else f"{origin.num_bytes / 1e6:.1f}"
        thinner = width is not None or origin.channels
        return markdown_table(
            [
                _row("routed experts per MoE layer", origin.num_experts, topology.num_experts, plan.keep),
                *(
                    [_row("channels per expert", origin.num_channels or "", channels, width or channels)]
                    * bool(thinner)
                ),
                _row("experts per token", origin.top_k or "", topology.top_k, plan.top_k or topology.top_k),
                _row("tensors, MB", first, f"{before / 1e6:.1f}", f"{after / 1e6:.1f}"),
            ],
            right=("original", "before this step", "pruned"),
        )
    rows = (
        ("routed experts per MoE layer", str(topology.num_experts), str(plan.keep)),
        *([("channels per expert", channels, str(width))] if width is not None else []),
        ("experts per token", str(topology.top_k), str(plan.top_k or topology.top_k)),
        ("tensors, MB", f"{before / 1e6:.1f}", f"{after / 1e6:.1f}"),
    )
    return markdown_table([dict(zip(("", "original", "pruned"), row, strict=True)) for row in rows])


def _row(label: str, *values: object) -> dict[str, str]:
    return {"": label, **dict(zip(("original", "before this step", "pruned"), map(str, values), strict=True))}


def _thin_title(structure: Structure, plan: Plan, origin: Origin | None) -> str:
    """The part of the title that says how thin the experts are; empty where all of their channels stayed."""
    if isinstance(structure.width, str) or (plan.width is None and not (origin and origin.channels)):
        return ""
    of_all = (origin.num_channels if origin else None) or structure.width.channels
    return f", {plan.width or structure.width.channels} of {of_all} channels each"


def _removed(structure: Structure, plan: Plan) -> str:
    """What was removed, in words."""
    if plan.width is None:
        return "whole routed experts removed"
    what = "whole routed experts and channels of the others"
    if plan.keep == structure.topology.num_experts:
        what = "channels of its routed experts"
    padding = 0 if isinstance(structure.width, str) else structure.width.padding(plan.width)
    padded = f"; shared experts, which config.json sizes alike, are padded with {padding} channels of zeros"
    return f"{what} removed ({plan.width} stay in each{padded if padding else ''})"


def _words(structure: Structure, output: str) -> tuple[str, str, list[str]]:
    """By format: what holds the plan, what `verify` is given, and how it is run where that is not known anyway."""
    name = structure.checkpoint.name
    if structure.checkpoint.gguf is None:
        return (
            "`moecover.json` holds the plan with every expert's saliency, the original id of every expert, and a hash "
            "of every file.",
            f"{shlex.quote(name)} .",
            [],
        )
    file = shlex.quote(output)
    holds = "The keys `moecover.*` of the file hold the method and the original ids of the experts that were kept."
    run = ["To run it:", "", markdown_block(f"llama-server -m {file}"), ""]
    return holds, f"{shlex.quote(_short_name(name))} {file}", run


def model_card(
    structure: Structure,
    plan: Plan,
    *,
    repaired: Repaired | None,
    command: str,
    original_card: str,
    figures: str = "",
    origin: Origin | None = None,
    mtp: str = "drop",
    output: str = "",
) -> str:
    """The text of the card.

    Args:
        structure: the source, whose format is the output's.
        plan: which experts stay.
        repaired: refitted tensors; None where nothing was repaired.
        command: the command line that made the checkpoint; empty for none.
        original_card: card of the source; its licence is carried over.
        figures: a section of measured numbers, see `card_numbers.measured`; empty for none.
        origin: the first original, where the source was pruned before; None where it is one itself.
        mtp: what became of multi-token-prediction layers, see `writer.prune`.
        output: name of the file that was written; empty for a folder, which the card lies in.
    """
    topology, checkpoint = structure.topology, structure.checkpoint
    name, experts = _short_name((origin or checkpoint).name), (origin or topology).num_experts
    holds, files, more = _words(structure, output)
    steps = f" in several steps, this time from {markdown_code(_short_name(checkpoint.name))}" if origin else ""
    options = ", ".join(f"{key} {value}" for key, value in plan.options.items()) or "none"
    revision = f" --revision {shlex.quote(checkpoint.revision)}" if checkpoint.revision else ""
    trusted = " --trust-remote-code" if checkpoint.folder is not None and is_trusted(checkpoint.folder) else ""
    parts = "experts" if plan.width is None else "experts and channels"
    lines = [
        *_header(structure, original_card, origin),
        "",
        f"# {markdown_text(name)}, {plan.keep} of {experts} experts{_thin_title(structure, plan, origin)}",
        "",
        f"This is {markdown_code(name)} ({markdown_text(topology.family)}) with {_removed(structure, plan)} by "
        f"moecover{steps}. {_weights(repaired)}{_tables(structure)}",
        "",
        _sizes(structure, plan, origin, mtp),
        "",
        f"Method: {markdown_text(plan.method)}; options: {markdown_text(options)}. {holds}",
        "",
        *_calibration(plan),
        *more,
    ]
    if figures:
        lines.append(figures)
    if command:
        lines += ["Command:", "", markdown_block(command), ""]
    lines += [
        f"To check it against the original (its outputs equal those of the original with the removed {parts} masked"
        f"{' and the changed tensors in place' if repaired else ''}):",
        "",
        markdown_block(f"moecover verify {files}{revision}{trusted}"),
    ]
    if original_card:
        lines += ["", "The model card of the original is README.original.md."]
    return "\n".join(lines) + "\n"
