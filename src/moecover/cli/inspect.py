"""The verb `inspect`: a model's routed experts, their size, whether it can be pruned, and what a shape would be."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.servers import SERVERS
from moecover.cli.options import add_model
from moecover.cli.values import share
from moecover.cli.verb import Outcome
from moecover.cli.widths import add_width_numbers
from moecover.gguf.parts import is_gguf
from moecover.text import size_text

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure

SHAPE = ("keep", "retain", "multiple_of", "width", "retain_width", "width_multiple_of")
PROFILED = "profile the original that it was made from"
HELP = "show a model's routed experts, their size, and whether it can be pruned"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser, note=", or a .gguf file (of a split one the first part)")
    parser.add_argument(
        "--for",
        dest="server",
        choices=SERVERS,
        help="also show what this server needs that the folder lacks, and what it would lack at every size (default: "
        "llama.cpp for a .gguf file)",
    )
    group = parser.add_argument_group(
        "a shape, instead of the table of sizes: what it takes, and what servers ask of it"
    )
    group.add_argument("--keep", type=int, metavar="K", help="experts kept per layer")
    group.add_argument("--retain", type=share, metavar="R", help="fraction of experts kept per layer, or as 50%%")
    group.add_argument("--multiple-of", type=int, metavar="N", help="round the experts kept to a multiple of N")
    add_width_numbers(group, several=False)


def run(args: argparse.Namespace) -> Outcome:
    """Print the facts, one a line; exit status 1 where pruning is refused."""
    from moecover.checkpoints.inspection import inspect
    from moecover.checkpoints.opening import described
    from moecover.progress import SILENT

    asked = {name: value for name in SHAPE if (value := getattr(args, name)) is not None}
    structure = described(args.model, revision=args.revision, progress=SILENT) if asked else None
    facts = inspect(structure or args.model, revision=args.revision, server=args.server)
    lines = [line("model", facts["model"]), line("family", facts["family"])]
    if "experts" in facts:
        shared = f", {facts['shared_experts']} shared" if facts["shared_experts"] else ""
        share = facts["routed_bytes"] / facts["total_bytes"]
        routed = f"all routed experts {size_text(facts['routed_bytes'])}, {share:.0%} of the model"
        files = f"{facts['shards']} file{'s' if facts['shards'] != 1 else ''}"
        lines += [
            line("MoE layers", f"{len(facts['moe_layers'])} of {facts['decoder_layers']} decoder layers"),
            line("experts", f"{facts['experts']} per layer, top-{facts['top_k']}{shared}"),
            line("one expert", f"{size_text(facts['expert_bytes'])}; {routed}"),
            line("size now", f"{size_text(facts['total_bytes'])} in {files}"),
        ]
        if structure is not None:
            facts["asked"] = _asked(structure, asked, args.server)
            lines += _asked_lines(facts)
        else:
            lines += _sizes_by_shape(facts) if facts["channels"] else _sizes(facts)
    else:
        lines.append(line("size now", size_text(facts["total_bytes"])))
    if facts.get("quantised"):
        profiled = "profile runs it in llama.cpp" if is_gguf(facts["model"]) else PROFILED
        lines.append(line("quantised", f"{facts['quantised']}: cut as stored; {profiled}"))
        if (group := facts.get("channel_groups", 1)) > 1:
            lines.append(line("", f"in blocks of {group} channels: plan thinner experts with --channel-groups {group}"))
    lines += [line("note", warning) for warning in facts["warnings"]]
    lines += [line("refused", reason) for reason in facts["refused"]] or [line("refused", "nothing, it can be pruned")]
    reasons = [reason.removeprefix(f"{args.model}: ") for reason in facts["refused"]]
    problem = f"{args.model} cannot be pruned: {reasons[0]}" if reasons else ""
    return Outcome(facts, "\n".join(lines), 1 if problem else 0, problem)


def _asked(structure: Structure, asked: Mapping[str, Any], server: str | None) -> dict[str, Any]:
    """What a shape takes, and what servers ask of it.

    Raises:
        InputError: there is no such shape.
    """
    from moecover.checkpoints.servers import LLAMA_CPP
    from moecover.planning.shapes import resolve_shape
    from moecover.planning.wishes import wishes

    channels = None if isinstance(structure.width, str) else structure.width.channels
    shape = resolve_shape(structure.topology, channels, **asked)
    server = LLAMA_CPP if server is None and structure.checkpoint.gguf is not None else server
    return {
        "keep": shape.keep,
        "width": shape.width,
        "bytes": structure.num_bytes(shape.keep, width=shape.width),
        "wishes": wishes(structure.topology, channels, shape, server),
    }


def _asked_lines(facts: Mapping[str, Any]) -> list[str]:
    """The shape that was asked for in words, with a line for each server that it does not suit."""
    asked = facts["asked"]
    thin = "" if asked["width"] is None else f" of {asked['width']} channels"
    share = asked["bytes"] / facts["total_bytes"]
    lines = [
        line("asked for", f"{asked['keep']} experts{thin}: {size_text(asked['bytes'])}, {share:.0%} of the size now")
    ]
    for wish in asked["wishes"]:
        way = " and ".join(wish["way"]) or "nothing near meets all of it"
        both = (("experts", wish["experts"]), ("channels", wish["channels"]))
        asks = [f"of the {of} {'; '.join(wanted)}" for of, wanted in both if wanted]
        lines.append(line(wish["server"], f"asks {', '.join(asks)}: {way}"))
    return lines if asked["wishes"] else [*lines, line("servers", "ask for nothing else")]


def _sizes(facts: Mapping[str, Any]) -> list[str]:
    """The sizes of fewer whole experts, and why these cannot be thinner."""
    lines = []
    for size in facts["sizes"]:
        lines.append(line(f"retain {size['percent']} %", f"{size_text(size['bytes'])}, keep {size['keep']}"))
        lines += [line("", text) for text in size.get("unmet", ())]
    return [*lines, line("channels", f"all of an expert's stay: {facts['all_channels_because']}")]


def _sizes_by_shape(facts: Mapping[str, Any]) -> list[str]:
    """A table of sizes, experts down and their channels across, and what a token computes."""
    full, widths = facts["channels"], [row["width"] for row in facts["widths"]]
    sizes = {(row["keep"], row["width"]): row["bytes"] for row in facts["thin_sizes"]}
    sizes |= {(row["keep"], full): row["bytes"] for row in facts["sizes"]} | {
        (facts["experts"], full): facts["total_bytes"]
    }
    columns = [full, *reversed(widths)]
    lines = [line("size by shape", "".join(f"{f'{width} channels':<16}" for width in columns).rstrip())]
    unmet = {row["keep"]: row.get("unmet", ()) for row in facts["sizes"]}
    for keep in dict.fromkeys([*unmet, facts["experts"]]):
        cells = "".join(f"{size_text(sizes[keep, width]):<16}" for width in columns)
        lines.append(line(f"  {keep} experts", cells.rstrip()))
        lines += [line("", text) for text in unmet.get(keep, ())]
    lines += [line("", text) for row in reversed(facts["widths"]) for text in row.get("unmet", ())]
    computed = f"{facts['top_k']} experts x {full} channels a layer"
    return [
        *lines,
        line("a token computes", f"{computed}: less where experts are thinner, as much where they are fewer"),
    ]


def line(name: str, text: str) -> str:
    """A fact on a line."""
    return f"{name:18}{text}"
