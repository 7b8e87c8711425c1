"""The live model: reads a checkpoint, gives the model in memory and its routers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.deepseek.registration import register_deepseek
from moecover.checkpoints.model_class import auto_class
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, arg, is_out_of_memory
from moecover.runtime.loadable import DTYPES, check_loadable, not_loaded
from moecover.signals import held

if TYPE_CHECKING:
    import torch


def check_device(dtype: str, device: str) -> str:
    """Check a dtype and resolve a device.

    Args:
        dtype: one of `DTYPES`.
        device: a torch device by name; ``auto`` is the first GPU, else the CPU.

    Returns:
        The device by name, never ``auto``.

    Raises:
        InputError: unknown dtype, or a device that this machine does not have.
    """
    with held():
        import torch

    if dtype not in DTYPES:
        raise InputError(f"unknown {arg('dtype', dtype)}. Allowed: {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"{arg('device', device)} is not available: {str(error).splitlines()[0]}") from error
    return device


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64."""
    return device.type != "mps"


def check_float64(device: torch.device, what: str) -> None:
    """Refuse work that needs float64 on a device that has none.

    Raises:
        InputError: names the work and the device.
    """
    if not has_float64(device):
        raise InputError(
            f"{what} computes in float64, which {arg('device', device.type)} does not have. Give {arg('device', 'cpu')}"
        )


def load_model(structure: Structure, *, dtype: str = "auto", device: str = "auto") -> torch.nn.Module:
    """Load the model of a checkpoint in evaluation mode.

    Its experts run in the grouped kernel of transformers, which is the default there; a few families have none.

    Args:
        structure: the checkpoint.
        dtype: a torch dtype by name; ``auto`` takes the checkpoint's.
        device: a torch device by name; ``auto`` takes the first GPU, else the CPU.

    Raises:
        InputError: unknown dtype or device, or tensors that are missing in the files.
    """
    device = check_device(dtype, device)
    check_loadable(structure, dtype)
    from transformers import AutoConfig

    register_deepseek()

    source = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(structure.checkpoint.path, **source)
        auto = auto_class(type(config))
        with _no_bars():
            model, info = auto.from_pretrained(
                structure.checkpoint.path, dtype=dtype, use_safetensors=True, output_loading_info=True, **source
            )
    except Exception as error:  # the libraries that read the folder's files may raise anything
        if is_out_of_memory(error):
            raise
        raise not_loaded(structure, error) from error
    if missing := sorted(info["missing_keys"]):
        raise missing_tensors(structure.checkpoint.name, missing)
    return model.to(device).eval()  # type: ignore[no-any-return]


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
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
    return next(getattr(model, name) for name in names if hasattr(model, name))


def routers(model: torch.nn.Module, structure: Structure) -> tuple[torch.nn.Module, ...]:
    """The router of every MoE layer: the module whose class the model declares as the source of its router logits.

    Raises:
        InputError: a layer has no such module, or more than one.
    """
    declared = []
    for module in model.modules():
        recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        declared += [getattr(r, "target_class", r) for r in (recorder if isinstance(recorder, list) else [recorder])]
    classes = tuple({c for c in declared if isinstance(c, type)})
    found = []
    for layer, name in enumerate(structure.experts_modules):
        block = model.get_submodule(name.rpartition(".")[0])
        fitting = [m for m in block.modules() if isinstance(m, classes)] if classes else []
        if len(fitting) != 1:
            where = f"decoder layer {structure.topology.decoder_layers[layer]} of {structure.topology.family}"
            raise InputError(f"{where} has {len(fitting)} router modules, one is needed: not supported")
        found.append(fitting[0])
    return tuple(found)
