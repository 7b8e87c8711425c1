"""Checks before the first cell: reads a configuration and the headers of its models, refuses what cannot run.

Nothing is downloaded here but headers. An error names the line of the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence

from moecover.checkpoints.remote_code import trust_remote_code
from moecover.checkpoints.shipped import where_is
from moecover.checkpoints.source import open_checkpoint
from moecover.checkpoints.structure import Structure, read_structure
from moecover.comparison.cells import Cell, cells
from moecover.comparison.gguf_checks import check_coordinates, check_library, read_files
from moecover.comparison.models import ComparedModel
from moecover.comparison.reading import Request
from moecover.corpora.arguments import parse_corpora, source_of
from moecover.corpora.windows import check_text
from moecover.errors import InputError
from moecover.merging.methods import NONE, merge_of
from moecover.planning.fitting import check_top_k
from moecover.planning.lines import unused_weights
from moecover.planning.methods import METHODS
from moecover.progress import Progress
from moecover.registry import load_plugin
from moecover.repairing.merged import check_merged
from moecover.repairing.targets import Place, check_dtype, check_understood, places_on_disk
from moecover.runtime.devices import check_device
from moecover.runtime.loadable import check_loadable
from moecover.runtime.memory import parse_size
from moecover.runtime.passes import checked_map
from moecover.signals import held


def checked(request: Request, progress: Progress) -> list[ComparedModel]:
    """The models of a configuration with their cells.

    Raises:
        InputError: anything that cannot run, before anything is downloaded; with the line.
    """
    config = request.config
    _load_plugins(request)
    _check_merges(request)
    _check_sources(request)
    _check_machine(request)
    with held():
        check_library(request)
        structures = [_headers(request, number, progress) for number in range(len(config.models))]
    found = []
    for number, (entry, structure) in enumerate(zip(config.models, structures, strict=True)):
        if config.skip and structure.topology.top_k == 1:
            raise request.error(
                f"{entry.name}: a token goes to one expert only, and none of that can be skipped", "skip"
            )
        for place, top_k in enumerate(config.top_ks):
            try:
                check_top_k(structure, top_k)
            except InputError as error:
                raise request.error(error, "top_ks", place) from error
        files = read_files(request, number, structure)
        planned = cells(request, entry, structure.topology, structure.width, files)
        model = ComparedModel(entry, structure, planned, files)
        if repaired := [cell for cell in model.cells if cell.repaired]:
            model.places = _repaired_places(request, entry.name, structure, repaired)
        found.append(model)
    _note_weights(request, progress)
    return found


def _load_plugins(request: Request) -> None:
    for number, path in enumerate(request.config.plugins):
        try:
            load_plugin(path)
        except InputError as error:
            raise request.error(error, "plugins", number) from error


def _check_merges(request: Request) -> None:
    """Refuse unknown merges."""
    try:
        for name in request.config.merges:
            merge_of(name)
    except InputError as error:
        raise request.error(error, "merges") from error


def _check_sources(request: Request) -> None:
    """Refuse corpora and texts with unknown names and files that do not exist."""
    config = request.config
    try:
        for number, arguments in enumerate(config.calibration):
            at: tuple[str | int, ...] = ("calibration", number)
            parse_corpora(arguments)
        at = ("perplexity",)
        for name, path in parse_corpora(config.perplexity).items() if config.perplexity else ():
            if not path:
                check_text(name)
    except InputError as error:
        raise request.error(str(error).replace("--corpus ", "").replace("--perplexity ", ""), *at) from error


def _note_weights(request: Request, progress: Progress) -> None:
    """Say, once for all sets of corpora, which methods have no use for their weights."""
    config = request.config
    weights: dict[str, int] = {}
    for name, text in (pair for arguments in config.calibration for pair in parse_corpora(arguments).items()):
        weights[name] = source_of(name, text).options.get("weight", weights.get(name, 1))
    methods = dict.fromkeys(entry.method for entry in config.methods if not METHODS[entry.method].blind)
    if line := unused_weights(weights, list(methods)):
        progress.say(line)


def _check_machine(request: Request) -> None:
    """Refuse a memory limit, dtype or device that cannot be used."""
    config = request.config
    if config.memory_limit is not None:
        try:
            parse_size(config.memory_limit)
        except InputError as error:
            raise request.error(error, "memory_limit") from error
    try:
        check_device(config.dtype, config.device)
    except InputError as error:
        raise request.error(error, "device" if "device" in str(error) else "dtype") from error
    try:
        checked_map(config.device_map, config.device)
    except InputError as error:
        raise request.error(error, "device_map") from error


def _headers(request: Request, number: int, progress: Progress) -> Structure:
    """The structure of a model; of a hub model from its headers alone."""
    entry = request.config.models[number]
    try:
        name = entry.model
        source = where_is(name)
        with progress.spinner(f"reading {entry.name}"):
            if entry.trust_remote_code:
                trust_remote_code(source, revision=entry.revision)
            structure = read_structure(open_checkpoint(source, revision=entry.revision, headers_only=True))
        if structure.checkpoint.gguf is None:
            check_loadable(structure, request.config.dtype)
    except InputError as error:
        raise request.error(error, "models", number) from error
    if structure.checkpoint.gguf is not None:
        check_coordinates(request, entry.name)
    for warning in structure.warnings:
        progress.say(f"note: {entry.name}: {warning}")
    return structure


def _repaired_places(request: Request, name: str, structure: Structure, repaired: Sequence[Cell]) -> list[Place]:
    """What merges and repairs change in a model.

    Raises:
        InputError: the model can be neither merged nor repaired, with the line.
    """
    config = request.config
    try:
        found = places_on_disk(structure)
        check_dtype(structure, found, config.dtype)
        for cell in repaired:
            check_understood(structure, found, cell.repair)
            check_merged(structure, found, merge_of(cell.merge))
    except InputError as error:
        fields = [name for name in ("merges", "repairs") if getattr(config, name) != [NONE]]
        field = fields[0] if fields else "methods"
        raise request.error(f"{name}: {_with_fields(str(error))}", field) from error
    return found


def _with_fields(text: str) -> str:
    """A message on arguments, in the words of the configuration."""
    return text.replace("merge=", "merge: ").replace("repair=", "repair: ").replace("dtype=", "dtype: ")
