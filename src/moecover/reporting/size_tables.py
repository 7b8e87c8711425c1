"""The tables of sizes: what every budget leaves, and quality by size where further files stand beside a model."""

from __future__ import annotations

import statistics

from moecover.planning.shapes import shape_name
from moecover.reporting.blocks import MISSING, Column, Table, Value, text_column
from moecover.reporting.findings import Estimate, ModelFindings, Point
from moecover.reporting.numbers import percentage, size
from moecover.reporting.values import FULL_MODEL, OF_FULL, kl_value, method_rows, perplexity_value, shape_value


def size_table(model: ModelFindings) -> Table | None:
    """Size of the checkpoint before and after, by budget."""
    full = model.full
    before = full.num_bytes if full else _whole(model.about.get("num_bytes"))
    experts = full.keep if full else _whole(model.about.get("experts"))
    sizes: dict[tuple[float, int, int], int] = {(1.0, experts or 0, 0): before} if before else {}
    pruned = {(p.retain, p.keep, p.width or 0): p.num_bytes for s in model.series for p in s.points}
    rows = [*sizes.items(), *sorted(pruned.items(), reverse=True)]
    if not rows:
        return None
    body = tuple(
        (
            Value(FULL_MODEL if r == 1.0 else f"{percentage(r)} of the {model.kept_of}", r),
            Value(shape_name(keep, width or None) if keep else "–", keep or None),
            Value(size(b), b),
            Value(f"{b / before:.1%}", b / before) if before else MISSING,
        )
        for (r, keep, width), b in rows
    )
    what = Column("what is kept", number=False)
    columns = (
        what,
        Column("experts × channels" if model.thin else "experts per layer"),
        Column("size of the weights"),
        Column(OF_FULL),
    )
    return Table("size", f"Size of {model.name} before and after", columns, body)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def by_size_table(model: ModelFindings) -> Table | None:
    """Everything that was measured by the bytes of its weights, largest first; None without further files."""
    if not model.files:
        return None
    known = [(series.name if series else FULL_MODEL, p) for series, p in method_rows(model)]
    rows = sorted([*known, *model.files], key=lambda row: -row[1].num_bytes)
    full = model.full.num_bytes if model.full else None
    columns = (
        text_column("model"),
        Column("experts × channels" if model.thin else "experts per layer"),
        Column("size of the weights"),
        Column(OF_FULL),
        *(Column(text, first="ascending") for text in model.texts),
        Column("mean KL", first="ascending"),
    )
    return Table(
        "by-size",
        f"Perplexity by size, {model.name} and its files",
        columns,
        tuple(
            (
                Value(name, name.casefold()),
                shape_value(p),
                Value(size(p.num_bytes), p.num_bytes),
                Value(f"{p.num_bytes / full:.1%}", p.num_bytes / full) if full else MISSING,
                *(perplexity_value(p.perplexity.get(text)) for text in model.texts),
                kl_value(_mean_kl(p)),
            )
            for name, p in rows
        ),
        "Plans are counted in the types in which the full model is stored. KL: mean over the texts of the divergence "
        "from the full model's next-token probabilities, in nats per token.",
    )


def _mean_kl(p: Point) -> Estimate | None:
    """The mean over the texts, without a standard error."""
    return Estimate(statistics.fmean(e.value for e in p.kl.values()), None, ()) if p.kl else None
