"""The verbs `profile` and `merge`: read a model and corpora, or profiles; write a profile, say what comes next."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moecover import progress
from moecover.cli.arguments import check_pass, check_profile_folder, fetched, load_corpora, loadable, memory_limit
from moecover.errors import InputError
from moecover.text import size_text


@contextlib.contextmanager
def profiled(
    args: argparse.Namespace, structure: Any, folder: Path | None, *, extra: int = 0
) -> Iterator[tuple[Any, Any, Any]]:
    """The profile, saved into ``folder`` if there is one; the model, still open; the corpora.

    The memory that is looked for has room for ``extra`` bytes beside.
    """
    from moecover.files.atomic import PARTIAL
    from moecover.profiling.layer_inputs import num_bytes, sample_of
    from moecover.profiling.run import profile
    from moecover.runtime.distributed import own_device, wait_for_all, world
    from moecover.runtime.memory import opened
    from moecover.runtime.pass_state import kept_for_later, of_process, remove, remove_all

    here = world()
    corpora = load_corpora(args, structure)
    keep_inputs = None
    if args.keep_inputs is not None and folder is not None:
        sample = sample_of(corpora, args.keep_inputs)
        keep_inputs = (args.keep_inputs, folder)
    tokens, batch_size = sum(c.num_tokens for c in corpora), args.batch_size or 4
    batch_tokens = batch_size * max(c.tokens.shape[1] for c in corpora)
    states = args.output.with_name(f".{args.output.name}.profile{PARTIAL}")
    state = of_process(states, here.rank) if here.size > 1 else states
    device = own_device(here, args.device or "auto")
    with kept_for_later(state), opened(
        structure, tokens=-(-tokens // here.size), batch_tokens=batch_tokens, dtype=args.dtype or "auto", device=device,
        memory_limit=memory_limit(args), extra=extra, processes=here.local_size, scratch=state, say=progress.say,
    ) as model:  # fmt: skip
        if keep_inputs:
            topology, width = structure.topology, model.dtype.itemsize
            size = num_bytes(sample, len(topology.decoder_layers), topology.hidden_size, width)
            progress.say(f"keeping the inputs of {len(topology.decoder_layers)} layers for {sum(c.num_tokens for c in sample):,} tokens: {size_text(size)} in {folder}")  # fmt: skip
        with progress.bar("profiling", -(-tokens // here.size)) as advance:
            made = profile(
                structure, corpora, model=model, batch_size=batch_size, keep_inputs=keep_inputs, state=state,
                here=here, advance=advance, say=progress.say,
            )  # fmt: skip
        if folder is not None and here.rank == 0:
            made.save(folder)
        wait_for_all(here)
        yield made, model, corpora
        remove(state)
        if here.local_rank == 0:
            remove_all(states)


def profile_verb(args: argparse.Namespace) -> tuple[Any, str, int]:
    """Run the verb: result, text to print, exit status."""
    from moecover.files.atomic import locked
    from moecover.profiling.artifact import FILE
    from moecover.profiling.run import check_alone
    from moecover.runtime.distributed import joined, own_device, world

    here = world()
    check_pass(args)
    check_profile_folder(args.output, overwrite=args.overwrite)
    if args.keep_inputs is not None:
        check_alone(here)
    held = locked(args.output.resolve()) if here.rank == 0 else contextlib.nullcontext()
    group = joined(here, own_device(here, args.device or "auto"))
    with held, group, profiled(args, fetched(args, loadable(args)), args.output) as (profile, _, _):
        pass
    path = args.output / FILE
    shape = [len(profile.topology.decoder_layers), profile.topology.num_experts]
    tokens = {name: records[0]["tokens"] for name, records in profile.corpora.items()}
    lines = [f"{path}: statistics of {shape[0]} layers x {shape[1]} experts"]
    lines += [f"  {name}: {count:,} tokens" for name, count in tokens.items()]
    lines.append(f"next: moecover plan {shlex.quote(str(args.output))} --retain 0.5 -o plan.json")
    result = {"profile": str(path), "shape": shape, "tokens": tokens, "fingerprint": profile.fingerprint}
    return result, "\n".join(lines), 0


def merge_verb(args: argparse.Namespace) -> tuple[Any, str, int]:
    """Run the verb: result, text to print, exit status."""
    from moecover.profiling.artifact import FILE, Profile
    from moecover.profiling.merging import merged

    check_profile_folder(args.output, overwrite=args.overwrite)
    if len(args.profiles) < 2:
        raise InputError("give two profiles or more")
    made = merged([Profile.load(folder) for folder in args.profiles], [str(folder) for folder in args.profiles])
    made.save(args.output)
    tokens = {name: sum(record["tokens"] for record in records) for name, records in made.corpora.items()}
    lines = [f"{args.output / FILE}: {len(args.profiles)} profiles added up"]
    lines += [f"  {name}: {count:,} tokens of {len(made.corpora[name])} samples" for name, count in tokens.items()]
    return {"profile": str(args.output / FILE), "tokens": tokens, "fingerprint": made.fingerprint}, "\n".join(lines), 0
