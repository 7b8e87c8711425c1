"""Plans as a job: reads a profile and, for methods that run the experts, a model as users give it; gives plans."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.errors import InputError, arg
from moecover.planning.artifact import Plan
from moecover.planning.lines import calibration_notes
from moecover.planning.live import live_model, profiled_checkpoint
from moecover.planning.methods import METHODS, default_method
from moecover.planning.options import LAYERWISE
from moecover.planning.run import check_options, plan_budgets
from moecover.planning.shapes import resolve_shape
from moecover.profiling.artifact import Profile
from moecover.progress import Progress, resolve
from moecover.runtime.world import ALONE, World

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.opening import Model
    from moecover.checkpoints.structure import Structure
    from moecover.corpora.packing import Corpus
    from moecover.runtime.options import RunOptions
    from moecover.runtime.running import Running

SEARCH_TOKENS = 8192  # calibration tokens that a search runs on by default
ROUND_OPTIONS = ("protect_super_experts", "protect_channels", "channel_groups")  # of `plan_budgets` itself


@contextlib.contextmanager
def search_resources(
    method: str,
    options: Mapping[str, Any],
    structure: Structure,
    model: Running,
    *,
    budgets: int = 1,
    sample: Sequence[Corpus] | None = None,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """What a method works with beside the profile, as arguments of `plan_budgets`.

    Args:
        method: its name.
        options: its options; in every mode but ``layerwise`` every budget has a pass of its own.
        structure: the checkpoint.
        model: of it, open.
        budgets: how many plans are made.
        sample: calibration text to search on; None for the sample that the profile keeps.
        progress: shows the search.
    """
    if not METHODS[method].runs_experts:
        yield METHODS[method].given(structure=structure)
        return
    rounds = 1 if options.get("mode", LAYERWISE) == LAYERWISE else budgets
    with progress.bar("searching", rounds * len(structure.topology.decoder_layers), unit="layers") as advance:
        yield {"model": model, "structure": structure, "sample": sample, "advance": advance}


def check_search(method: str, profile: Profile, model: object, *, name: str = "the profile") -> None:
    """Refuse what a method cannot plan from, before a model is read.

    Args:
        method: its name.
        profile: that is planned from.
        model: as given, None where it was not.
        name: what messages call the profile.

    Raises:
        InputError: a method that runs the experts without a model or saved inputs, or a model that it does not need.
    """
    searches = METHODS[method].runs_experts
    if METHODS[method].from_profile:
        if model is not None:
            raise InputError(f"{arg('model')} is no option of method {method}: it plans from the profile alone")
        return
    if model is None:
        does = "runs the experts" if searches else "reads the weights"
        raise InputError(f"{arg('method', method)} {does}: give {arg('model')}, the model of the profile")
    if searches and profile.inputs is None:
        raise InputError(
            f"{name} holds no expert-layer inputs, which {method} needs. "
            f"Make it with `moecover profile ... --keep-inputs {SEARCH_TOKENS}`"
        )


def plans(
    profile: Profile,
    keeps: Sequence[int],
    widths: Sequence[int | None] | None = None,
    *,
    method: str,
    options: Mapping[str, Any],
    model: Model | torch.nn.Module | Running | None = None,
    structure: Structure | None = None,
    dtype: str | None = None,
    device: str | None = None,
    device_map: str | Path | Mapping[str, str | int] | None = None,
    memory_limit: int | str | None = None,
    revision: str | None = None,
    here: World = ALONE,
    progress: Progress,
) -> list[Plan]:
    """Plans for several budgets; a method that runs the experts has its model opened here where it is not open yet.

    Args:
        profile: statistics.
        keeps: experts kept per layer, one number a plan.
        widths: channels kept of each of them, one number a plan, None for all.
        method: name in `METHODS`.
        options: of the method, and `ROUND_OPTIONS`.
        model: folder, hub id, structure, or a live model (then with ``structure``).
        structure: of a live model.
        dtype: torch dtype by name; None for the profile's.
        device: torch device by name; None for a GPU where there is one.
        device_map: devices of the parts of a model, see `RunOptions`.
        memory_limit: memory that may be used, see `RunOptions`; a model that does not fit runs layer by layer.
        revision: branch, tag or commit of a hub model.
        here: this process among others under torchrun, which share out the layers; each gets the plans.
        progress: shows the search.

    Raises:
        InputError: what `plan_budgets` raises, or a model that cannot be read.
    """
    how: RunOptions = {
        "dtype": dtype,
        "device": device,
        "device_map": device_map,
        "memory_limit": memory_limit,
        "revision": revision,
    }
    progressive = options.get("mode", LAYERWISE) != LAYERWISE
    with contextlib.ExitStack() as stack:
        resources: dict[str, Any] = {}
        if METHODS[method].runs_experts and model is not None:
            opening = live_model(profile, model, structure, how, progressive=progressive, here=here, progress=progress)
            found, live = stack.enter_context(opening)
            searching = search_resources(method, options, found, live, budgets=len(keeps), progress=progress)
            resources = stack.enter_context(searching)
        elif METHODS[method].reads_weights and model is not None:
            found = profiled_checkpoint(profile, model, structure, revision, progress)
            resources = METHODS[method].given(structure=found)
        return plan_budgets(profile, method=method, keeps=keeps, widths=widths, **resources, **options)


def plan(
    profile: Profile | str | Path,
    *,
    keep: int | None = None,
    retain: float | None = None,
    multiple_of: int | None = None,
    width: int | None = None,
    retain_width: float | None = None,
    width_multiple_of: int | None = None,
    method: str | None = None,
    model: Model | torch.nn.Module | Running | None = None,
    structure: Structure | None = None,
    dtype: str | None = None,
    device: str | None = None,
    device_map: str | Path | Mapping[str, str | int] | None = None,
    memory_limit: int | str | None = None,
    revision: str | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> Plan:
    """Choose the experts to keep.

    Args:
        profile: from `profile`, or its folder.
        keep: experts kept per layer; give this or ``retain``.
        retain: fraction of the experts kept per layer, in (0, 1].
        multiple_of: round the count to the nearest multiple of this that the router allows.
        width: channels kept of each expert; give this or ``retain_width``, or neither for all. Without ``keep`` and
            ``retain`` all experts stay.
        retain_width: fraction of the channels kept, in (0, 1].
        width_multiple_of: round the channels to the nearest multiple of this.
        method: name in `METHODS`; None for tb-coverage (arXiv 2607.01710).
        model: for methods that run the experts: the model of the profile, as folder, hub id, structure or live model.
        structure: of a live model.
        dtype: torch dtype by name; None for the profile's.
        device: torch device by name; None for a GPU where there is one.
        device_map: devices of the parts of a model, see `RunOptions`.
        memory_limit: memory that may be used, see `RunOptions`.
        revision: branch, tag or commit of a hub model.
        progress: True draws bars and a log on stderr or in a notebook; False is silent.
        **options: the method's options (``saliency``, ``protect``, ``weights``, ``seed``, ...) and
            ``protect_super_experts``, ``protect_channels`` and ``channel_groups`` (see `plan_budgets`).

    Raises:
        InputError: an unknown method or saliency, an option that the method does not have, or a budget out of range.
    """
    name = default_method().name if method is None else method
    check_options(name, {key: value for key, value in options.items() if key not in ROUND_OPTIONS})
    made = profile if isinstance(profile, Profile) else Profile.load(Path(profile))
    check_search(name, made, model)
    _check_unused(
        name,
        model,
        structure=structure,
        dtype=dtype,
        device=device,
        device_map=device_map,
        memory_limit=memory_limit,
        revision=revision,
    )
    shape = resolve_shape(
        made.topology,
        made.width,
        keep=keep,
        retain=retain,
        multiple_of=multiple_of,
        width=width,
        retain_width=retain_width,
        width_multiple_of=width_multiple_of,
        channel_groups=options.get("channel_groups", 1),
    )
    (found,) = plans(
        made,
        [shape.keep],
        [shape.width],
        method=name,
        options=options,
        model=model,
        structure=structure,
        dtype=dtype,
        device=device,
        device_map=device_map,
        memory_limit=memory_limit,
        revision=revision,
        progress=resolve(progress),
    )
    for line in calibration_notes(found, made):
        resolve(progress).say(line)
    return found


def _check_unused(method: str, model: object, **of_model: object) -> None:
    """Refuse arguments on a model where there is none, since a plan is made from the profile alone.

    Raises:
        InputError: names the argument.
    """
    if model is None and (stray := [key for key, value in of_model.items() if value is not None]):
        raise InputError(f"{arg(stray[0])} has no use here: method {method} plans from the profile alone")
