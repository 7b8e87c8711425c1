"""Quantised siblings of the tiny checkpoints, and multi-token-prediction layers, with the names that the hub uses."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
EXPERT = re.compile(r"\.experts\.(\d+)\.")


def some_bytes(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Seeded bytes that differ from tensor to tensor."""
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)
    return raw.view(dtype)


def fp8(stem: str, w: torch.Tensor, block: int = 128) -> Tensors:
    scales = torch.rand(*(-(-size // block) for size in w.shape))
    return {f"{stem}.weight": w.to(torch.float8_e4m3fn), f"{stem}.weight_scale_inv": scales}


def compressed(stem: str, w: torch.Tensor) -> Tensors:
    rows, columns = w.shape
    return {
        f"{stem}.weight_packed": some_bytes(rows, columns // 8, dtype=torch.int32),
        f"{stem}.weight_scale": some_bytes(rows, 1, dtype=torch.bfloat16),
        f"{stem}.weight_shape": torch.tensor([rows, columns]),
        f"{stem}.weight_zero_point": some_bytes(rows, 1, dtype=torch.int32),
    }


def gptq(stem: str, w: torch.Tensor) -> Tensors:
    rows, columns = w.shape
    return {
        f"{stem}.qweight": some_bytes(columns // 8, rows, dtype=torch.int32),
        f"{stem}.qzeros": some_bytes(1, rows // 8, dtype=torch.int32),
        f"{stem}.scales": some_bytes(1, rows, dtype=torch.float16),
        f"{stem}.g_idx": torch.arange(columns, dtype=torch.int32),
    }


def awq(stem: str, w: torch.Tensor) -> Tensors:
    rows, columns = w.shape
    return {
        f"{stem}.qweight": some_bytes(columns, rows // 8, dtype=torch.int32),
        f"{stem}.qzeros": some_bytes(1, rows // 8, dtype=torch.int32),
        f"{stem}.scales": some_bytes(1, rows, dtype=torch.float16),
    }


def nvfp4(stem: str, w: torch.Tensor) -> Tensors:
    rows, columns = w.shape
    return {
        f"{stem}.weight": some_bytes(rows, columns // 2),
        f"{stem}.weight_scale": some_bytes(rows, columns // 16).view(torch.float8_e4m3fn),
        f"{stem}.weight_scale_2": torch.rand(()),
        f"{stem}.input_scale": torch.rand(()),
    }


LAYOUTS: dict[str, Callable[[str, torch.Tensor], Tensors]] = {
    "fp8": fp8,
    "compressed-tensors": compressed,
    "gptq": gptq,
    "awq": awq,
    "modelopt": nvfp4,
}


def quantise(source: Path, target: Path, method: str, **settings: Any) -> Path:
    """A sibling of a checkpoint whose experts (and one attention matrix, one router left alone) are stored packed.

    With ``weight_block_size`` in the settings, shared experts are stored in these blocks, too.
    """
    torch.manual_seed(1)
    layout, blocks = LAYOUTS[method], settings.get("weight_block_size")
    if blocks:
        layout = functools.partial(fp8, block=blocks[0])
    shutil.copytree(source, target)
    tensors: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        inside = EXPERT.search(name) or (blocks and "shared_experts" in name)
        packed = tensor.dim() == 2 and (inside or name.endswith("o_proj.weight"))
        tensors |= layout(name.removesuffix(".weight"), tensor.float()) if packed else {name: tensor}
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors", metadata={"format": "pt"})
    set_config(target, quantization_config={"quant_method": method, **settings})
    return target


def mxfp4(source: Path, target: Path) -> Path:
    """gpt_oss as on the hub: blocks and scales of all experts in one tensor, biases plain; no settings."""
    torch.manual_seed(1)
    shutil.copytree(source, target)
    tensors: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = tensor.shape
            tensors[f"{name}_blocks"] = some_bytes(experts, rows, columns // 32, 16)
            tensors[f"{name}_scales"] = some_bytes(experts, rows, columns // 32)
        else:
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values, indent=1))


def with_mtp(source: Path, target: Path, root: str, **config: Any) -> Path:
    """A checkpoint with a multi-token-prediction layer as on the hub: the last decoder layer's tensors and two more."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    last = max(int(n) for k in tensors for n in re.findall(r"^model\.layers\.(\d+)\.", k))
    prefix = f"model.layers.{last}."
    extra = {f"{root}.{k.removeprefix(prefix)}": v + 1 for k, v in tensors.items() if f".layers.{last}." in k}
    extra |= {f"{root}.enorm.weight": torch.ones(32), f"{root}.shared_head.head.weight": torch.rand(300, 32)}
    save_file(tensors | extra, target / "model.safetensors", metadata={"format": "pt"})
    set_config(target, **config)
    return target


MTP = {
    "deepseek_v3": ("model.layers.3", {"num_nextn_predict_layers": 1}),
    "qwen2_moe": ("mtp.layers.0", {"mtp_num_hidden_layers": 1, "mtp_layer_types": ["full_attention"], "use_mtp": True}),
}


def with_mtp_run(source: Path, target: Path, root: str) -> Path:
    """The same checkpoint with its multi-token-prediction layer as one more decoder layer: the model runs it."""
    shutil.copytree(source, target)
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    tensors: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.startswith(root) and re.search(r"\.(enorm|shared_head)\.", name):
            continue
        tensors[name.replace(f"{root}.", f"model.layers.{layers}.")] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config = {k: v for k, v in config.items() if not re.search("mtp|nextn|layer_types", k)}
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers + 1}))
    return target


def with_mtp_that_drafts(source: Path, target: Path, layers: int = 1, **config: Any) -> Path:
    """A checkpoint with multi-token-prediction layers of their own weights, which transformers runs; numbered on."""
    tensors = load_file(source / "model.safetensors")
    shutil.copytree(source, target)
    numbers = sorted({int(n) for k in tensors for n in re.findall(r"^model\.layers\.(\d+)\.", k)})
    draw, prefix = torch.Generator().manual_seed(5), f"model.layers.{numbers[-1]}."
    for number in range(len(numbers), len(numbers) + layers):
        root = f"model.layers.{number}."
        for name, last in [(k, v) for k, v in tensors.items() if k.startswith(prefix)]:
            kept = last.dim() < 2 and "bias" not in name  # a norm
            scale = 1.0 if name.endswith("gate.weight") else 0.3 if "bias" in name else 0.15
            new = last.clone() if kept else torch.randn(last.shape, generator=draw) * scale
            tensors[root + name.removeprefix(prefix)] = new.to(last.dtype)
        tensors |= {f"{root}{n}.weight": torch.rand(32, generator=draw) + 0.5 for n in ("enorm", "hnorm")}
        tensors[f"{root}shared_head.norm.weight"] = torch.rand(32, generator=draw) + 0.5
        tensors[f"{root}eh_proj.weight"] = torch.randn(32, 64, generator=draw) / 8
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    set_config(target, num_nextn_predict_layers=layers, **config)
    return target
