"""A plan by a bound instead of a number, as a job: reads a profile, the model and held-out text as users give them.

`budget_search` walks the numbers of experts; here are the checks, the text and the opened model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from moecover.checkpoints.opening import Model, described, fetched
from moecover.checkpoints.pieces import NOTHING
from moecover.checkpoints.structure import Structure
from moecover.corpora.bos import check_bos
from moecover.corpora.loading import Corpora, parsed
from moecover.corpora.overlap import WORTH_SAYING, overlap
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.evaluation.budget_search import TOGETHER, find, largest_within, parse_percent, possible_keeps
from moecover.evaluation.given import Texts, load_texts, parsed_texts
from moecover.evaluation.held_out import BLOCKS, check_held_out, held_out
from moecover.planning.artifact import Plan
from moecover.planning.job import ROUND_OPTIONS
from moecover.planning.lines import calibration_notes
from moecover.planning.methods import METHODS, default_method
from moecover.planning.run import check_options, plan_budgets
from moecover.profiling.artifact import Profile
from moecover.profiling.records import torch_dtype
from moecover.progress import SILENT, Progress, resolve
from moecover.runtime.loadable import check_loadable
from moecover.runtime.memory import opened, parse_size
from moecover.runtime.options import RunOptions, check_known
from moecover.runtime.passes import Passes, check_least, passes
from moecover.runtime.running import Running


def keep_within_size(
    profile: Profile,
    model: Model,
    max_size: int | str,
    *,
    multiple_of: int | None = None,
    revision: str | None = None,
    progress: bool | Progress = True,
) -> int:
    """The most experts per layer whose checkpoint takes at most ``max_size``; from headers alone.

    Args:
        profile: that is planned from; a quantised sibling of its model has the same topology.
        model: folder, hub id or structure of the checkpoint to be pruned.
        max_size: in bytes, or as text (``"12GB"``).
        multiple_of: only multiples of this number.
        revision: branch, tag or commit of a hub model.
        progress: True logs on stderr; False is silent.

    Raises:
        InputError: another model's profile, not even the fewest experts fit, or the whole model does.
    """
    shown, size = resolve(progress), parse_size(max_size) if isinstance(max_size, str) else max_size
    structure = described(model, revision=revision, progress=shown)
    if structure.topology.fingerprint != profile.topology.fingerprint:
        raise InputError(
            f"the profile is of another model ({profile.model['name']}), not of {structure.checkpoint.name}: "
            "their topologies differ"
        )
    keep = largest_within(structure, size, multiple_of=multiple_of)
    experts, kept = structure.topology.num_experts, structure.num_bytes(keep)
    shown.say(f"{arg_text(max_size)}: {keep} of {experts} experts, {kept:,} bytes")
    return keep


def arg_text(max_size: int | str) -> str:
    """How a line of log calls the bound on the size."""
    return f"at most {max_size:,} bytes" if isinstance(max_size, int) else f"at most {max_size}"


def plan_within(
    profile: Profile | str | Path,
    model: Model,
    max_perplexity_increase: float | str,
    *,
    texts: Texts = (),
    corpora: Corpora = (),
    windows: int | None = None,
    bos: str | None = None,
    multiple_of: int | None = None,
    method: str | None = None,
    method_options: Mapping[str, Any] = NOTHING,
    progress: bool | Progress = True,
    **options: Unpack[RunOptions],
) -> Plan:
    """The plan with the fewest experts that keeps the perplexity of every held-out text within a bound.

    Args:
        profile: from `profile`, or its folder.
        model: the model of the profile: folder, hub id or structure.
        max_perplexity_increase: over the model's own, as a share (0.1) or a percentage (``"10%"``).
        texts: held-out text, see `evaluate`; by default blocks of the calibration corpora that the profile did not use.
        corpora: files of calibration corpora, to find those blocks; named corpora need none.
        windows: windows or blocks per text at most; None for 64.
        bos: what a window of ``texts`` begins with, see `evaluate`; blocks begin as those that the profile used.
        multiple_of: only multiples of this number of experts.
        method: name in `METHODS`; None for the default.
        method_options: of the method, and ``protect_super_experts``.
        progress: True draws bars and a log on stderr or in a notebook; False is silent.
        **options: see `RunOptions`; batch size 1 and the profile's dtype by default.

    Returns:
        The plan; its ``found`` holds the bound, the texts and every point that was measured.

    Raises:
        InputError: another model than the profile's, no held-out text, or arguments out of range.
        MoecoverError: no number of experts holds the bound.
    """
    shown, name = resolve(progress), default_method().name if method is None else method
    check_options(name, {key: value for key, value in method_options.items() if key not in ROUND_OPTIONS})
    made = profile if isinstance(profile, Profile) else Profile.load(Path(profile))
    most = max_perplexity_increase
    most = parse_percent(most, arg("max_perplexity_increase")) if isinstance(most, str) else most
    check_known(options, RunOptions)
    check_least(1, windows=windows)
    named, files = sources_of(made, texts, corpora)
    check_bos(bos or "auto")
    if bos is not None and not named:
        raise InputError(f"{arg('bos', bos)} goes with {arg('texts')}: the blocks begin as those that the profile used")
    options["dtype"] = options.get("dtype") or torch_dtype(made.settings)
    how = passes(options, batch_size=1)
    keeps = possible_keeps(
        made, multiple_of=multiple_of, protect_super_experts=bool(method_options.get("protect_super_experts"))
    )
    structure = profiled_model(made, model, how, options.get("revision"), shown)
    loaded = held_out_texts(made, named, files, structure, windows or BLOCKS, bos, shown)
    found = _found(made, structure, loaded, name, method_options, keeps=keeps, most=most, how=how, progress=shown)
    for line in calibration_notes(found, made):
        shown.say(line)
    return found


def sources_of(
    profile: Profile, texts: Texts, corpora: Corpora
) -> tuple[dict[str, str | Corpus | None], Mapping[str, str | None]]:
    """The held-out texts that were given, or where the calibration corpora have unused blocks."""
    if texts and corpora:
        raise InputError(
            f"{arg('texts')} and {arg('corpora')} exclude each other: the one is held-out text, the other finds some "
            "in the calibration text"
        )
    named = parsed_texts(texts)
    given = parsed(corpora) if corpora else {}
    if loaded := [name for name, source in given.items() if isinstance(source, Corpus)]:
        raise InputError(f"{arg('corpora', loaded[0])} is loaded already: give the file that the profile read")
    files = {name: source for name, source in given.items() if not isinstance(source, Corpus)}
    return named, {} if named else check_held_out(profile.corpora, files)


def profiled_model(profile: Profile, model: Model, how: Passes, revision: str | None, progress: Progress) -> Structure:
    """The checkpoint of the model that was profiled.

    Raises:
        InputError: it cannot be loaded, or it is another model's.
    """
    headers = described(model, revision=revision, progress=progress)
    check_loadable(headers, how.dtype)
    structure = fetched(headers, revision=revision, progress=progress)
    if structure.model_fingerprint != profile.model["fingerprint"]:
        raise InputError(
            f"the profile is of another model ({profile.model['name']}), not of {structure.checkpoint.name}: "
            f"topology or routers differ. Give the {arg('model')} that was profiled"
        )
    return structure


def held_out_texts(
    profile: Profile,
    named: Mapping[str, str | Corpus | None],
    files: Mapping[str, str | None],
    structure: Structure,
    windows: int,
    bos: str | None,
    progress: Progress,
) -> list[Corpus]:
    """The held-out texts, with a note where calibration text is in them."""
    with progress.spinner("reading held-out text"):
        loaded = load_texts(named, structure, windows=windows, bos=bos, progress=SILENT)
        loaded = loaded or held_out(profile, files, structure, blocks=windows)
    for text in loaded:
        share = overlap(text.tokens, text.mask, [record for records in profile.corpora.values() for record in records])
        if share >= WORTH_SAYING:
            progress.say(
                f"note: {share:.0%} of the text {text.name} is also in the calibration text: its perplexity "
                "says little "
                "about other text"
            )
        progress.say(f"held out: {text.num_tokens:,} tokens of {text.name}")
    return loaded


def _found(
    profile: Profile,
    structure: Structure,
    texts: list[Corpus],
    method: str,
    options: Mapping[str, Any],
    *,
    keeps: list[int],
    most: float,
    how: Passes,
    progress: Progress,
) -> Plan:
    """Open the model as it fits, and search."""
    with opened_for(structure, texts, how, progress) as model:
        more = METHODS[method].given(model=model, structure=structure)
        return find(
            profile,
            structure,
            lambda asked: plan_budgets(profile, method=method, keeps=asked, **more, **options),
            keeps=keeps,
            most=most,
            model=model,
            texts=texts,
            batch_size=how.batch_size,
            bar=progress.bar,
            say=progress.say,
        )


def opened_for(
    structure: Structure, texts: list[Corpus], how: Passes, progress: Progress
) -> contextlib.AbstractContextManager[Running]:
    """The model, with room for passes that measure several plans on some texts."""
    return opened(
        structure,
        tokens=0,
        in_parts=(
            sum(text.num_tokens for text in texts) * (1 + TOGETHER),
            sum(-(-len(text.tokens) // how.batch_size) for text in texts) * (1 + TOGETHER),
        ),
        head=True,
        batch_tokens=how.batch_size * max(text.tokens.shape[1] for text in texts),
        unit=how.batch_size * max(text.tokens.shape[1] for text in texts) * (1 + TOGETHER),
        dtype=how.dtype,
        device=how.device,
        device_map=how.device_map,
        memory_limit=how.memory_limit,
        say=progress.say,
    )
