"""The model card of a pruned checkpoint: README.md in the hub's form."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure
    from moecover.planning.artifact import Plan


CARRIED_KEYS = ("license", "license_name", "license_link", "pipeline_tag")


def _front_matter(card: str, key: str) -> str | None:
    """A one-line entry of a card's YAML header."""
    header = re.match(r"---\n(.*?)\n---", card, flags=re.DOTALL)
    entry = re.search(rf"^{key}:[ \t]*(\S.*)$", header[1], flags=re.MULTILINE) if header else None
    return entry[1].strip() if entry else None


def _weights(repair: dict[str, Any] | None) -> str:
    """A sentence on what the remaining weights are."""
    if repair is None:
        return "The weights that remain are those of the original, byte for byte; nothing was trained."
    texts = ", ".join(f"{record['tokens used']:,} tokens of {record['name']}" for record in repair["corpora"])
    before, after = repair["mean"]
    return (
        f"{len(repair['tensors'])} tensors, down projections of experts, were refitted in closed form (repair: "
        f"{repair['kind']}) on {texts}, so that they take over part of what was removed: the squared error of a layer's "
        f"output fell from {before:.3f} to {after:.3f} of the output's square on that text (mean over layers). All others "
        "are those of the original, byte for byte; nothing was trained. `moecover.json` names every one that changed, "
        "and the error before and after by layer and corpus."
    )


def model_card(
    structure: Structure, plan: Plan, *, repair: dict[str, Any] | None, command: str, original_card: str,
    measured: str = "",
) -> str:  # fmt: skip
    """Text of README.md.

    Args:
        structure: the source.
        plan: what was kept.
        repair: what the manifest says of it, see `repair_files.Repaired`; None where nothing was repaired.
        command: what made the checkpoint.
        original_card: card of the source; its licence is carried over.
        measured: what evaluations say of the plan, see `measured`.
    """
    topology, checkpoint = structure.topology, structure.checkpoint
    before, after = checkpoint.num_bytes, structure.num_bytes(plan.keep)
    header = ["library_name: transformers", "tags: [moe, expert-pruning, moecover]"]
    if "/" in checkpoint.name and checkpoint.revision:
        header.append(f"base_model: {checkpoint.name}")
    carried = {key: _front_matter(original_card, key) for key in CARRIED_KEYS}
    header += [f"{key}: {value}" for key, value in carried.items() if value]
    options = ", ".join(f"{key} {value}" for key, value in plan.options.items()) or "none"
    name = checkpoint.name.rstrip("/").rpartition("/")[2] or checkpoint.name
    lines = [
        "---",
        *header,
        "---",
        "",
        f"# {name}, {plan.keep} of {topology.num_experts} experts",
        "",
        f"This is `{name}` ({topology.family}) with whole routed experts removed by moecover. {_weights(repair)}",
        "",
        "| | original | here |",
        "|---|---|---|",
        f"| routed experts per MoE layer | {topology.num_experts} | {plan.keep} |",
        f"| experts per token | {topology.top_k} | {topology.top_k} |",
        f"| tensors, MB | {before / 1e6:.1f} | {after / 1e6:.1f} |",
        "",
        f"Method: {plan.method}; options: {options}. `moecover.json` holds the plan with every expert's saliency, the "
        "original id of every expert, and a hash of every file.",
        "",
    ]
    if measured:
        lines += [measured]
    if command:
        lines += ["Made by:", "", "```", command, "```", ""]
    lines += [
        "Check it against the original (same outputs as the original with the removed experts masked"
        f"{' and these tensors in place' if repair else ''}):",
        "",
        "```",
        f"moecover verify {checkpoint.name} . {f'--revision {checkpoint.revision}' if checkpoint.revision else ''}".strip(),
        "```",
    ]
    if original_card:
        lines += ["", "The card of the original is in README.original.md."]
    return "\n".join(lines) + "\n"
