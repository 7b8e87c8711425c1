"""Checks of GGUF models before the first cell: reads headers, refuses what only transformers runs, with the line."""

from __future__ import annotations

from moecover.checkpoints.source import open_checkpoint
from moecover.checkpoints.structure import Structure, read_structure
from moecover.comparison.config import UNREPAIRED
from moecover.comparison.reading import Request
from moecover.errors import InputError
from moecover.llama.library import load
from moecover.llama.opening import DEVICES
from moecover.planning.methods import METHODS
from moecover.repairing.solver import KINDS


def check_library(request: Request) -> None:
    """Refuse a library that cannot be loaded, or one that nothing would run in.

    Raises:
        InputError: with the line of the library, or of the first GGUF model where there is none.
    """
    config = request.config
    number = next((number for number, entry in enumerate(config.models) if entry.gguf), None)
    if number is None:
        if config.libllama is not None:
            raise request.error("no model is a GGUF file: llama.cpp would run nothing. Leave it out", "libllama")
        return
    try:
        load(config.libllama)
    except InputError as error:
        at: tuple[str | int, ...] = ("models", number) if config.libllama is None else ("libllama",)
        raise request.error(error, *at) from error


def check_coordinates(request: Request, name: str) -> None:
    """Refuse fields of the grid that need transformers to run a model.

    Args:
        request: the comparison.
        name: of the GGUF model.

    Raises:
        InputError: with the line.
    """
    config, why = request.config, f"{name} is a GGUF file, which llama.cpp runs as it is stored"
    for number, entry in enumerate(config.methods):
        if not METHODS[entry.method].from_profile:
            others = [known for known, one in METHODS.items() if one.from_profile]
            does = "runs the experts in transformers" if METHODS[entry.method].runs_experts else "reads float weights"
            text = f"{why}: method {entry.method} {does}. Allowed: {', '.join(others)}"
            raise request.error(text, "methods", number)
        if changes := [one for one in (*(entry.merge or ()), *(entry.repair or ())) if one != UNREPAIRED]:
            raise request.error(f"{why}: {_unrepaired(changes[0])}", "methods", number)
    for field, given in (("merges", config.merges), ("repairs", config.repairs)):
        if changes := [one for one in given if one != UNREPAIRED]:
            raise request.error(f"{why}: {_unrepaired(changes[0])}", field)
    if config.skip:
        raise request.error(f"{why}: experts are skipped in transformers. Compare the original checkpoint", "skip")
    if config.tasks:
        text = f"{why}: tasks run in transformers. Give `perplexity` alone, or compare the original checkpoint"
        raise request.error(text, "tasks")
    if config.dtype != "auto":
        raise request.error(f"{why}: `dtype` {config.dtype} has no use here. Leave it out", "dtype")
    if config.memory_limit is not None:
        raise request.error(
            f"{why}, mapped from the disk: `memory_limit` has no use here. Leave it out", "memory_limit"
        )
    if config.device_map is not None:
        raise request.error(f"{why}: `device_map` has no use here. Leave it out", "device_map")
    if config.device not in DEVICES:
        text = f"{why}: `device` {config.device} is none of auto (a GPU where llama.cpp has one) and cpu"
        raise request.error(text, "device")


def _unrepaired(kind: str) -> str:
    what = f"repair {kind} refits" if kind in KINDS else f"merge {kind} averages"
    return f"{what} experts in transformers. Repair the original checkpoint, then convert it"


def read_files(request: Request, number: int, structure: Structure) -> dict[str, Structure]:
    """The further files of a model by name.

    Args:
        request: the comparison.
        number: of the model in it.
        structure: of the model.

    Raises:
        InputError: a file that cannot be read, or has another vocabulary; with the line.
    """
    found = dict[str, Structure]()
    for place, entry in enumerate(request.config.models[number].files):
        try:
            found[entry.name] = file = read_structure(open_checkpoint(entry.file))
            tokens, of_model = (one.checkpoint.config.get("vocab_size") for one in (file, structure))
            if tokens != of_model:
                raise InputError(
                    f"{entry.file} has {tokens} tokens, the model has {of_model}: their perplexities do not compare"
                )
        except InputError as error:
            raise request.error(error, "models", number, "files", place) from error
    return found
