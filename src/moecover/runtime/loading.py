"""The live model: reads a checkpoint, gives the model in memory and its routers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.deepseek.registration import register_deepseek
from moecover.checkpoints.model_class import BUILDING, auto_class
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, is_out_of_memory
from moecover.runtime.devices import check_device
from moecover.runtime.loadable import check_loadable, not_loaded

if TYPE_CHECKING:
    import torch


def load_model(
    structure: Structure, *, dtype: str = "auto", device: str = "auto", device_map: Mapping[str, str] | None = None
) -> torch.nn.Module:
    """Load the model of a checkpoint in evaluation mode; its weights go to their device one by one.

    Its experts run in the grouped kernel of transformers, which is the default there; a few families have none.

    Args:
        structure: the checkpoint.
        dtype: a torch dtype by name; ``auto`` takes the checkpoint's.
        device: a torch device by name; ``auto`` takes the first GPU, else the CPU.
        device_map: devices by name of a module, instead of one for all; see `placement.placed`.

    Raises:
        InputError: unknown dtype or device, or tensors that are missing in the files.
    """
    device = check_device(dtype, device) if device_map is None else ""
    check_loadable(structure, dtype)
    from transformers import AutoConfig

    register_deepseek()

    source = {"trust_remote_code": False, "local_files_only": True}
    places = dict(device_map or ({"": device} if device != "cpu" else {})) or None
    try:
        config = AutoConfig.from_pretrained(structure.checkpoint.path, **source)
        auto = auto_class(type(config))
        with BUILDING, no_bars():
            model, info = auto.from_pretrained(
                structure.checkpoint.path,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                device_map=places,
                **source,
            )
    except Exception as error:  # the libraries that read the folder's files may raise anything
        if is_out_of_memory(error):
            raise
        raise not_loaded(structure, error) from error
    if missing := sorted(info["missing_keys"]):
        raise missing_tensors(structure.checkpoint.name, missing)
    return model.eval()  # type: ignore[no-any-return]


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers' own progress bars away: progress is shown by the job, or not at all."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def missing_tensors(name: str, missing: Sequence[str]) -> InputError:
    """The error for a checkpoint whose files lack tensors."""
    return InputError(
        f"{name}: {len(missing)} tensors are missing from the files, the first is {missing[0]}."
        " Download the checkpoint again"
    )


def backbone_of(model: torch.nn.Module) -> Any:
    """The model without its language-model head."""
    names = (str(model.base_model_prefix), "model")
    found = next((getattr(model, name) for name in names if name and hasattr(model, name)), None)
    return backbone_of(model.language_model) if found is None else found  # type: ignore[arg-type]  # of a wrapper


def device_of(module: torch.nn.Module) -> torch.device:
    """The device of a module: of its first parameter."""
    return next(module.parameters()).device


def routers(model: torch.nn.Module, structure: Structure) -> tuple[torch.nn.Module, ...]:
    """The router of every MoE layer: the module whose class the model declares as the source of its router logits.

    In a layer that looks up experts by token id it is the module that holds the table.

    Raises:
        InputError: a layer has no such module, or more than one.
    """
    declared = []
    for module in model.modules():
        recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        declared += [getattr(r, "target_class", r) for r in (recorder if isinstance(recorder, list) else [recorder])]
    classes = tuple({c for c in declared if isinstance(c, type)})
    found = []
    with_table = {table.layer: table.parameter.rpartition(".")[0] for table in structure.tables.values()}
    for layer, name in enumerate(structure.experts_modules):
        if layer in with_table:
            found.append(model.get_submodule(with_table[layer]))
            continue
        block = model.get_submodule(name.rpartition(".")[0])
        fitting = [m for m in block.modules() if isinstance(m, classes)] if classes else []
        if len(fitting) != 1:
            where = f"decoder layer {structure.topology.decoder_layers[layer]} of {structure.topology.family}"
            raise InputError(f"{where} has {len(fitting)} router modules, one is needed: not supported")
        found.append(fitting[0])
    return tuple(found)
