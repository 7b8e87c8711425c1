"""An evaluation of GGUF files as a job: opens them in llama.cpp, reads held-out text in the model's own tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moecover import rehearsal
from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.evaluation.artifact import FULL, Evaluation
from moecover.evaluation.gguf import Variant, evaluate_gguf
from moecover.evaluation.notes import note_overlaps
from moecover.gguf.parts import is_gguf, stem_of
from moecover.llama.model import Model, opened
from moecover.llama.opening import opened_gguf
from moecover.planning.artifact import Plan
from moecover.progress import Progress
from moecover.pruning.gguf_writer import KEPT, plan_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Files = Sequence[str | PathLike[str]]


class Read(Protocol):
    """Reads the held-out texts."""

    def __call__(self, structure: Structure, *, tokenizer: PreTrainedTokenizerBase | None) -> list[Corpus]:
        """In windows of the model's token ids."""
        ...


def check_files(files: Files, model: Structure, plans: Mapping[str, Plan]) -> dict[str, Structure]:
    """Further files by the name of their row: that of the file.

    Raises:
        InputError: the model or a file is none of GGUF, a file cannot be read, or a name is there twice.
    """
    found = dict[str, Structure]()
    for file in files:
        if model.checkpoint.gguf is None or not is_gguf(fspath(file)):
            raise InputError(f"{arg('files', file)}: rows from files are for GGUF: give MODEL.gguf and FILE.gguf")
        name = stem_of(Path(file))
        if name in found or name in plans or name == FULL:
            raise InputError(f"{arg('files', file)}: there is a row {name} already. Rename the file")
        found[name] = read_structure(Path(file))
    return found


def evaluated_gguf(
    structure: Structure,
    plans: Mapping[str, Plan],
    files: Mapping[str, Structure],
    read: Read,
    *,
    libllama: str | Path | None,
    device: str | None,
    progress: Progress,
) -> Evaluation:
    """The evaluation of a GGUF model, of plans of it, and of further files.

    Args:
        structure: the model.
        plans: by row, to be emulated.
        files: by row.
        read: gives the held-out text in the tokens of a tokenizer.
        libllama: the library; None for the optional dependency's.
        device: None, auto or cpu.
        progress: shows the work.

    Raises:
        InputError: there is no library, it does not load a file, or what `evaluate_gguf` raises.
    """
    import torch

    with contextlib.ExitStack() as stack:
        opening = opened_gguf(structure, libllama=libllama, device=device, progress=progress)
        model, tokenizer = stack.enter_context(opening)
        texts = read(structure, tokenizer=tokenizer)
        note_overlaps(texts, plans, structure, progress)
        rehearsal.ahead("run", f"{1 + len(plans) + len(files)} rows in llama.cpp")
        rehearsal.stop()
        variants = variants_of(structure, model, plans, files, stack, on_cpu=device == "cpu")
        return evaluate_gguf(variants, texts, plans=plans, threads=torch.get_num_threads(), bar=progress.bar)


def variants_of(
    structure: Structure,
    model: Model,
    plans: Mapping[str, Plan],
    files: Mapping[str, Structure],
    stack: contextlib.ExitStack,
    *,
    on_cpu: bool,
) -> list[Variant]:
    """The rows of `evaluate_gguf`: the model itself, plans of it, further files.

    Args:
        structure: the model.
        model: it, opened.
        plans: by row, to be emulated.
        files: by row.
        stack: closes the files.
        on_cpu: leave a GPU alone.

    Raises:
        InputError: llama.cpp does not load a file.
    """
    variants = [Variant(FULL, structure, model, plan=_plan_of(structure))]
    variants += [Variant(name, structure, model, mask=plan, plan=plan) for name, plan in plans.items()]
    for name, file in files.items():
        assert file.checkpoint.gguf is not None
        other = stack.enter_context(opened(file.checkpoint.gguf.first.path, model.library, on_cpu=on_cpu))
        variants.append(Variant(name, file, other, plan=_plan_of(file)))
    return variants


def _plan_of(structure: Structure) -> Plan | None:
    """The plan that a file was pruned by; None where `prune` did not write it."""
    files = structure.checkpoint.gguf
    return plan_in(files) if files is not None and KEPT in files.first.fields else None
