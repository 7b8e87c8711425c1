"""The live model: reads a checkpoint, gives the model in memory, its routers, and inputs in batches.

What the profile and the evaluation share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moecover.checkpoints.deepseek.registration import register_deepseek
from moecover.checkpoints.model_class import auto_class
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, is_out_of_memory
from moecover.signals import held

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "bfloat16", "float16", "float32")  # what the grouped kernel runs


def check_device(dtype: str, device: str) -> str:
    """The device that is meant, by name.

    Raises:
        InputError: unknown dtype, or a device that this machine does not have.
    """
    with held():
        import torch

    if dtype not in DTYPES:
        raise InputError(f"unknown --dtype {dtype!r}. Allowed: {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} is not available: {str(error).splitlines()[0]}") from error
    return device


def check_loadable(structure: Structure) -> None:
    """Refuse, before a download, a quantised checkpoint that transformers cannot read here.

    Raises:
        InputError: its quantiser is unknown or its package is missing; says which.
    """
    if structure.quantised is None:
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    checkpoint = structure.checkpoint
    settings = checkpoint.text_config.get("quantization_config") or checkpoint.config.get("quantization_config")
    if not settings:
        return
    try:
        AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment(device_map=None)
    except Exception as error:  # each quantiser raises what it likes
        raise _not_loaded(structure, error) from error


def _not_loaded(structure: Structure, error: Exception) -> InputError:
    reason, way_out = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__, ""
    if structure.quantised:
        way_out = f". It is quantised ({structure.quantised}): profile the original that it was made from, its plan applies here too"  # fmt: skip
    return InputError(f"{structure.checkpoint.name} could not be loaded: {reason}{way_out}")


def load_model(structure: Structure, *, dtype: str = "auto", device: str = "auto") -> torch.nn.Module:
    """The live model of a checkpoint, in evaluation mode, its experts run by the library's grouped kernel.

    That kernel is the library's default; a few families have none.

    Args:
        structure: the checkpoint.
        dtype: a torch dtype by name; ``auto`` takes the checkpoint's.
        device: a torch device by name; ``auto`` takes the first GPU, else the CPU.

    Raises:
        InputError: unknown dtype or device, or tensors missing in the files.
    """
    device = check_device(dtype, device)
    from transformers import AutoConfig

    register_deepseek()
    name = structure.checkpoint.name
    try:
        config = AutoConfig.from_pretrained(structure.checkpoint.path, trust_remote_code=False, local_files_only=True)
        auto = auto_class(type(config))
        model, info = auto.from_pretrained(
            structure.checkpoint.path, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, local_files_only=True,
        )  # fmt: skip
    except Exception as error:  # a quantiser's package may raise anything
        known = isinstance(error, (OSError, ValueError, RuntimeError))
        if is_out_of_memory(error) or not (known or structure.quantised):
            raise
        raise _not_loaded(structure, error) from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{name}: {len(missing)} tensors are missing in the files, the first is {missing[0]}. Fetch it again"
        )
    return model.to(device).eval()  # type: ignore[no-any-return]


def backbone_of(model: torch.nn.Module) -> Any:
    """The model without its head, which no statistic needs."""
    names = (str(model.base_model_prefix), "model")
    return next(getattr(model, name) for name in names if hasattr(model, name))


def routers(model: torch.nn.Module, structure: Structure) -> tuple[torch.nn.Module, ...]:
    """The router module of every MoE layer: the one of the class that the model itself declares.

    Raises:
        InputError: no module or more than one fits a layer.
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
            raise InputError(f"decoder layer {structure.topology.decoder_layers[layer]} of {structure.topology.family} has {len(fitting)} modules that route, one is needed: not supported")  # fmt: skip
        found.append(fitting[0])
    return tuple(found)
