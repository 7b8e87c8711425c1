"""Whether transformers can load a checkpoint here: reads its settings and headers, before a download or a long job.

A quantised checkpoint needs the package of its quantiser; a dtype that the experts' kernel lacks is refused.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from moecover.checkpoints.config_edit import QUANTISATION_KEYS
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, arg

DTYPES = ("auto", "bfloat16", "float16", "float32")  # those of the grouped kernel
UNREADABLE = ("F4", "F6_E2M3", "F6_E3M2")  # dtypes of tensors that torch has no numbers for
# By method of quantisation, the packages that transformers needs: as pip calls them, and as they are imported.
PACKAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "aqlm": (("aqlm[gpu,cpu]", "aqlm"),),
    "auto-round": (("auto-round", "auto_round"),),
    "awq": (("gptqmodel", "gptqmodel"),),
    "bitsandbytes": (("bitsandbytes", "bitsandbytes"),),
    "compressed-tensors": (("compressed-tensors", "compressed_tensors"),),
    "eetq": (("kernels", "kernels"),),
    "fbgemm_fp8": (("fbgemm-gpu", "fbgemm_gpu"),),
    "fouroversix": (("fouroversix", "fouroversix"),),
    "fp_quant": (("fp_quant", "fp_quant"),),
    "gptq": (("optimum", "optimum"), ("gptqmodel", "gptqmodel")),
    "higgs": (("flute-kernel", "flute"), ("fast_hadamard_transform", "fast_hadamard_transform")),
    "hqq": (("hqq", "hqq"),),
    "metal": (("kernels", "kernels"),),
    "nvfp4": (("kernels", "kernels"),),
    "quanto": (("optimum-quanto", "optimum.quanto"),),
    "quark": (("amd-quark", "quark"),),
    "sinq": (("sinq", "sinq"),),
    "spqr": (("spqr_quant[gpu]", "spqr_quant"),),
    "torchao": (("torchao", "torchao"),),
    "vptq": (("vptq", "vptq"),),
}


def settings_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The quantisation settings that transformers reads; None if there are none."""
    for config in (checkpoint.config, checkpoint.text_config):
        for key in QUANTISATION_KEYS:
            if isinstance(found := config.get(key), dict) and found:
                return found
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def missing_packages(settings: dict[str, Any]) -> list[str]:
    """The packages that are not installed here of those that a quantised checkpoint needs, as pip calls them."""
    method = settings.get("quant_method")
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        method = "bitsandbytes"
    return [name for name, module in PACKAGES.get(str(method), ()) if not _is_installed(module)]


def check_loadable(structure: Structure, dtype: str = "auto") -> None:
    """Refuse, before its weights are downloaded, a checkpoint that transformers cannot load here.

    Args:
        structure: the checkpoint; its headers are enough.
        dtype: in which it is to run, ``auto`` for its own.

    Raises:
        InputError: it is quantised by a method that is unknown or whose package is missing (says which), or it would
            run in a dtype that the experts' kernel does not have.
    """
    if structure.checkpoint.gguf is not None:
        raise InputError(
            f"{structure.checkpoint.name} is a GGUF file, which transformers does not run: `profile`, `evaluate` and "
            "`verify` run it in llama.cpp, `prune` takes the plan that `plan` makes of a profile, `shrink` does it all"
        )
    _check_dtype(structure, dtype)
    if not (settings := settings_of(structure.checkpoint)):
        return
    if packages := missing_packages(settings):
        raise not_loaded(
            structure, f"transformers needs {' and '.join(packages)} for it: pip install {' '.join(packages)}"
        )
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment(device_map=None)
    except Exception as error:  # quantisers raise errors of all kinds
        raise not_loaded(structure, error) from error


def _check_dtype(structure: Structure, dtype: str) -> None:
    checkpoint = structure.checkpoint
    unreadable = (entry for entry in checkpoint.tensors.values() if entry.dtype in UNREADABLE)
    if not structure.quantised and (entry := next(unreadable, None)):
        raise InputError(f"{checkpoint.name}: tensor {entry.name} is of {entry.dtype}, which cannot be loaded")
    if dtype != "auto" or checkpoint.declared_quantisation:
        return
    own = stored_dtype(checkpoint)
    if own not in DTYPES:
        raise InputError(
            f"{checkpoint.name} is stored in {own}, in which it does not run. Give {arg('dtype', 'float32')}, or "
            f"another of {', '.join(DTYPES[1:])}"
        )


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that transformers takes for a checkpoint, by its name in torch: config.json's, else the tensors'."""
    for config in (checkpoint.text_config, checkpoint.config):
        for key in ("dtype", "torch_dtype"):
            if isinstance(found := config.get(key), str):
                return found.removeprefix("torch.")
    largest = max(checkpoint.tensors.values(), key=lambda entry: entry.num_bytes)
    return {"F64": "float64", "F16": "float16", "BF16": "bfloat16"}.get(largest.dtype, "float32")


def not_loaded(structure: Structure, error: Exception | str) -> InputError:
    """The error for a checkpoint that cannot be loaded, with the way out for a quantised one."""
    reason, way_out = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__, ""
    if how := structure.quantised or structure.checkpoint.declared_quantisation:
        way_out = f". It is quantised ({how}): profile the original that it was made from, its plan applies here too"
    return InputError(f"{structure.checkpoint.name} could not be loaded: {reason}{way_out}")
