"""The model card of a pruned checkpoint: README.md in the hub's format, with a YAML header."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from moecover.text import markdown_table

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure
    from moecover.planning.artifact import Plan
    from moecover.pruning.origin import Origin
    from moecover.repairing.artifact import Repaired


CARRIED_KEYS = ("license", "license_name", "license_link", "pipeline_tag")


def _header_entry(card: str, key: str) -> str | None:
    """A one-line entry of a card's YAML header."""
    header = re.match(r"---\n(.*?)\n---", card, flags=re.DOTALL)
    entry = re.search(rf"^{key}:[ \t]*(\S.*)$", header[1], flags=re.MULTILINE) if header else None
    return entry[1].strip() if entry else None


def _header(structure: Structure, original_card: str, origin: Origin | None) -> list[str]:
    """Lines of the YAML header."""
    checkpoint = origin or structure.checkpoint
    lines = ["---", "library_name: transformers", "tags: [moe, expert-pruning, moecover]"]
    if "/" in checkpoint.name and checkpoint.revision:
        lines.append(f"base_model: {checkpoint.name}")
    carried = {key: _header_entry(original_card, key) for key in CARRIED_KEYS}
    return [*lines, *(f"{key}: {value}" for key, value in carried.items() if value), "---"]


def _weights(repaired: Repaired | None) -> str:
    """What the remaining weights are."""
    if repaired is None:
        return "The remaining weights are those of the original, byte for byte; nothing was trained."
    texts = ", ".join(f"{record['tokens used']:,} tokens of {record['name']}" for record in repaired.corpora)
    before, after = repaired.mean_errors()
    return (
        f"{len(repaired.hashes)} tensors, down projections of experts, were refitted in closed form (repair: "
        f"{repaired.kind}) on {texts}, to compensate in part for the removed experts: the squared error of a layer's "
        f"output, relative to its square, fell from {before:.3f} to {after:.3f} on that text (mean over layers). "
        "All other weights are those of the original, byte for byte; nothing was trained. `moecover.json` names every "
        "changed tensor, and gives the error before and after by layer and corpus."
    )


def _short_name(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2] or name


def _sizes(structure: Structure, plan: Plan, origin: Origin | None, mtp: str) -> str:
    """The table of sizes: the original, what was pruned if that is another, and what is left."""
    topology = structure.topology
    before, after = structure.checkpoint.num_bytes, structure.num_bytes(plan.kept, mtp=mtp)
    if origin is not None:
        first = "" if origin.num_bytes is None else f"{origin.num_bytes / 1e6:.1f}"
        return markdown_table(
            [
                _row("routed experts per MoE layer", origin.num_experts, topology.num_experts, plan.keep),
                _row("experts per token", topology.top_k, topology.top_k, topology.top_k),
                _row("tensors, MB", first, f"{before / 1e6:.1f}", f"{after / 1e6:.1f}"),
            ],
            right=("original", "before this step", "pruned"),
        )
    rows = (
        ("routed experts per MoE layer", str(topology.num_experts), str(plan.keep)),
        ("experts per token", str(topology.top_k), str(topology.top_k)),
        ("tensors, MB", f"{before / 1e6:.1f}", f"{after / 1e6:.1f}"),
    )
    return markdown_table([dict(zip(("", "original", "pruned"), row, strict=True)) for row in rows])


def _row(label: str, *values: object) -> dict[str, str]:
    return {"": label, **dict(zip(("original", "before this step", "pruned"), map(str, values), strict=True))}


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
) -> str:
    """The text of README.md.

    Args:
        structure: the source.
        plan: which experts stay.
        repaired: refitted tensors; None where nothing was repaired.
        command: the command line that made the checkpoint; empty for none.
        original_card: card of the source; its licence is carried over.
        figures: a section of measured numbers, see `card_numbers.measured`; empty for none.
        origin: the first original, where the source was pruned before; None where it is one itself.
        mtp: what became of multi-token-prediction layers, see `writer.prune`.
    """
    topology, checkpoint = structure.topology, structure.checkpoint
    name, experts = _short_name((origin or checkpoint).name), (origin or topology).num_experts
    steps = f" in several steps, this time from `{_short_name(checkpoint.name)}`" if origin else ""
    options = ", ".join(f"{key} {value}" for key, value in plan.options.items()) or "none"
    revision = f" --revision {checkpoint.revision}" if checkpoint.revision else ""
    lines = [
        *_header(structure, original_card, origin),
        "",
        f"# {name}, {plan.keep} of {experts} experts",
        "",
        f"This is `{name}` ({topology.family}) with whole routed experts removed by moecover{steps}. "
        f"{_weights(repaired)}",
        "",
        _sizes(structure, plan, origin, mtp),
        "",
        f"Method: {plan.method}; options: {options}. `moecover.json` holds the plan with every expert's saliency, the "
        "original id of every expert, and a hash of every file.",
        "",
    ]
    if figures:
        lines.append(figures)
    if command:
        lines += ["Command:", "", "```", command, "```", ""]
    lines += [
        "To check it against the original (its outputs equal those of the original with the removed experts masked"
        f"{' and the refitted tensors in place' if repaired else ''}):",
        "",
        "```",
        f"moecover verify {checkpoint.name} .{revision}",
        "```",
    ]
    if original_card:
        lines += ["", "The model card of the original is README.original.md."]
    return "\n".join(lines) + "\n"
