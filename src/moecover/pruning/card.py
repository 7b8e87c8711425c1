"""The model card of a pruned model in the hub's format, with a YAML header: README.md, of a GGUF file NAME.md."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.remote_code import is_trusted
from moecover.merging.method import NONE
from moecover.pruning.card_header import header
from moecover.pruning.card_names import placeholder, public_command, public_name, short_name
from moecover.pruning.card_usage import usage
from moecover.text import markdown_block, markdown_code, markdown_table, markdown_text

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure
    from moecover.planning.artifact import Plan
    from moecover.pruning.origin import Origin
    from moecover.repairing.artifact import Repaired


PAPER = "2607.01710"  # of TB-Coverage, on arXiv
CITATION = f"""\
@misc{{tbcoverage,
  title = {{Generic TB-Coverage}},
  eprint = {{{PAPER}}},
  archivePrefix = {{arXiv}},
  url = {{https://arxiv.org/abs/{PAPER}}}
}}
@software{{moecover,
  title = {{moecover: smaller Mixture-of-Experts language models when nobody yet knows what they will be used for}},
  author = {{{{The moecover authors}}}}
}}"""


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


def _shape(structure: Structure, plan: Plan) -> str:
    """Experts and, where their number is known, channels of each that are left."""
    width = structure.width
    channels = plan.width if isinstance(width, str) else plan.width or width.channels
    return f"{plan.keep} experts" if channels is None else f"{plan.keep} experts x {channels:,} channels"


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


def _holds(structure: Structure) -> str:
    """What holds the plan, by format."""
    if structure.checkpoint.gguf is not None:
        return "The keys `moecover.*` of the file hold the method and the original ids of the experts that were kept."
    return (
        "`moecover.json` holds the plan with every expert's saliency, the original id of every expert, and a hash of "
        "every file."
    )


def _limits(plan: Plan, *, measured: bool, repaired: bool) -> list[str]:
    """What the model cannot do, and what nobody has looked at."""
    read = ", ".join(map(markdown_text, plan.calibration))
    chosen = f"text unlike that which the experts were chosen on ({read})" if read else "some kinds of text"
    numbers = "the numbers above are of other text than yours" if measured else "nothing was measured for this card"
    more = "" if repaired else " The model was not trained after pruning, so nothing has made up for that."
    return [
        *("## Limits", ""),
        f"- What only removed experts knew is lost.{more} Expect the largest losses on {chosen}; {numbers}. Measure "
        "your own: `moecover evaluate`.",
        "- Limits, biases and terms of use of the original hold here too. Safety and refusals were not looked at "
        "after pruning.",
        "",
    ]


def _commands(structure: Structure, command: str, output: str, *, weights: str, changed: bool) -> list[str]:
    """How it was made, and how that is checked."""
    checkpoint = structure.checkpoint
    name = public_name(checkpoint)
    revision = f" --revision {shlex.quote(checkpoint.revision)}" if checkpoint.revision else ""
    trusted = " --trust-remote-code" if checkpoint.folder is not None and is_trusted(checkpoint.folder) else ""
    if shown := public_command(command, name if checkpoint.revision else ""):
        shown = f"Command:\n\n{markdown_block(shown)}\n\n"
    place = shlex.quote(output) if output else "."
    return [
        *("## How it was made", ""),
        f"{shown}To check it against the original (its outputs equal those of the original with the removed {weights} "
        f"masked{' and the changed tensors in place' if changed else ''}):",
        "",
        markdown_block(f"moecover verify {shlex.quote(name)} {place}{revision}{trusted}"),
        "",
    ]


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
        original_card: card of the source; its licence, languages and tags are carried over.
        figures: a section of measured numbers, see `card_numbers.measured`; empty for none.
        origin: the first original, where the source was pruned before; None where it is one itself.
        mtp: what became of multi-token-prediction layers, see `writer.prune`.
        output: name of the file that is written; empty for a folder, which the card lies in.
    """
    topology, checkpoint = structure.topology, structure.checkpoint
    name, experts = short_name((origin or checkpoint).name), (origin or topology).num_experts
    repository = placeholder(name, plan, gguf=checkpoint.gguf is not None)
    steps = f" in several steps, this time from {markdown_code(short_name(checkpoint.name))}" if origin else ""
    options = ", ".join(f"{key} {value}" for key, value in plan.options.items()) or "none"
    lines = [
        *header(structure, plan, original_card, origin=origin, repaired=repaired),
        "",
        f"# {markdown_text(name)}, {plan.keep} of {experts} experts{_thin_title(structure, plan, origin)}",
        "",
        f"This is {markdown_code(name)} ({markdown_text(topology.family)}) with {_removed(structure, plan)} by "
        f"moecover{steps}. {_weights(repaired)}{_tables(structure)}",
        "",
        _sizes(structure, plan, origin, mtp),
        "",
        f"Shape: {_shape(structure, plan)} in each of {len(plan.layers)} MoE layers. "
        f"Method: {markdown_text(plan.method)}; options: {markdown_text(options)}. {_holds(structure)}",
        "",
        *_calibration(plan),
        *usage(structure, plan, repository=repository, output=output),
    ]
    if figures:
        lines.append(figures)
    lines += [
        *_limits(plan, measured=bool(figures), repaired=repaired is not None),
        *_commands(
            structure,
            command,
            output,
            weights="experts" if plan.width is None else "experts and channels",
            changed=repaired is not None,
        ),
        *("## Citation", "", markdown_block(CITATION, "bibtex")),
    ]
    if original_card:
        lines += ["", "The model card of the original is README.original.md."]
    return "\n".join(lines) + "\n"
