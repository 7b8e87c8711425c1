"""Exchange of plans with other tools: reads their keep and prune lists as plans, writes plans as such lists."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from moecover import rehearsal
from moecover.checkpoints.opening import Model, described
from moecover.checkpoints.structure import Structure
from moecover.checkpoints.topology import Topology
from moecover.errors import InputError, arg
from moecover.files.atomic import write_text
from moecover.planning.artifact import LayerPlan, Plan
from moecover.planning.fitting import check_plan
from moecover.planning.keep import resolve_keep
from moecover.planning.keep_lists import Format, Sets, format_named
from moecover.planning.list_files import document, format_of, ids_by_layer
from moecover.progress import Progress, resolve

IMPORTED = "imported"  # the method of a plan that was read from a list


def import_plan(
    path: str | Path,
    model: Model,
    *,
    from_format: str | None = None,
    keep: int | None = None,
    retain: float | None = None,
    revision: str | None = None,
    progress: bool | Progress = True,
) -> Plan:
    """A plan from the keep or prune list of another tool; a plan.json is read as it is.

    Args:
        path: the list, JSON or JSON lines; a pickle is not opened.
        model: that the list is of: folder, hub id, GGUF file, or a structure. Only its headers are read.
        from_format: name in `keep_lists.FORMATS`; None where the file tells.
        keep: of a ranking of all experts, how many stay; give this or ``retain`` for a ranking, else neither.
        retain: fraction of them.
        revision: branch, tag or commit of a hub model.
        progress: True logs on stderr or in a notebook; False is silent.

    Returns:
        A plan with method ``imported``: the ids ascending, those of a ranking also best first in ``filled``.

    Raises:
        InputError: a file that cannot be read or is ambiguous, layers or ids that the model does not have, unequal
            counts, or what `check_plan` refuses.
    """
    path = Path(path)
    asked = None if from_format is None else format_named(from_format, "from_format")
    value = document(path)
    is_plan = isinstance(value, dict) and {"keep", "layers"} <= value.keys()
    structure = described(model, revision=revision, progress=resolve(progress))
    row = None if is_plan else asked or format_of(value, path)
    given = [name for name, one in (("keep", keep), ("retain", retain)) if one is not None]
    if given and (row is None or row.holds != "ranking"):
        raise InputError(f"{arg(given[0])} has no use here: {path} says which experts stay")
    if row is None:
        if asked is not None:
            raise InputError(f"{path} is a plan of moecover: {arg('from_format', asked.name)} has no use here")
        plan = Plan.load(path)
    else:
        plan = _imported(path, row, value, structure, keep=keep, retain=retain)
    check_plan(plan, structure, other_weights=True)
    return plan


def _imported(
    path: Path, row: Format, value: object, structure: Structure, *, keep: int | None, retain: float | None
) -> Plan:
    """The plan of a list, its counts equal."""
    topology = structure.topology
    lists = ids_by_layer(row, value, topology, path)
    if row.holds == "ranking":
        count = resolve_keep(topology, keep=keep, retain=retain)
        if short := [n for n, ids in zip(topology.decoder_layers, lists, strict=True) if len(ids) < count]:
            raise InputError(f"{path}: decoder layer {short[0]} ranks fewer than {count} experts. Keep fewer")
        lists = [ids[:count] for ids in lists]
    kept = lists
    if row.holds == "pruned":
        kept = [sorted(set(range(topology.num_experts)) - set(ids)) for ids in lists]
    _check_equal(path, kept, topology)
    layers = [
        LayerPlan(decoder_layer=number, kept=sorted(ids), filled=ids if row.holds == "ranking" else [])
        for number, ids in zip(topology.decoder_layers, kept, strict=True)
    ]
    return Plan(
        schema=1,
        method=IMPORTED,
        options={"file": path.name, "format": row.name},
        keep=len(kept[0]),
        layers=layers,
        topology_fingerprint=topology.fingerprint,
        model=structure.checkpoint.name,
    )


def _check_equal(path: Path, kept: list[list[int]], topology: Topology) -> None:
    """Refuse lists that leave layers with different numbers of experts, or one with none."""
    counts = Counter(map(len, kept))
    if len(counts) > 1:
        most = counts.most_common(1)[0][0]
        other, number = next(
            (len(ids), n) for ids, n in zip(kept, topology.decoder_layers, strict=True) if len(ids) != most
        )
        raise InputError(
            f"{path} keeps {min(counts)} to {max(counts)} experts by layer ({other} in decoder layer {number}, {most} "
            f"in {counts[most]} of {len(kept)}). Every layer must keep the same number: stock loaders and servers "
            "read one"
        )
    if not kept[0]:
        raise InputError(
            f"{path} keeps no expert. Are its ids the pruned ones? {arg('from_format')} says which they are"
        )


def export_plan(
    plan: Plan | str | Path,
    model: Model,
    output: str | Path,
    *,
    export: str,
    revision: str | None = None,
    progress: bool | Progress = True,
) -> Path:
    """Write a plan as the list of another tool; the file appears only when it is complete.

    Args:
        plan: from `plan`, or its file.
        model: that it is of: folder, hub id, or a structure. Only its headers are read.
        output: file to write, replaced if it exists.
        export: name in `keep_lists.FORMATS`.
        revision: branch, tag or commit of a hub model.
        progress: True logs on stderr or in a notebook; False is silent.

    Raises:
        InputError: an unknown format, a plan that does not fit the model, or one of thinner experts.
        MoecoverError: the disk is full or the file cannot be written.
    """
    row, shown = format_named(export, "export"), resolve(progress)
    made = plan if isinstance(plan, Plan) else Plan.load(plan)
    structure = described(model, revision=revision, progress=shown)
    check_plan(made, structure, other_weights=True)
    if made.width is not None:
        raise InputError(
            f"the plan keeps {made.width} channels of every expert, which no list of experts can say. Export a plan of "
            "whole experts"
        )
    if made.top_k is not None:
        shown.say(f"note: {output} does not say that a token goes to {made.top_k} experts, as the plan does")
    if made.mtp:
        shown.say(f"note: {output} leaves out what the plan keeps of multi-token-prediction layers")
    blocks = tuple(name.rpartition(".")[0] for name in structure.experts_modules)
    if not blocks:  # a GGUF file has tensors, no modules
        blocks = tuple(f"model.layers.{number}.mlp" for number in structure.topology.decoder_layers)
    rehearsal.ahead("write", output)
    rehearsal.stop()
    write_text(Path(output), row.text(Sets(structure.topology, blocks, made.kept)))
    if row.holds == "ranking":
        experts = structure.topology.num_experts
        ratio = max(0.0, 1 - (made.keep + 0.5) / experts)  # int(experts * (1 - ratio)) is then `keep`
        shown.say(
            f"note: {output} has the kept experts first, then the others, both by id: it is no ranking, and right with "
            f'"expert_prune_ratio": {ratio:.6f} only'
        )
    return Path(output)
