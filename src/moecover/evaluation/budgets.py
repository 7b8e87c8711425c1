"""A plan by a budget of bytes, as a job: reads a profile and a bound, for the best shape also the model and text.

`planning.curve` lists the shapes that are within the bound, `shape_search` measures them; here are the checks, the text
and the opened model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from moecover.checkpoints.opening import Model, described
from moecover.checkpoints.pieces import NOTHING
from moecover.checkpoints.structure import Structure
from moecover.checkpoints.topology import Topology
from moecover.corpora.bos import check_bos
from moecover.corpora.loading import Corpora
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.bounds import held_out_texts, opened_for, profiled_model, sources_of
from moecover.evaluation.given import Texts
from moecover.evaluation.held_out import BLOCKS
from moecover.evaluation.run import evaluate
from moecover.evaluation.shape_search import best_shape
from moecover.planning.artifact import Plan
from moecover.planning.curve import AUTO, EXPERTS, Fits, curve, parse_shape, parse_share, within_share
from moecover.planning.fitting import channel_groups
from moecover.planning.job import ROUND_OPTIONS, plans
from moecover.planning.lines import calibration_notes
from moecover.planning.methods import METHODS, default_method
from moecover.planning.run import check_options, plan_budgets
from moecover.planning.shapes import Shape
from moecover.profiling.artifact import Profile
from moecover.profiling.records import torch_dtype
from moecover.progress import Progress, resolve
from moecover.runtime.distributed import of_first
from moecover.runtime.memory import parse_size
from moecover.runtime.options import RunOptions, check_known
from moecover.runtime.passes import Passes, check_least, passes
from moecover.runtime.running import Running


def fits_budget(
    topology: Topology,
    channels: int | None,
    structure: Structure | None,
    budget: float | str | None,
    max_size: int | str | None,
) -> Fits:
    """The bound: a share of the routed bytes, or the size of the checkpoint."""
    if (budget is None) == (max_size is None):
        raise InputError(f"give exactly one of {arg('budget')} (share of the routed bytes) and {arg('max_size')}")
    whole = channels or 1
    if budget is not None:
        return within_share(topology, whole, parse_share(str(budget), "budget"))
    assert max_size is not None
    if structure is None:
        raise InputError(f"{arg('max_size', max_size)} looks at the headers of the model: give {arg('model')}")
    most = parse_size(max_size) if isinstance(max_size, str) else max_size
    headers = structure
    if headers.checkpoint.num_bytes <= most:
        raise InputError(
            f"{arg('max_size', max_size)}: {headers.checkpoint.name} itself has {headers.checkpoint.num_bytes:,} "
            "bytes, so nothing is to be removed"
        )
    return lambda keep, width: headers.num_bytes(keep, width=None if width == whole else width) <= most


def shapes_within(
    topology: Topology,
    channels: int | None,
    *,
    budget: float | str | None = None,
    max_size: int | str | None = None,
    structure: Structure | None = None,
    multiple_of: int | None = None,
    width_multiple_of: int | None = None,
) -> list[Shape]:
    """The curve of shapes within a budget, widest first; whole experts alone where no width is known.

    Args:
        topology: of the model.
        channels: of an expert; None where they are not known.
        budget: share of the routed bytes, as a fraction or a percentage.
        max_size: of the checkpoint, in bytes or as text (``"12GB"``).
        structure: of the model, for ``max_size``; where it is quantised in blocks, widths are whole blocks.
        multiple_of: only multiples of this number of experts.
        width_multiple_of: only multiples of this number of channels.

    Raises:
        InputError: no bound, both, or no shape is within it.
    """
    fits = fits_budget(topology, channels, structure, budget, max_size)
    thin = structure is None or not isinstance(structure.width, str)
    found = curve(
        topology,
        channels or 1,
        fits,
        multiple_of=multiple_of,
        width_multiple_of=multiple(width_multiple_of, channel_groups(structure)) if channels is not None else None,
    )
    return found if channels is not None and thin else [shape for shape in found if shape.width is None][:1]


def multiple(asked: int | None, group: int) -> int | None:
    """What widths are multiples of, where channels stay or go in groups; None for any."""
    return asked if group == 1 else math.lcm(asked or 1, group)


def of_shapes(shapes: list[Shape], options: Mapping[str, Any], structure: Structure | None) -> dict[str, Any]:
    """Options of plans of some shapes, with the groups in which a quantised model's channels stay or go."""
    thin, group = any(shape.width for shape in shapes), channel_groups(structure, options.get("channel_groups", 1))
    return {**options, "channel_groups": group} if thin and group > 1 else {**options}


def plan_for_budget(
    profile: Profile | str | Path,
    model: Model | None = None,
    *,
    budget: float | str | None = None,
    max_size: int | str | None = None,
    shape: str = AUTO,
    texts: Texts = (),
    corpora: Corpora = (),
    windows: int | None = None,
    bos: str | None = None,
    multiple_of: int | None = None,
    width_multiple_of: int | None = None,
    method: str | None = None,
    method_options: Mapping[str, Any] = NOTHING,
    progress: bool | Progress = True,
    **options: Unpack[RunOptions],
) -> Plan:
    """The plan for a budget of bytes, with the shape that is asked for or the one that loses least.

    Args:
        profile: from `profile`, or its folder.
        model: the model of the profile: folder, hub id or structure; not needed for a share and whole experts.
        budget: share of the routed bytes, as a fraction (0.5) or a percentage (``"50%"``); or give ``max_size``.
        max_size: of the checkpoint, in bytes or as text (``"12GB"``).
        shape: ``auto``, the one that loses least on held-out text; ``experts``, whole ones; or ``KxW``.
        texts: held-out text, see `evaluate`; by default blocks of the calibration corpora that the profile did not use.
        corpora: files of calibration corpora, to find those blocks; named corpora need none.
        windows: windows or blocks per text at most; None for 64.
        bos: what a window of ``texts`` begins with, see `evaluate`.
        multiple_of: only multiples of this number of experts.
        width_multiple_of: only multiples of this number of channels.
        method: name in `METHODS`; None for the default.
        method_options: of the method, ``protect_super_experts``, ``protect_channels`` and ``channel_groups``.
        progress: True draws bars and a log on stderr or in a notebook; False is silent.
        **options: see `RunOptions`; batch size 1 and the profile's dtype by default.

    Returns:
        The plan; for ``auto`` its ``found`` holds the texts and every shape that was measured.

    Raises:
        InputError: no shape is within the budget, another model than the profile's, or arguments out of range.
    """
    shown, name = resolve(progress), default_method().name if method is None else method
    check_options(name, {key: value for key, value in method_options.items() if key not in ROUND_OPTIONS})
    check_known(options, RunOptions)
    check_least(1, windows=windows)
    check_bos(bos or "auto")
    made = profile if isinstance(profile, Profile) else Profile.load(Path(profile))
    headers = None if model is None else described(model, revision=options.get("revision"), progress=shown)
    group = method_options.get("channel_groups", 1)
    shapes = shapes_within(
        made.topology,
        made.width,
        budget=budget,
        max_size=max_size,
        structure=headers,
        multiple_of=multiple_of,
        width_multiple_of=multiple(width_multiple_of, group),
    )
    wanted = parse_shape(shape, made.topology, made.width)
    if wanted == AUTO and len(shapes) > 1:
        if headers is None:
            raise InputError(f"{arg('shape', AUTO)} measures shapes in the model: give {arg('model')}")
        how = passes({**options, "dtype": options.get("dtype") or torch_dtype(made.settings)}, batch_size=1)
        named, files = sources_of(made, texts, corpora)
        structure = profiled_model(made, headers, how, options.get("revision"), shown)
        loaded = held_out_texts(made, named, files, structure, windows or BLOCKS, bos, shown)
        found = _measured(made, structure, shapes, loaded, name, method_options, how, shown)
    else:
        one = wanted if isinstance(wanted, Shape) else whole_experts(shapes)
        check_within(one, made.width, fits_budget(made.topology, made.width, headers, budget, max_size))
        given = of_shapes([one], method_options, headers)
        live = () if METHODS[name].from_profile else ("dtype", "device", "device_map", "memory_limit", "revision")
        how_live: dict[str, Any] = {key: options.get(key) for key in live} | ({"model": headers} if live else {})
        (found,) = plans(made, [one.keep], [one.width], method=name, options=given, progress=shown, **how_live)
    for line in calibration_notes(found, made):
        shown.say(line)
    return found


def whole_experts(shapes: list[Shape]) -> Shape:
    """The shape of whole experts on a curve.

    Raises:
        InputError: the budget leaves too few.
    """
    if shapes[0].width is not None:
        raise InputError(
            f"{arg('shape', EXPERTS)}: the budget leaves fewer whole experts than the router needs. Allow more, or "
            f"give {arg('shape', AUTO)}"
        )
    return shapes[0]


def check_within(shape: Shape, channels: int | None, fits: Fits) -> None:
    """Refuse a shape that is beyond the budget."""
    if not fits(shape.keep, shape.width or channels or 1):
        raise InputError(f"{shape} are beyond the budget. Allow more, or give {arg('shape', AUTO)}")


def _measured(
    profile: Profile,
    structure: Structure,
    shapes: list[Shape],
    texts: list[Corpus],
    method: str,
    options: Mapping[str, Any],
    how: Passes,
    progress: Progress,
) -> Plan:
    """Open the model as it fits, and measure."""
    with opened_for(structure, texts, how, progress) as model:
        return measured_shape(profile, structure, shapes, texts, method, options, model, how.batch_size, progress)


def measured_shape(
    profile: Profile,
    structure: Structure,
    shapes: list[Shape],
    texts: list[Corpus],
    method: str,
    options: Mapping[str, Any],
    model: Running,
    batch_size: int,
    progress: Progress,
) -> Plan:
    """The plan of the best of some shapes, measured in an open model; see `best_shape`.

    Of several processes the first one's plans are measured, and its numbers decide which shapes come next.
    """
    more = METHODS[method].given(model=model, structure=structure)

    def make(asked: list[Shape]) -> list[Plan]:
        keeps, widths, given = (
            [one.keep for one in asked],
            [one.width for one in asked],
            of_shapes(asked, options, structure),
        )
        plans = plan_budgets(profile, method=method, keeps=keeps, widths=widths, **more, **given)
        return of_first(model.world, plans)

    def measure(rows: dict[str, Plan], full: bool) -> Evaluation:
        how: Any = {"texts": texts, "full": full, "batch_size": batch_size, "bar": progress.bar}
        return of_first(model.world, evaluate(structure, rows, model=model, **how))

    return best_shape(structure, shapes, make, measure, texts=texts, say=progress.say)
