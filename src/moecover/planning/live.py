"""The model of a profile for methods that run the experts: opened as it fits where it is not live yet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moecover import rehearsal
from moecover.errors import InputError, arg
from moecover.profiling.records import torch_dtype

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.opening import Model
    from moecover.checkpoints.structure import Structure
    from moecover.profiling.artifact import Profile
    from moecover.progress import Progress
    from moecover.runtime.options import RunOptions
    from moecover.runtime.running import Running
    from moecover.runtime.world import World


def profiled_checkpoint(
    profile: Profile,
    model: Model | torch.nn.Module | Running,
    structure: Structure | None,
    revision: str | None,
    progress: Progress,
) -> Structure:
    """The checkpoint of a profile, its files on this machine, for methods that read its weights.

    Raises:
        InputError: it cannot be read, or is another model than the profile's.
    """
    from moecover.checkpoints.magnitudes import check_magnitudes
    from moecover.checkpoints.opening import described, fetched
    from moecover.checkpoints.structure import Structure
    from moecover.planning.fitting import check_model

    if not isinstance(model, (str, Path, Structure)):
        if structure is None:
            raise InputError(f"a live {arg('model')} comes with its {arg('structure')}")
        found = structure
    else:
        headers = described(model, revision=revision, progress=progress)
        check_magnitudes(headers)
        found = fetched(headers, revision=revision, progress=progress)
    check_model(profile, found)
    return found


@contextlib.contextmanager
def live_model(
    profile: Profile,
    model: Model | torch.nn.Module | Running,
    structure: Structure | None,
    how: RunOptions,
    *,
    progressive: bool,
    here: World,
    progress: Progress,
) -> Iterator[tuple[Structure, Running]]:
    """The model, opened as it fits where it is not live yet.

    Imports here: planning from a profile alone starts quickly.
    """
    from moecover.checkpoints.opening import described, fetched
    from moecover.checkpoints.structure import Structure
    from moecover.planning.search.products import peak_bytes
    from moecover.planning.search.routing import check_searchable
    from moecover.runtime.distributed import check_same, joined
    from moecover.runtime.loadable import check_loadable
    from moecover.runtime.memory import opened
    from moecover.runtime.options import check_live
    from moecover.runtime.passes import passes
    from moecover.runtime.running import running
    from moecover.runtime.world import check_alone, own_device

    if not isinstance(model, (str, Path, Structure)):
        if structure is None:
            raise InputError(f"a live {arg('model')} comes with its {arg('structure')}")
        check_live(model, how)
        yield structure, running(model, structure)
        return
    if structure is not None:
        raise InputError(f"{arg('structure')} goes with a live {arg('model')}")
    if progressive:
        check_alone(here, arg("mode"))
    run = passes({**how, "dtype": how.get("dtype") or torch_dtype(profile.settings)})
    headers = described(model, revision=how.get("revision"), progress=progress)
    check_searchable(headers)
    check_loadable(headers, run.dtype)
    found = fetched(headers, revision=how.get("revision"), progress=progress)
    sample = profile.inputs
    tokens, batch = (sample.num_tokens, max(map(max, sample.batch_tokens.values()))) if sample is not None else (0, 1)
    rehearsal.ahead("run", "search", tokens=tokens)
    device = own_device(here, run.device)
    with (
        joined(here, device),
        opened(
            found,
            tokens=2 * tokens if progressive else 0,
            batch_tokens=batch,
            dtype=run.dtype,
            device=device,
            device_map=run.device_map,
            memory_limit=run.memory_limit,
            here=here,
            extra=peak_bytes(found.topology, tokens),
            say=progress.say,
        ) as live,
    ):
        check_same(here, {"model": found.model_fingerprint, "profile": profile.fingerprint})
        yield found, live
