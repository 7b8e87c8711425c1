"""Takes over a profile that an interrupted one-shot run has finished, instead of running the pass again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moecover.checkpoints.structure import Structure
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.profiling.artifact import FILE, Profile
from moecover.profiling.layer_inputs import sample_of
from moecover.profiling.records import model_record
from moecover.runtime.running import Running


def check_reusable(folder: Path, corpora: Sequence[str]) -> None:
    """Refuse a folder whose profile cannot be that of an interrupted run, by what is known before any work.

    Args:
        folder: where the profile is to be saved.
        corpora: names of the calibration corpora.

    Raises:
        InputError: it holds a profile of other corpora, or something else than a profile.
    """
    if (folder / FILE).exists() and list(Profile.load(folder).corpora) != list(corpora):
        raise InputError(f"{folder / FILE} exists. Choose another folder, or give {arg('overwrite')}")


def finished(
    structure: Structure,
    folder: Path,
    corpora: Sequence[Corpus],
    model: Running,
    batch_size: int,
    keep_inputs: int | None,
    mtp: bool | None = False,
) -> Profile | None:
    """The profile in a folder, None if there is none.

    Args:
        structure: the checkpoint.
        folder: where the profile of this run is to be saved.
        corpora: the calibration text.
        model: what the pass would run.
        batch_size: sequences per batch.
        keep_inputs: calibration tokens whose layer inputs are to be saved; None for none.
        mtp: whether multi-token-prediction layers are to be profiled; None for where they can run.

    Raises:
        InputError: what is there was made from something else; it says from what.
    """
    if not (folder / FILE).is_file():
        return None
    found = Profile.load(folder)
    sample = None if keep_inputs is None else sum(c.num_tokens for c in sample_of(corpora, keep_inputs))
    settings = found.settings
    same = {
        "model": found.model == model_record(structure),
        "calibration text": list(found.corpora.items()) == [(c.name, [c.record]) for c in corpora],
        "batch size": settings.get("batch_size") == batch_size,
        "dtype": settings.get("dtype") == str(model.dtype).removeprefix("torch."),
        "device": settings.get("device") == model.device.type,
        "choice of layers": mtp is None or (found.mtp is not None) == mtp,
        "inputs": (found.inputs.num_tokens if found.inputs else None) == sample,
    }
    if differs := [name for name, equal in same.items() if not equal]:
        raise InputError(
            f"{folder / FILE} exists and was made otherwise: another {differs[0]}. Choose another folder, or give "
            f"{arg('overwrite')}"
        )
    return found
